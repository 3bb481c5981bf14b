"""Some group elements of a map, and maps of some elements among zeros.

Both as slices of consecutive elements, and each the other's gradient: on CPUs indices, or slices
whose gradients are added up, cost several times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["place_elements", "take_elements"]

Runs = tuple[tuple[int, int], ...]


def take_elements(x: Tensor, indices: Tensor) -> Tensor:
    """Some elements of a map.

    Args:
        x: ``[n, c, |H|, *space]``.
        indices: elements, ascending.

    Returns:
        ``[n, c, len(indices), *space]``.
    """
    order = x.shape[2]
    if len(indices) == order:
        return x
    taken: Any = _Take.apply(x, _runs(indices), order)
    return taken


def place_elements(maps: Tensor, indices: Tensor, order: int) -> Tensor:
    """Maps of some elements, with zeros at the others.

    Args:
        maps: ``[n, c, len(indices), *space]``.
        indices: elements, ascending.
        order: number of all elements, ``|H|``.

    Returns:
        ``[n, c, |H|, *space]``.
    """
    if len(indices) == order:
        return maps
    placed: Any = _Place.apply(maps, _runs(indices), order)
    return placed


class _Linear(torch.autograd.Function):
    """A linear map that only needs to know elements, with its transpose as gradient."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Runs, int], output: Tensor) -> None:
        ctx.elements = inputs[1:]


class _Take(_Linear):
    @staticmethod
    def forward(x: Tensor, runs: Runs, order: int) -> Tensor:
        return torch.cat([x[:, :, start:stop] for start, stop in runs], 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Place.apply(grads[0], *ctx.elements), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Take.apply(tangents[0], *ctx.elements)


class _Place(_Linear):
    @staticmethod
    def forward(maps: Tensor, runs: Runs, order: int) -> Tensor:
        shape = (*maps.shape[:2], order, *maps.shape[3:])
        placed, end, taken = maps.new_empty(shape), 0, 0
        for start, stop in runs:
            placed[:, :, end:start] = 0.0
            placed[:, :, start:stop] = maps[:, :, taken : taken + stop - start]
            end, taken = stop, taken + stop - start
        placed[:, :, end:] = 0.0
        return placed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Take.apply(grads[0], *ctx.elements), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Place.apply(tangents[0], *ctx.elements)


def _runs(indices: Tensor) -> Runs:
    """Consecutive indices as ``(start, stop)``."""
    runs: list[tuple[int, int]] = []
    for index in indices.tolist():
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)
