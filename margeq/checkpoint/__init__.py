"""Checkpoints without pickle: plain trees of tensors, checked before anything is believed."""

from __future__ import annotations

from margeq.checkpoint.lock import run_lock
from margeq.checkpoint.store import Checkpoint, CheckpointStore
from margeq.checkpoint.trees import require_same_tensors, trusting
from margeq.checkpoint.writer import Checkpoints, CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "CheckpointWriter",
    "Checkpoints",
    "require_same_tensors",
    "run_lock",
    "trusting",
]
