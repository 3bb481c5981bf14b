"""What a narrower part of the group saves, and what a gate costs over a plain convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import Job, measure
from margeq.groups import P4, P4M, C, FiniteGroup
from margeq.layers import GroupGate, PartialGroupConv2d

__all__ = ["PartialRow", "partial_rows", "partial_table"]

_BATCH, _CHANNELS, _SIZE = 32, 16, 28
_MOST, _LEAST_SPEED_UP = 1.15, 3.0
_CASES: list[tuple[FiniteGroup, int]] = [(P4, 3), (P4, 5), (P4M, 3), (C(8), 5), (C(16), 5)]


@dataclass(frozen=True)
class PartialRow:
    """Forward and backward of one gated layer at one width, on both sides of it.

    Attributes:
        layer: group and filters.
        width: share of the rotations that is left.
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
    """Groups at full, half and quarter width."""
    return [row for group, kernel in _CASES for row in _rows(group, kernel, repeats)]


def _rows(group: FiniteGroup, kernel: int, repeats: int) -> list[PartialRow]:
    channels = _CHANNELS // 4 if group.order > P4M.order else _CHANNELS // 2
    channels = _CHANNELS if group == P4 else channels
    found: list[PartialRow] = []
    for width in (1.0, 0.5, 0.25):
        gate = GroupGate(group, width, 1.0 if width == 1.0 else 0.0).requires_grad_(False)
        live = len(gate.live())
        layer = PartialGroupConv2d(
            channels, channels, kernel, group=group, gate=gate, input_gate=gate,
            padding=kernel // 2,
        )  # fmt: skip
        wide = channels * live
        plain = nn.Conv2d(wide, wide, kernel, padding=kernel // 2)
        maps = torch.randn(_BATCH, channels, group.order, _SIZE, _SIZE, requires_grad=True)
        flat = torch.randn(_BATCH, wide, _SIZE, _SIZE, requires_grad=True)
        job = Job("partial", _step(layer, maps))
        cost = measure([job], _step(plain, flat), repeats)["partial"]
        ms = 1e3 * cost.seconds
        full = found[0] if found else None
        found.append(
            PartialRow(
                f"{group}, {channels} channels, {kernel} × {kernel}", width, live, ms, cost.units,
                full.ms / ms if full else 1.0, (full.live / live) ** 2 if full else 1.0,
            )
        )  # fmt: skip
    return found


def _step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, the gradient of the input included."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(layer(x).detach())
    return lambda: torch.autograd.grad(layer(x), wanted, cotangent)


def partial_table(rows: Sequence[PartialRow]) -> list[str]:
    """Markdown, with the targets."""
    lines = [
        "| layer | width | elements | ms | × plain | ≤ 1.15 | speed-up | of the multiplications "
        "| ≥ 3 at ½ |",
        "|---|--:|--:|--:|--:|---|--:|--:|---|",
    ]
    for row in rows:
        met = "yes" if row.of_plain <= _MOST else "no"
        half = {True: "yes", False: "no"}[row.speed_up >= _LEAST_SPEED_UP]
        lines.append(
            f"| {row.layer} | {row.width:g} | {row.live} | {row.ms:.1f} | {row.of_plain:.2f} "
            f"| {met} | {row.speed_up:.1f} | {row.ideal:.1f} "
            f"| {half if row.width == 0.5 else ''} |"
        )
    return lines
