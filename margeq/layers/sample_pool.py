"""Read-outs of maps on samples of a group, in which each element counts with its weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError
from margeq.layers.samples import GroupSampler

__all__ = ["SamplePool", "require_samples"]


class SamplePool(nn.Module):
    """Maximum or mean over the elements on which a map is sampled.

        mean:  y = sum_s w_s x_s / sum_s w_s
        max:   y = sum_k k (p_k - p_(k+1)) max {x_1, ..., x_k},   p_1 >= p_2 >= ... shares

    The average maximum over random sets of elements, the first ``k`` of which are there alone, and
    share all weight, with probability ``k (p_k - p_(k+1))``. For reflections that are there with
    probability ``v``, and then have half of the weight,

        y = (1 - v) max_rotations x + v max_all x .

    It is the maximum for equal weights, does not see elements of weight 0, and has no jump in
    between. Its derivative in an inclusion of 0 or 1 is what including the elements changes, so
    that a straight-through choice gets the gradient of the true difference in both cases.

    Args:
        sampler: elements of the map it reads, the ``outputs`` of the layer before.
        reduction: ``"max"`` or ``"mean"``.

    Shapes:
        ``[n, c, S, *space] -> [n, c, *space]``.

    Raises:
        ConfigError: for something that is no sampler, or an unknown reduction.
        DataError: for a map that is not on the present samples.

    Reference:
        Choquet 1954 (the integral of a function in a capacity).
    """

    def __init__(self, sampler: GroupSampler, reduction: Literal["max", "mean"] = "max") -> None:
        super().__init__()
        if not isinstance(sampler, GroupSampler):
            raise ConfigError(f"SamplePool: sampler={sampler!r}: use a GroupSampler")
        if reduction not in ("max", "mean"):
            raise ConfigError(f"SamplePool: reduction={reduction!r}: use 'max' or 'mean'")
        self.sampler, self.reduction = sampler, reduction

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the elements."""
        weights = require_samples(self, self.sampler, x)
        shape = (-1, *[1] * (x.ndim - 3))
        if self.reduction == "mean":
            return (x * (weights / weights.sum()).reshape(shape)).sum(2)
        # stable, so that elements of equal weights stay in one order
        order = weights.detach().argsort(descending=True, stable=True)
        shares = weights[order] / weights.sum()
        drops = shares - torch.cat([shares[1:], shares.new_zeros(1)])
        sizes = torch.arange(1.0, len(shares) + 1.0).to(shares)
        largest = x.index_select(2, order).cummax(2).values
        return (largest * (sizes * drops).reshape(shape)).sum(2)

    def extra_repr(self) -> str:
        """Reduction, for ``print(model)``."""
        return f"reduction={self.reduction!r}"


def require_samples(layer: nn.Module, sampler: GroupSampler, x: Tensor) -> Tensor:
    """Weights of the elements of a map.

    Args:
        layer: that reads it.
        sampler: of its elements.
        x: ``[n, c, S, ...]``.

    Returns:
        ``[S]``, of the type of the map.

    Raises:
        DataError: if the map is not on the present samples.
    """
    weights = sampler().weights.to(x)
    if x.ndim < 3 or x.shape[2] != len(weights):
        raise DataError(
            f"{type(layer).__name__} takes maps [n, c, {len(weights)}, ...] at the present "
            f"samples, got {tuple(x.shape)}; does the layer before write to the same GroupSampler?"
        )
    return weights
