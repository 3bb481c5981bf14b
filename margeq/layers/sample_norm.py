"""Normalisation of maps on samples of a group, in which each element counts with its weight.

    mean_c = sum_s p_s mean x_cs,   var_c = sum_s p_s (var x_cs + (mean x_cs - mean_c)^2)

with shares ``p_s`` that sum to 1: integrals over the subset. Elements of weight 0 are normalised,
but change nothing, and it does not matter whether they are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    register_split_rule,
    rule_for,
)
from margeq.layers.sample_pool import require_samples
from margeq.layers.samples import GroupSampler

__all__ = ["SampleBatchNorm", "SampleInstanceNorm"]


class SampleInstanceNorm(nn.Module):
    """Each channel of each datum with mean 0 and variance 1 over elements and positions.

    Args:
        sampler: elements of the map.
        eps: added to variances.

    Shapes:
        ``[n, c, S, y, x]``, unchanged.

    Raises:
        DataError: for a map that is not on the present samples.

    Reference:
        Ulyanov et al. 2016.
    """

    def __init__(self, sampler: GroupSampler, eps: float = 1e-5) -> None:
        super().__init__()
        self.sampler, self.eps = sampler, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        mean, variance = _moments(x, require_samples(self, self.sampler, x), (3, 4))
        return (x - mean) * (variance + self.eps).rsqrt()

    def extra_repr(self) -> str:
        """Constant, for ``print(model)``."""
        return f"eps={self.eps}"


class SampleBatchNorm(nn.BatchNorm3d):
    """``nn.BatchNorm3d``, whose statistics in training weight the elements.

    For samples of equal weight it is ``nn.BatchNorm3d``, and in evaluation always.

    Args:
        num_features: channels.
        sampler: elements of the map.

    Shapes:
        ``[n, c, S, y, x]``, unchanged.

    Raises:
        DataError: for a map that is not on the present samples.

    Reference:
        Ioffe & Szegedy 2015.
    """

    def __init__(self, num_features: int, sampler: GroupSampler) -> None:
        super().__init__(num_features)
        self.sampler = sampler

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, and in training follow the statistics."""
        weights = require_samples(self, self.sampler, input)
        if not self.training:
            return super().forward(input)
        mean, variance = _moments(input, weights, (0, 3, 4))
        self._follow(input, weights, mean, variance)
        scale = self.weight.reshape(-1, 1, 1, 1) * (variance + self.eps).rsqrt()
        return (input - mean) * scale + self.bias.reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def _follow(self, x: Tensor, weights: Tensor, mean: Tensor, variance: Tensor) -> None:
        n_elements = weights.sum() ** 2 / weights.square().sum()  # of equal weights their number
        n = n_elements * (x.numel() / (x.shape[1] * x.shape[2]))
        unbiased = variance * n / (n - 1.0).clamp_min(1.0)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        for running, present in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(present.flatten().to(running), self.momentum)


def _moments(x: Tensor, weights: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance over some axes and the elements, of which these are kept as ones."""
    shares = (weights / weights.sum()).reshape(-1, 1, 1)
    variances, means = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
    mean = (means * shares).sum(2, keepdim=True)
    within = (variances * shares).sum(2, keepdim=True)
    return mean, within + ((means - mean).square() * shares).sum(2, keepdim=True)


_PLAIN = cast(Rule, rule_for(nn.BatchNorm3d))


def _inputs(layer: SampleBatchNorm, x: Tensor, sampler: PositionSampler) -> Mapping[str, InputRows]:
    return _PLAIN.inputs(layer, layer.sampler.counted(x, 2), sampler)


def _output_grads(layer: SampleBatchNorm, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    return _PLAIN.output_grads(layer, x, layer.sampler.counted(grad_y, 3))


register_split_rule(SampleBatchNorm, rule=Rule(_inputs, _output_grads, starts_at={"weight": 1.0}))
