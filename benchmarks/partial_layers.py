"""What a narrower part of the group saves, and what that part costs over a plain convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import Job, measure
from margeq.groups import P4, P4M, C, FiniteGroup
from margeq.layers import (
    GroupGate,
    GroupSampler,
    MonteCarloGroupConv2d,
    PartialGroupConv2d,
    PlanarSubset,
)

__all__ = ["PartialRow", "partial_rows", "partial_table"]

_BATCH, _SIZE = 32, 28
_MOST, _LEAST_SPEED_UP = 1.15, 3.0
_WIDTHS = (1.0, 0.5, 0.25)
_ON_GRIDS: list[tuple[FiniteGroup, int, int]] = [
    (P4, 16, 3), (P4, 16, 5), (P4M, 8, 3), (C(8), 8, 5), (C(16), 4, 5),
]  # fmt: skip
_ON_SAMPLES = [(8, 16, 3), (8, 16, 5)]


@dataclass(frozen=True)
class PartialRow:
    """Forward and backward of one layer at one width, on both sides of it.

    Attributes:
        layer: group or samples, channels and filters.
        width: share of the rotations that is left; below 1 without reflections.
        live: elements that are computed.
        ms: milliseconds.
        of_plain: multiple of a plain convolution with as many multiplications.
        speed_up: over the layer at full width.
        ideal: what the multiplications alone would give.
    """

    layer: str
    width: float
    live: int
    ms: float
    of_plain: float
    speed_up: float
    ideal: float


def partial_rows(repeats: int) -> list[PartialRow]:
    """Grids and samples at full, half and quarter width."""
    found = []
    for group, channels, kernel in _ON_GRIDS:
        name = f"{group}, {channels} channels, {kernel} × {kernel}"
        cases = [(width, *_on_grid(group, channels, kernel, width)) for width in _WIDTHS]
        found += _rows(name, cases, channels, kernel, repeats)
    for n_samples, channels, kernel in _ON_SAMPLES:
        name = f"{n_samples} samples, {channels} channels, {kernel} × {kernel}"
        cases = [(width, *_on_samples(n_samples, channels, kernel, width)) for width in _WIDTHS]
        found += _rows(name, cases, channels, kernel, repeats)
    return found


def _on_grid(
    group: FiniteGroup, channels: int, kernel: int, width: float
) -> tuple[nn.Module, int, int]:
    """A layer, the elements of its maps, and how many of them are computed."""
    gate = GroupGate(group, width, 1.0 if width == 1.0 else 0.0).requires_grad_(False)
    layer = PartialGroupConv2d(
        channels, channels, kernel, group=group, gate=gate, input_gate=gate, padding=kernel // 2
    )
    return layer, group.order, len(gate.live())


def _on_samples(
    n_samples: int, channels: int, kernel: int, width: float
) -> tuple[nn.Module, int, int]:
    subset = PlanarSubset(True, False, width, trained_by=None)
    sampler = GroupSampler(subset, n_samples)
    layer = MonteCarloGroupConv2d(
        channels, channels, kernel, inputs=sampler, outputs=sampler, padding=kernel // 2
    ).eval()
    live = len(sampler().angles)
    return layer, live, live


def _rows(
    name: str,
    cases: Sequence[tuple[float, nn.Module, int, int]],
    channels: int,
    kernel: int,
    repeats: int,
) -> list[PartialRow]:
    found: list[PartialRow] = []
    for width, layer, order, live in cases:
        maps = torch.randn(_BATCH, channels, order, _SIZE, _SIZE, requires_grad=True)
        flat = torch.randn(_BATCH, channels * live, _SIZE, _SIZE, requires_grad=True)
        plain = nn.Conv2d(channels * live, channels * live, kernel, padding=kernel // 2)
        job = Job("partial", _step(layer, maps), calls=3)
        cost = measure([job], _step(plain, flat, 3), repeats)["partial"]
        ms, of_plain = 1e3 * cost.seconds, 3 * cost.units
        first = found[0] if found else None
        speed_up, ideal = (first.ms / ms, (first.live / live) ** 2) if first else (1.0, 1.0)
        found.append(PartialRow(name, width, live, ms, of_plain, speed_up, ideal))
    return found


def _step(layer: nn.Module, x: Tensor, calls: int = 1) -> Callable[[], object]:
    """Forward and backward, the gradient of the input included, so many times."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(layer(x).detach())

    def run() -> None:
        for _ in range(calls):
            torch.autograd.grad(layer(x), wanted, cotangent)

    return run


def partial_table(rows: Sequence[PartialRow]) -> list[str]:
    """Markdown, with the targets."""
    lines = [
        f"| layer | width | elements | ms | × plain | ≤ {_MOST:g} | speed-up | of the "
        f"multiplications | ≥ {_LEAST_SPEED_UP:g} at ½ |",
        "|---|--:|--:|--:|--:|---|--:|--:|---|",
    ]
    for row in rows:
        most = "yes" if row.of_plain <= _MOST else "no"
        least = "yes" if row.speed_up >= _LEAST_SPEED_UP else "no"
        lines.append(
            f"| {row.layer} | {row.width:g} | {row.live} | {row.ms:.1f} | {row.of_plain:.2f} "
            f"| {most} | {row.speed_up:.1f} | {row.ideal:.1f} "
            f"| {least if row.width == 0.5 else ''} |"
        )
    return lines
