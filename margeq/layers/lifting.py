"""Lifting convolution: from pictures to maps on a group (Cohen & Welling 2016, section 6.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from margeq.curvature.frames import BasisFrames, PixelFrames
from margeq.curvature.io import InputRows, PositionSampler, Rule, register_split_rule
from margeq.errors import DataError
from margeq.groups import FiniteGroup
from margeq.layers.convolution import patch_rows
from margeq.layers.planar import PlanarConv
from margeq.layers.window import PaddingMode

__all__ = ["LiftingConv2d"]


class LiftingConv2d(PlanarConv):
    """Convolution of a picture with every turned copy of each filter.

        y[n,o,h] = sum_i x[n,i] * T_h w[o,i] + b[o],   (T_h w)(x) = w(h^-1 x)

    Filters turn, pictures do not, so that all maps lie in one frame: turning the picture by u moves
    the result to ``(L_u y)(h, x) = y(u^-1 h, u^-1 x)``.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: rotations and reflections ``H`` of the plane.
        stride: as in ``torch.nn.Conv2d``, like the next five; one number for both axes.
        padding: pixels on each side, or ``"same"``.
        dilation: see there.
        groups: see there.
        bias: one per output channel.
        padding_mode: see there.
        filters: ``"pixels"`` (exact for quarter turns and mirrors), ``"band-limited"``,
            ``"siren"`` or ``"bilinear"``.

    Shapes:
        ``[n, I, y, x] -> [n, O, |H|, y', x']``; ``weight [O, I / groups, M]`` with ``M`` the number
        of functions that span the filters, ``k^2`` for ``"pixels"``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no picture with ``I`` channels.

    Reference:
        Cohen & Welling 2016.

    Example:
        >>> from margeq.groups import P4
        >>> layer = LiftingConv2d(1, 5, 3, group=P4, padding=1)
        >>> layer(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 5, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        filters: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, group, stride, padding, dilation, groups,
            padding_mode, filters,
        )  # fmt: skip
        self.add_parameters(in_channels // groups, self.n_functions, bias=bias)

    def expand(self) -> Tensor:
        """``[O * |H|, I / groups, k, k]``."""
        basis = self.basis.to(self.weight.dtype)
        turned = torch.einsum("oim,hmx->ohix", self.weight, basis)
        return turned.flatten(0, 1).unflatten(-1, self.window.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, y, x]`` to ``[n, O, |H|, y', x']``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise DataError(
                f"LiftingConv2d takes pictures [n, {self.in_channels}, y, x], got {tuple(x.shape)}"
            )
        y = self.window.convolve(x, self.kept_filters(), self.expanded_bias())
        return y.unflatten(1, (self.out_channels, self.order))


def _inputs(layer: LiftingConv2d, x: Tensor, sampler: PositionSampler) -> Mapping[str, InputRows]:
    rows, n_places = patch_rows(layer.window, x, sampler)
    n_positions = n_places * layer.order
    if layer.filter_kind == "pixels":
        frames = PixelFrames(layer.pixel_index())
    else:
        source = torch.zeros(layer.order, 1, dtype=torch.long, device=x.device)
        frames = BasisFrames(source, layer.basis)
    weight = InputRows(rows, n_positions, "boi", n_frames=layer.order, frames=frames)
    return {"weight": weight, **layer.bias_inputs(x, n_positions)}


def _output_grads(layer: LiftingConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    return layer.output_grads(grad_y)


register_split_rule(LiftingConv2d, rule=Rule(_inputs, _output_grads))
