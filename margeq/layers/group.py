"""Group convolutions between maps on a group of the plane (Cohen & Welling 2016, section 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from margeq.curvature.frames import BasisFrames, PixelFrames
from margeq.curvature.io import InputRows, PositionSampler, Rule, register_split_rule
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.convolution import patch_rows
from margeq.layers.planar import PlanarConv
from margeq.layers.window import PaddingMode

__all__ = ["GroupConv2d"]


class GroupConv2d(PlanarConv):
    """Convolution of maps on a group with turned and shifted copies of each filter.

        y[n,o,h] = sum_(i,g) x[n,i,g] * T_h w[o,i,h^-1 g] + b[o]      (``"full"``)
        y[n,o,h] = sum_i x[n,i,h] * T_h w[o,i] + b[o]                 (``"pointwise"``)

    Both commute with ``(L_u f)(g, x) = f(u^-1 g, u^-1 x)`` and with shifts. ``"pointwise"`` is
    ``"full"`` with a weight that is zero but at the identity. With one of the separable kinds the
    constructor returns a :class:`~margeq.layers.SeparableGroupConv2d`.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: rotations and reflections ``H`` of the plane.
        separability: ``"full"``, ``"pointwise"``, ``"depthwise"``, ``"dg"``, ``"g"`` or ``"gc"``.
        stride: as in ``torch.nn.Conv2d``, like the next five; one number for both axes.
        padding: pixels on each side, or ``"same"``.
        dilation: see there.
        groups: see there.
        bias: one per output channel.
        padding_mode: see there.
        filters: ``"pixels"`` (exact for quarter turns and mirrors), ``"band-limited"``,
            ``"siren"`` or ``"bilinear"``.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``weight [O, I / groups, |H|, M]``, without
        the third axis for ``"pointwise"``; ``M`` functions span the filters, ``k^2`` for
        ``"pixels"``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Reference:
        Cohen & Welling 2016; ELLA F.3 for the pointwise kind.

    Example:
        >>> from margeq.groups import P4M
        >>> layer = GroupConv2d(2, 3, 3, group=P4M, padding=1)
        >>> layer(torch.zeros(1, 2, 8, 6, 6)).shape, layer.weight.shape
        (torch.Size([1, 3, 8, 6, 6]), torch.Size([3, 2, 8, 9]))
    """

    separable_kinds: ClassVar[dict[str, Callable[..., Any]]] = {}
    """Name -> constructor, of the kinds that have a module of their own."""

    def __new__(cls, *args: Any, separability: str = "full", **options: Any) -> Any:
        """The module of the separable kind, if it is one; subclasses are what they are."""
        is_kind = cls is GroupConv2d and isinstance(separability, str)
        make = cls.separable_kinds.get(separability) if is_kind else None
        if make is None:
            return super().__new__(cls)
        if options.pop("groups", 1) != 1:
            raise ConfigError(f"separability={separability!r} has no groups; leave them at 1")
        return make(*args, separability=separability, **options)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        separability: str = "full",
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
        if separability not in ("full", "pointwise"):
            kinds = ("full", "pointwise", *self.separable_kinds)
            raise ConfigError(f"separability={separability!r}: use one of {kinds}")
        self.separability = separability
        elements = (self.order,) if separability == "full" else ()
        self.add_parameters(in_channels // groups, *elements, self.n_functions, bias=bias)

    @property
    def mixes_elements(self) -> bool:
        """Whether an output at one group element sees inputs at all of them."""
        return self.separability == "full"

    def expand(self) -> Tensor:
        """``[O * |H|, I / groups * |H|, k, k]``, or pointwise ``[O, |H|, I / groups, k, k]``."""
        kernel = self.window.kernel_size
        basis = self.basis.to(self.weight.dtype)
        if not self.mixes_elements:
            return torch.einsum("oim,hmx->ohix", self.weight, basis).unflatten(-1, kernel)
        if self.filter_kind == "pixels":
            turned = self.weight.flatten(2)[..., self._gather_index()]
        else:
            shifted = self.weight[:, :, self.group.relative.to(self.weight.device)]
            turned = torch.einsum("oihgm,hmx->oihgx", shifted, basis)
        return turned.transpose(1, 2).flatten(2, 3).flatten(0, 1).unflatten(-1, kernel)

    def dense_filters(self) -> Tensor:
        """Filters between all channels and elements, ``[O, |H|, I, |H|, k, k]``."""
        blocks, order = self.window.groups, self.order
        if self.mixes_elements:
            filters = self.kept_filters().unflatten(1, (-1, order)).unflatten(0, (-1, order))
        else:
            eye = torch.eye(order, dtype=self.weight.dtype, device=self.weight.device)
            filters = torch.einsum("ohiyx,hg->ohigyx", self.kept_filters(), eye)
        eye = torch.eye(blocks, dtype=filters.dtype, device=filters.device)
        by_block = filters.unflatten(0, (blocks, -1))
        return torch.einsum("bohigyx,bc->bohcigyx", by_block, eye).flatten(3, 4).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, |H|, y, x]`` to ``[n, O, |H|, y', x']``."""
        self.check_map(x)
        if self.mixes_elements:
            y = self.window.convolve(x.flatten(1, 2), self.kept_filters(), self.expanded_bias())
            return y.unflatten(1, (self.out_channels, self.order))
        return self._depthwise(x) if self._is_depthwise else self._pointwise(x)

    @property
    def _is_depthwise(self) -> bool:
        return self.window.groups == self.in_channels

    def _pointwise(self, x: Tensor) -> Tensor:
        """Each group element by itself, which is faster than as blocks of one convolution."""
        maps = zip(x.unbind(2), self.kept_filters().unbind(1), strict=True)
        return torch.stack([self.window.convolve(f, w, self.bias) for f, w in maps], dim=2)

    def _depthwise(self, x: Tensor) -> Tensor:
        """Each channel at each element as a block of one convolution: no axis has to move."""
        blocks, order = self.in_channels, self.order
        multiplier = self.out_channels // blocks
        window = self.window.with_groups(blocks * order)
        filters = (
            self.kept_filters().unflatten(0, (blocks, multiplier)).transpose(1, 2).flatten(0, 2)
        )
        bias = self.bias
        if bias is not None:
            bias = bias.unflatten(0, (blocks, 1, multiplier)).expand(-1, order, -1).flatten()
        y = window.convolve(x.flatten(1, 2), filters, bias)
        by_block = y.unflatten(1, (blocks, order, multiplier))
        return by_block.transpose(2, 3).flatten(1, 2)

    def _gather_index(self) -> Tensor:
        """``[h, g, x]``: entry ``(u, x')`` of the weight that the filter of h shows at (g, x)."""
        pixels = self.basis.argmax(1)  # of a permutation: the base filter's pixel
        relative = self.group.relative.to(pixels.device)
        return relative[:, :, None] * self.n_functions + pixels[:, None]

    def extra_repr(self) -> str:
        """Arguments, for ``print(model)``."""
        kind = "" if self.mixes_elements else f", separability={self.separability!r}"
        return super().extra_repr() + kind


def _inputs(layer: GroupConv2d, x: Tensor, sampler: PositionSampler) -> Mapping[str, InputRows]:
    weight = (_full_rows if layer.mixes_elements else _pointwise_rows)(layer, x, sampler)
    return {"weight": weight, **layer.bias_inputs(x, weight.n_positions)}


def _full_rows(layer: GroupConv2d, x: Tensor, sampler: PositionSampler) -> InputRows:
    """Patches of all elements, which every element of the output sees in its own frame."""
    rows, n_places = patch_rows(layer.window, x.flatten(1, 2), sampler)
    product = layer.group.product.to(x.device)
    if layer.filter_kind == "pixels":
        pixels = layer.pixel_index()
        index = (product[:, :, None] * layer.n_functions + pixels[:, None]).flatten(1)
        frames: Any = PixelFrames(index, layer.group)
    else:
        frames = BasisFrames(product, layer.basis)
    n_positions = n_places * layer.order
    return InputRows(rows, n_positions, "boi", n_frames=layer.order, frames=frames)


def _pointwise_rows(layer: GroupConv2d, x: Tensor, sampler: PositionSampler) -> InputRows:
    """Patches of each element, in its frame."""
    window = layer.window.with_groups(layer.window.groups * layer.order)
    rows, n_places = patch_rows(window, x.transpose(1, 2).flatten(1, 2), sampler)
    split = rows.unflatten(-1, (-1, window.size**2)).unflatten(2, (layer.order, -1))
    if layer.filter_kind == "pixels":
        index = layer.pixel_index()[:, None, None].expand(*split.shape)
        turned = split.gather(-1, index).movedim(2, 1)
    else:
        turned = torch.einsum("nthbix,hmx->nhtbim", split, layer.basis.to(x.dtype))
    framed = turned.flatten(1, 2).flatten(-2)
    return InputRows(framed, n_places * layer.order, "boi", n_frames=layer.order)


def _output_grads(layer: GroupConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    return layer.output_grads(grad_y)


register_split_rule(GroupConv2d, rule=Rule(_inputs, _output_grads))
