"""Shares that reach both ends of their range and do not get stuck there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from margeq.errors import ConfigError

__all__ = ["from_share", "share_between"]

_MARGIN = 0.1
"""By how much a sigmoid is stretched beyond each end of its range, so that both are reached."""


def share_between(raw: Tensor, low: float, *, ascend: bool) -> Tensor:
    """A number from ``low`` to 1 that reaches both, by a stretched sigmoid cut off at the ends.

        u = low + (1 - low) clamp(1.2 sigmoid(raw) - 0.1, 0, 1)

    At an end the gradient passes where a step along it leads back inside, and is zero where it
    would lead further out: nothing gets stuck, nothing drifts away.

    Args:
        raw: any number.
        low: smallest value.
        ascend: whether ``u`` will climb the gradient (of an evidence) or descend it (of a loss).

    Returns:
        Of the shape of ``raw``.
    """
    stretched = (1.0 + 2.0 * _MARGIN) * raw.sigmoid() - _MARGIN
    return low + (1.0 - low) * _inwards(stretched, ascend)


def from_share(share: float, low: float) -> float:
    """The raw number that :func:`share_between` turns into a share; ends are reached exactly.

    Args:
        share: from ``low`` to 1.
        low: smallest value.

    Returns:
        A finite number.

    Raises:
        ConfigError: for a share out of range.
    """
    if not low <= share <= 1.0:
        raise ConfigError(f"{share!r} must lie between {low:.4g} and 1")
    inside = (share - low) / (1.0 - low)
    # a little into the margin, where no rounding leads back inside
    beyond = {0.0: -_MARGIN / 10, 1.0: 1.0 + _MARGIN / 10}.get(inside, inside)
    stretched = (beyond + _MARGIN) / (1.0 + 2.0 * _MARGIN)
    return math.log(stretched / (1.0 - stretched))


def _inwards(x: Tensor, ascend: bool) -> Tensor:
    clamped: Any = _ClampInwards.apply(x, ascend)
    return clamped


class _ClampInwards(torch.autograd.Function):
    """To [0, 1]; at and beyond an end with the gradients that lead back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ascend: bool) -> Tensor:
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.ascend = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        step = grads[0] if ctx.ascend else -grads[0]
        leaves = ((x <= 0.0) & (step < 0.0)) | ((x >= 1.0) & (step > 0.0))
        return torch.where(leaves, torch.zeros_like(grads[0]), grads[0]), None
