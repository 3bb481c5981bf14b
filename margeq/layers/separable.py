"""Group convolutions whose filters are products of small factors.

Every kind but ``"g"`` is a chain of group convolutions that are narrower in one way or another:
over the plane only (pointwise in the group), over the group only (1 x 1), or over channels only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from margeq.curvature.io import InputRows, PositionSampler, Rule, register_split_rule
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.convolution import patch_rows
from margeq.layers.expandable import Expandable
from margeq.layers.group import GroupConv2d
from margeq.layers.maps import default_init
from margeq.layers.planar import PlanarConv
from margeq.layers.window import PaddingMode

__all__ = ["PairSeparableConv2d", "SeparableGroupConv2d"]


class SeparableGroupConv2d(Expandable, nn.Sequential):
    """Group convolution in factors over the group, the plane and the channels.

        T_h K[o] * w[o,i,h^-1 g]        ``"gc"``: group and channels, then the plane
        T_h K[o,i] * w[o,i,h^-1 g]      ``"g"``: each pair of channels by itself
        T_h K[i] * w[o,i,h^-1 g]        ``"depthwise"``: the plane, then group and channels
        T_h K[i] * w[i,h^-1 g] * v[o,i] ``"dg"``: the plane, the group, the channels

    Each kind is evaluated in the order in which it is cheapest; ``"g"`` as one convolution with the
    products. ``"depthwise"`` and ``"dg"`` have a bias after each factor, the others one at the end.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of ``K``.
        separability: ``"gc"``, ``"g"``, ``"depthwise"`` or ``"dg"``.
        group: rotations and reflections ``H`` of the plane.
        stride: as in :class:`GroupConv2d`, like the rest.
        padding: see there.
        dilation: see there.
        bias: see there.
        padding_mode: see there.
        filters: see there.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Reference:
        Lengyel & van Gemert 2021, eqs. 4-15; Knigge et al. 2022 and ELLA F.3 for the last two.

    Example:
        >>> from margeq.groups import P4
        >>> layer = SeparableGroupConv2d(2, 3, 3, "gc", group=P4, padding=1)
        >>> sum(weight.numel() for weight in layer.parameters())
        54
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        separability: str = "gc",
        *,
        group: FiniteGroup,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        filters: str = "auto",
    ) -> None:
        if separability not in _KINDS:
            raise ConfigError(f"separability={separability!r}: use one of {tuple(_KINDS)}")
        window: dict[str, Any] = {
            "stride": stride, "padding": padding, "dilation": dilation,
            "padding_mode": padding_mode, "filters": filters,
        }  # fmt: skip
        make = _KINDS[separability]
        factors = make(in_channels, out_channels, kernel_size, group, bias, window)
        super().__init__(factors)
        self._factor_names = tuple(factors)
        self.in_channels, self.out_channels, self.group = in_channels, out_channels, group
        self.separability = separability

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent: those of the full kind."""
        functions = max(m.n_functions for m in self.modules() if isinstance(m, PlanarConv))
        return self.in_channels * self.out_channels * self.group.order * functions

    @property
    def tied_factors(self) -> tuple[tuple[str, ...], ...]:
        """Weights that are factors of one product; ``"g"`` has them in a module of its own."""
        names = tuple(f"{name}.weight" for name in self._factor_names)
        return (names,) if len(names) > 1 else ()

    def extra_repr(self) -> str:
        """The kind, for ``print(model)``."""
        return f"separability={self.separability!r}"


_Factors = OrderedDict[str, nn.Module]


def _gc(c: int, d: int, k: int, group: FiniteGroup, bias: bool, window: Any) -> _Factors:
    elements = GroupConv2d(c, d, 1, group=group, bias=False)
    plane = GroupConv2d(
        d, d, k, group=group, separability="pointwise", groups=d, bias=bias, **window
    )
    return OrderedDict(elements=elements, plane=plane)


def _plane_first(c: int, k: int, group: FiniteGroup, bias: bool, window: Any) -> GroupConv2d:
    return GroupConv2d(
        c, c, k, group=group, separability="pointwise", groups=c, bias=bias, **window
    )


def _depthwise(c: int, d: int, k: int, group: FiniteGroup, bias: bool, window: Any) -> _Factors:
    elements = GroupConv2d(c, d, 1, group=group, bias=bias)
    return OrderedDict(plane=_plane_first(c, k, group, bias, window), elements=elements)


def _dg(c: int, d: int, k: int, group: FiniteGroup, bias: bool, window: Any) -> _Factors:
    elements = GroupConv2d(c, c, 1, group=group, groups=c, bias=bias)
    channels = GroupConv2d(c, d, 1, group=group, separability="pointwise", bias=bias)
    plane = _plane_first(c, k, group, bias, window)
    return OrderedDict(plane=plane, elements=elements, channels=channels)


def _g(c: int, d: int, k: int, group: FiniteGroup, bias: bool, window: Any) -> _Factors:
    return OrderedDict(pairs=PairSeparableConv2d(c, d, k, group=group, bias=bias, **window))


_KINDS: dict[str, Callable[..., _Factors]] = {
    "depthwise": _depthwise,
    "dg": _dg,
    "g": _g,
    "gc": _gc,
}
GroupConv2d.separable_kinds.update(dict.fromkeys(_KINDS, SeparableGroupConv2d))


class PairSeparableConv2d(PlanarConv):
    """Group convolution whose filter is a product for each pair of channels (g-GConv).

        y[n,o,h] = sum_(i,g) x[n,i,g] * (T_h K[o,i]) w[o,i,h^-1 g] + b[o]

    ``K`` and ``w`` are shared by nothing but the elements and positions, so the curvature has one
    independent block per pair of channels.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of ``K``.
        group: rotations and reflections ``H`` of the plane.
        stride: as in :class:`GroupConv2d`, like the rest.
        padding: see there.
        dilation: see there.
        bias: see there.
        padding_mode: see there.
        filters: see there.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``weight [O, I, M]`` is ``K``,
        ``weight_w [O, I, |H|]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Reference:
        Lengyel & van Gemert 2021, eqs. 4-9.
    """

    first_factors: ClassVar[tuple[str, ...]] = ("weight_w",)
    tied_factors: ClassVar[tuple[tuple[str, ...], ...]] = (("weight", "weight_w"),)

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
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        filters: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, group, stride, padding, dilation, 1,
            padding_mode, filters,
        )  # fmt: skip
        self.weight_w = nn.Parameter(torch.empty(out_channels, in_channels, self.order))
        self.add_parameters(in_channels, self.n_functions, bias=bias)

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent."""
        return self.weight.numel() * self.order

    def reset_parameters(self) -> None:
        """Normal factors under which the filters have unit gain, zero biases."""
        super().reset_parameters()
        if not self.weight_w.is_meta:
            default_init(self.weight_w, fan_in=self.order)

    def fan_in(self, name: str) -> float:
        """Output variance that unit weights of a factor add, if the other has unit gain."""
        return float(self.order) if name == "weight_w" else super().fan_in(name)

    def expand(self) -> Tensor:
        """``[O, |H|, I, k * k]``, the turned factors ``K``."""
        return torch.einsum("oim,hmx->ohix", self.weight, self.basis.to(self.weight.dtype))

    def products(self) -> Tensor:
        """The filters that it convolves with, ``[O, |H|, I, |H|, k, k]``."""
        relative = self.weight_w[:, :, self.group.relative.to(self.weight.device)]
        dense = torch.einsum("ohix,oihg->ohigx", self.kept_filters(), relative)
        return dense.unflatten(-1, self.window.kernel_size)

    def dense_filters(self) -> Tensor:
        """Filters between all channels and elements, ``[O, |H|, I, |H|, k, k]``."""
        return self.products()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, |H|, y, x]`` to ``[n, O, |H|, y', x']``."""
        self.check_map(x)
        filters = self.products().flatten(2, 3).flatten(0, 1)
        y = self.window.convolve(x.flatten(1, 2), filters, self.expanded_bias())
        return y.unflatten(1, (self.out_channels, self.order))


def _inputs(
    layer: PairSeparableConv2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    rows, n_places = patch_rows(layer.window, x.flatten(1, 2), sampler)
    patches = rows.unflatten(-1, (layer.in_channels, layer.order, -1)).squeeze(2)
    framed = patches[:, :, :, layer.group.product.to(x.device)]  # [n, t, i, h, u, x]
    basis = layer.basis.to(x.dtype)
    turned = torch.einsum("ntihux,hmx->nhtium", framed, basis)
    of_k = torch.einsum("nhtium,oiu->nhtoim", turned, layer.weight_w)
    of_w = torch.einsum("nhtium,oim->nhtoiu", turned, layer.weight)
    n_positions = n_places * layer.order
    found = {
        name: InputRows(
            values.flatten(3, 4).flatten(1, 2), n_positions, "boi", n_frames=layer.order
        )
        for name, values in (("weight", of_k), ("weight_w", of_w))
    }
    return {**found, **layer.bias_inputs(x, n_positions)}


def _output_grads(layer: PairSeparableConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    found = layer.output_grads(grad_y)
    # every pair of channels is a block of its own, with one output
    pairs = found["weight"].mT.repeat_interleave(layer.in_channels, dim=-2)
    return {"weight": pairs, "weight_w": pairs, "bias": found["bias"]}


register_split_rule(PairSeparableConv2d, rule=Rule(_inputs, _output_grads))
