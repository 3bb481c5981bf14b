"""Many evidence steps in one process, and what of it has grown; run as a module."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from array import array

import torch
from torch import nn

import margeq
from margeq.checkpoint import Checkpoints
from margeq.layers import ResidualPathways, SparseConv2d


def resident() -> int:
    """Bytes of this process in memory, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hooks(model: nn.Module) -> int:
    """Hooks on all modules and parameters."""
    kinds = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_state_dict_hooks", "_load_state_dict_post_hooks",
    )  # fmt: skip
    on_modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


KINDS = ("bytes", "hooks", "files", "threads", "system threads")


def measured(model: nn.Module) -> array[int]:
    """What must not grow, by :data:`KINDS`; in an array, which hardly grows itself."""
    files, tasks = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return array("q", [resident(), hooks(model), files, threading.active_count(), tasks])


def network() -> nn.Module:
    """Two paths with a lengthscale, and dropout."""
    torch.manual_seed(0)
    paths = {"sparse": SparseConv2d(1, 2, 3, padding=1), "conv": nn.Conv2d(1, 2, 1)}
    return nn.Sequential(
        ResidualPathways(paths), nn.Tanh(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(32, 3)
    )


def soak(n_updates: int, directory: str) -> list[dict[str, int]]:
    """Measurements after every update of one run."""
    found: list[array[int]] = []
    model = network()
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3

    def watch(event: margeq.callbacks.Event) -> None:
        if event.kind == "update":
            found.append(measured(model))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", margeq.errors.ConvergenceWarning)
        margeq.optimize_marglik(
            model, [(x[:8], y[:8]), (x[8:], y[8:])], n_epochs=n_updates, n_epochs_burnin=1,
            marglik_frequency=1, network_gradient="exact", restarts="free", seed=0,
            checkpoint_dir=Checkpoints(directory), callbacks=[watch], progress="none",
        )  # fmt: skip
    return [dict(zip(KINDS, row, strict=True)) for row in found]


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(soak(int(sys.argv[1]), sys.argv[2]), sys.stdout)
