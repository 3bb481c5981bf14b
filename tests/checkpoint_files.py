"""Checkpoints to damage, and damage for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from margeq.checkpoint import CheckpointStore
from margeq.checkpoint.manifest import MANIFEST, FileEntry, Manifest, digest, read_manifest


def state(value=1.0):
    """A state with several sections, one of them without tensors."""
    weights = torch.linspace(0, value, 60, dtype=torch.float32).reshape(3, 20)
    return {
        "model": {"0.weight": weights, "0.bias": torch.full((3,), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.999)},
        "place": {"epoch": 3, "value": value},
    }


def saved(directory, steps=(1,)):
    """A store with checkpoints of these numbers, whose values are their numbers."""
    directory.mkdir(exist_ok=True)
    store = CheckpointStore(directory, keep=100)
    for step in steps:
        store.save(step, state(float(step)))
    return store


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir())


def adopt(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace or add a file and make the manifest vouch for it, as a forger would."""
    (checkpoint / name).write_bytes(data)
    old = read_manifest(checkpoint)
    files = {**old.files, name: FileEntry(len(data), digest(data))}
    write_manifest(checkpoint, Manifest(old.step, old.score, files, old.environment))


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    (checkpoint / MANIFEST).write_bytes(manifest.to_bytes())


def forged_manifest(body) -> bytes:
    """A manifest with a right digest and any content."""

    def spell(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    return spell({"body": body, "sha256": digest(spell(body))})


def body_of(checkpoint: Path):
    return json.loads((checkpoint / MANIFEST).read_bytes())["body"]


def with_header(header, data=b"") -> bytes:
    """A file of tensors with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def equal(a, b) -> bool:
    """Same structure, types, order of keys, and bits."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and a.cpu().contiguous().numpy().tobytes() == b.cpu().numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))
