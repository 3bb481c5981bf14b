"""Fully connected maps: the rule of ``nn.Linear`` and the fully connected path on feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
    sampled_rows,
)
from margeq.layers.maps import MapLayer, Shape, default_init

__all__ = ["LINEAR", "Linear2d"]


class Linear2d(MapLayer):
    """Fully connected map between feature maps, the least constrained path (ELLA eq. 1).

        y[n,o] = sum_i W[o,i] x[n,i] + b[o],   o = (channel d, position y), i = (c, x)

    Positions are those of maps of any shape: on maps of a group, ``in_shape=(|H|, y, x)``, they are
    pairs of an element and a pixel (ELLA eq. 21).

    Args:
        in_channels: ``C``.
        out_channels: ``D``.
        in_shape: spatial size of the input map, an int or a tuple.
        out_shape: spatial size of the output map.
        bias: one bias per output channel *and* position.

    Shapes:
        ``[n, C, *in_shape] -> [n, D, *out_shape]``; ``weight [D * Y, C * X]``.

    Raises:
        ConfigError: if a size is not positive.
        DataError: if an input has another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_shape: int | Shape,
        out_shape: int | Shape,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, in_shape, out_shape)
        fan_out = out_channels * self.out_shape.numel()
        self.weight = nn.Parameter(torch.empty(fan_out, in_channels * self.in_shape.numel()))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit-gain normal weights, zero biases."""
        default_init(self.weight, fan_in=self.weight.shape[1])
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, C, *in_shape]`` to ``[n, D, *out_shape]``."""
        self.check_input(x)
        y = nn.functional.linear(x.flatten(1), self.weight, self.bias)
        return y.reshape(len(x), self.out_channels, *self.out_shape)

    def induced_weight(self) -> Tensor:
        """The map as a matrix, ``[D * Y, C * X]``."""
        return self.weight


def _linear_inputs(
    layer: nn.Linear, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    rows = x.reshape(len(x), -1, 1, x.shape[-1])
    return _with_bias(layer, rows, sampler)


def _linear2d_inputs(
    layer: Linear2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    return _with_bias(layer, x.reshape(len(x), 1, 1, -1), sampler)


def _with_bias(
    layer: nn.Linear | Linear2d, rows: Tensor, sampler: PositionSampler
) -> dict[str, InputRows]:
    n_data, n_positions = rows.shape[:2]
    found = {"weight": InputRows(sampled_rows(rows, sampler), n_positions)}
    if layer.bias is not None:
        found["bias"] = bias_rows(n_data, n_positions, 1, rows)
    return found


def _linear_grads(layer: nn.Linear, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    grads = grad_y.reshape(*grad_y.shape[:2], -1, 1, grad_y.shape[-1])
    return {"weight": grads, "bias": grads}


def _linear2d_grads(layer: Linear2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    grads = grad_y.reshape(*grad_y.shape[:2], 1, 1, cast(int, layer.weight.shape[0]))
    return {"weight": grads, "bias": grads}


LINEAR = Rule(_linear_inputs, _linear_grads)
register_split_rule(nn.Linear, rule=LINEAR)
register_split_rule(Linear2d, rule=Rule(_linear2d_inputs, _linear2d_grads))
