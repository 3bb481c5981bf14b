"""A tiny task in a file of its own, as users write them."""

from __future__ import annotations

TINY = """
import torch
from torch import nn

from margeq.runs import Task, register_task


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x.square())


@register_task("tiny")
def tiny(seed, width=3, trouble=""):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    if trouble == "data":
        x[3, 1] = float("nan")
    if trouble == "numbers":
        x = 1e30 * x
    if trouble == "bug":
        raise ZeroDivisionError("the user's own mistake")
    if trouble == "killed":
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    if trouble == "model":
        model = Odd(4, 2)
    return Task(model, [(x[:12], y[:12]), (x[12:], y[12:])], held_out=[(x, y)])
"""

QUICK = {"task": "tiny", "n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "lr": 0.05}
FLAGS = ["--n-epochs", "6", "--n-epochs-burnin", "2", "--marglik-frequency", "2", "--lr", "0.05"]
