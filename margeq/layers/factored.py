"""Factored fully connected path (F-FC, ELLA eq. 5): a per-channel bottleneck over positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
)
from margeq.layers.maps import MapLayer, Shape, default_init

__all__ = ["FactoredLinear2d"]


class FactoredLinear2d(MapLayer):
    """Factored fully connected map between feature maps (F-FC, ELLA eq. 5).

        h[n,d,c] = sum_x U[d,c,x] x[n,c,x] + bU[d]
        y[n,d,y] = sum_c V[y,d,c] h[n,d,c] + bV[y]

    ``U`` is C independent maps X -> D, ``V`` is D independent maps C -> Y, so the curvature has C
    and D independent blocks (no weight is shared). Positions are those of maps of any shape: on
    maps of a group, ``in_shape=(|H|, y, x)``, both factors run over elements and pixels
    (ELLA eq. 24).

    Args:
        in_channels: ``C``.
        out_channels: ``D``.
        in_shape: spatial size of the input map, ``X`` positions.
        out_shape: spatial size of the output map, ``Y`` positions.
        bias: ``bU [D]`` and ``bV [Y]``.

    Shapes:
        ``[n, C, *in_shape] -> [n, D, *out_shape]``; ``weight_u [D, C, X]``,
        ``weight_v [Y, D, C]``.

    Raises:
        ConfigError: if a size is not positive.
        DataError: if an input has another shape.
    """

    first_factors: ClassVar[tuple[str, ...]] = ("weight_u", "bias_u")
    tied_factors: ClassVar[tuple[tuple[str, ...], ...]] = (("weight_u", "weight_v"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_shape: int | Shape,
        out_shape: int | Shape,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, in_shape, out_shape)
        positions_in, positions_out = self.in_shape.numel(), self.out_shape.numel()
        self.weight_u = nn.Parameter(torch.empty(out_channels, in_channels, positions_in))
        self.weight_v = nn.Parameter(torch.empty(positions_out, out_channels, in_channels))
        self.bias_u = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.bias_v = nn.Parameter(torch.empty(positions_out)) if bias else None
        self.reset_parameters()

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent: every map, C D X Y."""
        return self.weight_u.numel() * self.weight_v.shape[0]

    def reset_parameters(self) -> None:
        """Unit-gain normal factors, zero biases."""
        default_init(self.weight_u, fan_in=self.weight_u.shape[-1])
        default_init(self.weight_v, fan_in=self.weight_v.shape[-1])
        for bias in (self.bias_u, self.bias_v):
            if bias is not None:
                nn.init.zeros_(bias)

    def hidden(self, x: Tensor) -> Tensor:
        """The bottleneck ``h[n, d, c]``."""
        h = torch.einsum("ncx,dcx->ndc", x.reshape(len(x), self.in_channels, -1), self.weight_u)
        return h if self.bias_u is None else h + self.bias_u[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, C, *in_shape]`` to ``[n, D, *out_shape]``."""
        self.check_input(x)
        y = torch.einsum("ndc,ydc->ndy", self.hidden(x), self.weight_v)
        if self.bias_v is not None:
            y = y + self.bias_v
        return y.reshape(len(x), self.out_channels, *self.out_shape)

    def induced_weight(self) -> Tensor:
        """The map as a matrix ``[D * Y, C * X]``; materialised, for reports and tests."""
        dense = torch.einsum("ydc,dcx->dycx", self.weight_v, self.weight_u)
        return dense.flatten(2).flatten(0, 1)


def _inputs(
    layer: FactoredLinear2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    maps = x.reshape(len(x), 1, layer.in_channels, -1)
    hidden = layer.hidden(x)[:, None]
    # each bias is shared over the blocks of its factor: bU over c, bV over d
    return {
        "weight_u": InputRows(maps, 1),
        "bias_u": bias_rows(len(x), layer.in_channels, 1, x),
        "weight_v": InputRows(hidden, 1),
        "bias_v": bias_rows(len(x), layer.out_channels, 1, x),
    }


def _output_grads(layer: FactoredLinear2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    grad_v = grad_y.reshape(*grad_y.shape[:3], -1)[:, :, None]
    grad_u = torch.einsum("vntdy,ydc->vntcd", grad_v, layer.weight_v)
    return {
        "weight_u": grad_u,
        "bias_u": grad_u.transpose(2, 3),
        "weight_v": grad_v,
        "bias_v": grad_v.transpose(2, 3),
    }


register_split_rule(FactoredLinear2d, rule=Rule(_inputs, _output_grads))
