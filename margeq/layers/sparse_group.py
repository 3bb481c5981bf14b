"""Sparsified group convolution (S-GCONV, ELLA eq. 26): filters on the group from few anchors.

The chain rule puts the basis in front of a plain group convolution, so the curvature is that of
the group convolution on patches that are first turned into the frame of each element and then
projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from margeq.bases import Anchors
from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    register_split_rule,
    rule_for,
)
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.basis import AnchorBasis, lengthscale_penalty, patches_at_anchors
from margeq.layers.group import GroupConv2d
from margeq.layers.window import PaddingMode

__all__ = ["SparseGroupConv2d"]


class SparseGroupConv2d(GroupConv2d):
    """Group convolution whose filters are smooth in the plane and along the group (S-GCONV).

        K[o,i,u,x] = sum_m w[o,i,m] Psi(l)[m,(u,x)]
        y[n,o,h] = sum_(i,g) x[n,i,g] * T_h K[o,i,h^-1 g] + b[o]

    It commutes with the group as :class:`GroupConv2d` does, of which it is the case of filters in a
    basis. The weights are ``w``; lengthscales in the plane and along the group (and anchors, if
    learned) are hyperparameters.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: rotations and reflections ``H`` that map pixels to pixels.
        stride: as in :class:`GroupConv2d`, like the next five.
        padding: see there.
        dilation: see there.
        groups: see there.
        bias: see there.
        padding_mode: see there.
        anchors: ``"grid"``, a share of the ``|H| k^2`` points, a number, or positions ``[M, 3]``:
            index of an element, row and column in pixels from the middle.
        learn_anchors: whether the evidence moves the anchors.
        basis: ``"rbf"``, ``"exponential"`` or ``"identity"``.
        lengthscale: initial value in pixels; see :class:`~margeq.layers.basis.AnchorBasis` for
            that along the group.
        per_filter: lengthscales for each output channel instead of one pair per layer.
        lengthscale_spread: as in :class:`SparseConv2d`.
        seed: of randomly placed anchors.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``weight [O, I / groups, M]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Example:
        >>> from margeq.groups import P4
        >>> layer = SparseGroupConv2d(2, 3, 3, group=P4, padding=1)
        >>> layer(torch.zeros(1, 2, 4, 6, 6)).shape, layer.weight.shape
        (torch.Size([1, 3, 4, 6, 6]), torch.Size([3, 2, 18]))
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
        anchors: Anchors = 0.5,
        learn_anchors: bool = False,
        basis: str = "rbf",
        lengthscale: float = 1.0,
        per_filter: bool = False,
        lengthscale_spread: float | str | None = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, group=group, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
            filters="pixels",
        )  # fmt: skip
        self.smooth = AnchorBasis(
            self.window.kernel_size,
            group=group,
            anchors=anchors,
            learn_anchors=learn_anchors,
            kernel=basis,
            lengthscale=lengthscale,
            n_filters=out_channels if per_filter else 1,
            lengthscale_spread=lengthscale_penalty(lengthscale_spread, per_filter),
            seed=seed,
        )
        # the weights are the values at the anchors, not the filters
        values = torch.empty(out_channels, in_channels // groups, self.smooth.n_anchors)
        self.weight = nn.Parameter(values)
        self.reset_parameters()

    @classmethod
    def from_group_conv(cls, conv: GroupConv2d, **options: Any) -> SparseGroupConv2d:
        """The sparsified layer whose filters come closest to those of a group convolution.

        Args:
            conv: a group convolution of the full kind with filters in pixels, left as it is.
            **options: anchors, basis, lengthscale, ... of the new layer.

        Returns:
            A new layer on the convolution's device, in its dtype.

        Raises:
            ConfigError: for anything else, or an option out of range.
        """
        if type(conv) is not GroupConv2d or not conv.mixes_elements or conv.filter_kind != "pixels":
            raise ConfigError(
                f"from_group_conv takes a GroupConv2d with separability='full' and "
                f"filters='pixels', not {conv}"
            )
        window = conv.window
        layer = cls(
            conv.in_channels, conv.out_channels, window.size, group=conv.group, stride=window.step,
            padding=window.padding, dilation=window.spacing, groups=window.groups,
            bias=conv.bias is not None, padding_mode=window.padding_mode, **options,
        ).to(conv.weight)  # fmt: skip
        with torch.no_grad():
            filters = conv.weight.flatten(2)
            grouped = filters if layer.smooth.n_filters > 1 else filters[None]
            layer.weight.copy_(layer.smooth.fit(grouped).reshape(layer.weight.shape))
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    @property
    def lengthscale(self) -> Tensor:
        """In pixels and along the group, ``[1, 2]`` or ``[O, 2]``."""
        return self.smooth.lengthscale

    def reset_parameters(self) -> None:
        """Normal weights under which filters have unit gain, zero biases."""
        if "smooth" in self._modules:  # not in the parent's constructor, before there is a basis
            super().reset_parameters()

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white inputs: the function scale."""
        return self.weight.shape[1] * self.smooth.square_norm()

    def bases(self) -> dict[str, tuple[str, AnchorBasis]]:
        """Weight -> on which side of it a basis stands, and that basis."""
        return {"weight": ("input", self.smooth)}

    def expand(self) -> Tensor:
        """``[O * |H|, I / groups * |H|, k, k]``."""
        base = torch.einsum("oim,omx->oix", self.weight, self.smooth().to(self.weight.dtype))
        turned = base[..., self._gather_index()].transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return turned.unflatten(-1, self.window.kernel_size)

    def kept_filters(self) -> Tensor:
        """The filters of all elements, which lengthscales change as well as the weight."""
        return self.expand()


_GROUP_CONV = cast(Rule, rule_for(GroupConv2d))


def _inputs(
    layer: SparseGroupConv2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    found = dict(_GROUP_CONV.inputs(layer, x, sampler))
    # few anchors make narrower rows than the patches that all frames share
    turned = found["weight"].expanded()
    blocks = layer.window.groups
    rows = patches_at_anchors(
        layer.smooth, turned.rows, layer.in_channels // blocks, layer.out_channels // blocks
    )
    return found | {"weight": replace(turned, rows=rows)}


def _output_grads(layer: SparseGroupConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    found = layer.output_grads(grad_y)
    if layer.smooth.n_filters > 1:
        found["weight"] = found["weight"].flatten(3)[..., None]
    return found


register_split_rule(SparseGroupConv2d, rule=Rule(_inputs, _output_grads))
