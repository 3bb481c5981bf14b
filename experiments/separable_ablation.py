"""What is lost when group convolutions are factored (appendix F.3, table 7).

Networks of GCONV alone on the rotation group p4, under MAP on turned pictures: full filters,
separable ones, and ones that do not mix the group's elements, beside an ordinary CNN.
Run with ``python -m experiments.separable_ablation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import tyro
from torch import nn

from experiments.multiple_groups import load
from experiments.presets import SEPARABLE, Settings
from experiments.records import Cell
from experiments.runs import Options, run_table
from margeq.data import ImageTask
from margeq.errors import ConfigError
from margeq.models import ella

__all__ = ["EXPERIMENT", "build", "matched_width", "run"]

EXPERIMENT = "separable_ablation"

_SEPARABILITY: Mapping[str, str | None] = {
    "full": "full",
    "separable": "depthwise",
    "dw-separable": "dg",
    "pointwise": "pointwise",
    "cnn": None,
}


def build(cell: Cell, settings: Settings, task: ImageTask) -> nn.Module:
    """One network of the table: with the preset's width, or ``-matched`` in its weights.

    Raises:
        ConfigError: for an unknown network.
    """
    kind = cell.model.removesuffix("-matched")
    if kind not in _SEPARABILITY:
        raise ConfigError(f"network {cell.model!r}: use {', '.join(_SEPARABILITY)}, or -matched")
    sizes = {
        "in_channels": task.train_images.shape[1],
        "num_classes": task.n_classes,
        "size": settings.size,
    }
    width = settings.width
    if kind != cell.model:
        width = matched_width(kind, width, **sizes)
    return _network(kind, width, **sizes)


def matched_width(kind: str, width: int, **sizes: Any) -> int:
    """The width at which a network has about as many weights as the pointwise one of ``width``.

    Of the two widths between which the pointwise count lies, the one whose count is closer.
    """
    with torch.random.fork_rng(devices=[]):  # only looked at: no draw of theirs is kept
        target = _n_weights("pointwise", width, **sizes)
        above = next(w for w in count(1) if _n_weights(kind, w, **sizes) >= target)
        widths = [w for w in (above - 1, above) if w]
        return min(widths, key=lambda w: abs(_n_weights(kind, w, **sizes) - target))


def _n_weights(kind: str, width: int, **sizes: Any) -> int:
    return sum(weight.numel() for weight in _network(kind, width, **sizes).parameters())


def _network(kind: str, width: int, **sizes: Any) -> nn.Module:
    separability = _SEPARABILITY[kind]
    if separability is None:
        return ella("conv", width=width, **sizes)
    return ella("gconv", separability=separability, width=width, **sizes)


def run(options: Options) -> None:
    """All networks of the table; the paper trains them with unit precisions only."""
    run_table(EXPERIMENT, SEPARABLE, load, replace(options, training=("map",)), build)


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
