"""Group convolutions against one plain convolution of the full layer's expanded shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Job, measure
from margeq.groups import P4, P4M, FiniteGroup
from margeq.layers import GroupConv2d

__all__ = ["LayerRow", "group_layer_rows"]

_BATCH, _CHANNELS, _SIZE = 32, 16, 28
_TARGETS = {
    "P4": {"full": 1.10, "g": 1.10, "pointwise": 0.65, "gc": 0.80},
    "P4M": {"full": 1.10, "g": 1.10, "pointwise": 0.45, "gc": 0.55},
}
_OTHERS = ("depthwise", "dg")


@dataclass(frozen=True)
class LayerRow:
    """Forward and backward of one layer, as a multiple of the plain convolution's.

    Attributes:
        group: the group.
        kernel: extent of the filters.
        kind: ``separability``, or a neighbour.
        ms: milliseconds.
        ratio: to the plain convolution.
        target: largest ratio allowed, if there is one.
    """

    group: str
    kernel: int
    kind: str
    ms: float
    ratio: float
    target: float | None


def group_layer_rows(repeats: int) -> list[LayerRow]:
    """All kinds for p4 and p4m with 3 x 3 and 5 x 5 filters; a neighbour where it installs."""
    cases = [(group, kernel) for group in (P4, P4M) for kernel in (3, 5)]
    return [row for group, kernel in cases for row in _rows(group, kernel, repeats)]


def _rows(group: FiniteGroup, kernel: int, repeats: int) -> list[LayerRow]:
    x = torch.randn(_BATCH, _CHANNELS, group.order, _SIZE, _SIZE, requires_grad=True)
    flat = x.detach().flatten(1, 2).requires_grad_()
    wide = _CHANNELS * group.order
    plain = _step(nn.Conv2d(wide, wide, kernel, padding=kernel // 2), flat)
    targets = _TARGETS[group.name]
    jobs = [
        Job(kind, _step(_layer(group, kernel, kind), x), targets.get(kind))
        for kind in (*targets, *_OTHERS)
    ]
    jobs += [Job("escnn", run) for run in _escnn(group, kernel, flat)]
    costs = measure(jobs, plain, repeats)
    return [
        LayerRow(
            group.name, kernel, job.name, 1e3 * costs[job.name].seconds, costs[job.name].units,
            job.target,
        )
        for job in jobs
    ]  # fmt: skip


def _layer(group: FiniteGroup, kernel: int, kind: str) -> nn.Module:
    return GroupConv2d(
        _CHANNELS, _CHANNELS, kernel, group=group, separability=kind, padding=kernel // 2
    )


def _step(layer: Callable[[Any], Any], x: Any) -> Callable[[], object]:
    """Forward and backward, the gradient of the input included."""
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    cotangent = torch.randn_like(layer(x).detach())
    return lambda: torch.autograd.grad(layer(x), [x, *parameters], cotangent)


def _escnn(group: FiniteGroup, kernel: int, flat: Tensor) -> list[Callable[[], object]]:
    """The same full group convolution by escnn, or nothing where it cannot be imported."""
    try:
        spaces, modules = import_module("escnn.gspaces"), import_module("escnn.nn")
    except Exception:  # its compiled neighbours fail in ways of their own
        return []
    mirrors = group.name == "P4M"
    space = spaces.flipRot2dOnR2(4) if mirrors else spaces.rot2dOnR2(4)
    kind = modules.FieldType(space, _CHANNELS * [space.regular_repr])
    layer = modules.R2Conv(kind, kind, kernel, padding=kernel // 2)
    parameters = list(layer.parameters())

    def forward(x: Tensor) -> Tensor:
        return layer(modules.GeometricTensor(x, kind)).tensor

    cotangent = torch.randn_like(forward(flat).detach())
    return [lambda: torch.autograd.grad(forward(flat), [flat, *parameters], cotangent)]
