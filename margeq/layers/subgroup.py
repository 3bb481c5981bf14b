"""Convolutions between maps of a group that commute with a subgroup only (ELLA eq. 27)."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn

from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.group import GroupConv2d
from margeq.layers.group_pooling import RestrictGroup

__all__ = ["SubgroupConv2d"]

_OPTIONS = tuple(
    name
    for name, parameter in signature(GroupConv2d.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "group"
)


class SubgroupConv2d(nn.Module):
    """All convolutions between maps of a group ``H`` that commute with a subgroup ``K``.

        y[(o, r), k] = sum_(i, s, l) x[(i, s), l] * T_k w[(o, r), (i, s), k^-1 l] + b[(o, r)]

    for the right cosets ``K h_r`` and ``K h_s``: a group convolution on ``K`` whose channels are
    those of the map for each coset, with elements ``k h_r`` written as pairs. The smaller ``K``,
    the larger the space: for ``K' < K`` it contains all maps of ``K``, up to those that commute
    with shifts alone.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters.
        group: ``H``, of the maps.
        subgroup: ``K``, with which the layer commutes.
        **options: stride, padding, dilation, bias, ... of a :class:`GroupConv2d` on ``K``, whose
            separability may be ``"full"`` or ``"pointwise"``.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``conv.weight
        [O |H| / |K|, I |H| / |K|, |K|, M]``.

    Raises:
        ConfigError: if it is no subgroup, or for an option that is unknown or out of range.
        DataError: for an input that is no map on ``H``.

    Example:
        >>> import torch
        >>> from margeq.groups import P4, P4M
        >>> layer = SubgroupConv2d(1, 1, 3, group=P4M, subgroup=P4, padding=1, bias=False)
        >>> layer(torch.zeros(1, 1, 8, 6, 6)).shape, layer.conv.weight.numel()
        (torch.Size([1, 1, 8, 6, 6]), 144)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        subgroup: FiniteGroup,
        **options: Any,
    ) -> None:
        super().__init__()
        self.group, self.subgroup = group, subgroup
        _require_options(options, in_channels=in_channels, out_channels=out_channels)
        self.restrict = RestrictGroup(group, subgroup)
        n_cosets = len(self.restrict.cosets)
        self.conv = GroupConv2d(
            in_channels * n_cosets, out_channels * n_cosets, kernel_size, group=subgroup, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, |H|, y, x]`` to ``[n, O, |H|, y', x']``."""
        by_coset = self.conv(self.restrict(x))
        n_cosets = len(self.restrict.cosets)
        return by_coset.unflatten(1, (-1, n_cosets)).flatten(2, 3).index_select(2, self._place(x))

    def dense_filters(self) -> Tensor:
        """Filters between all channels and elements, ``[O, |H|, I, |H|, k, k]``."""
        n_cosets = len(self.restrict.cosets)
        filters = (
            self.conv.dense_filters().unflatten(2, (-1, n_cosets)).unflatten(0, (-1, n_cosets))
        )
        by_element = filters.flatten(4, 5).flatten(1, 2)
        place = self._place(filters)
        return by_element.index_select(1, place).index_select(3, place)

    def _place(self, x: Tensor) -> Tensor:
        """Where each element of the group lies among all cosets."""
        return self.restrict.cosets_on(x.device).flatten().argsort()

    def extra_repr(self) -> str:
        """Both groups, for ``print(model)``."""
        return f"group={self.group!r}, subgroup={self.subgroup!r}"


def _require_options(options: Mapping[str, Any], **channels: object) -> None:
    for name, value in channels.items():
        if not is_count(value):
            raise ConfigError(f"SubgroupConv2d: {name}={value!r} must be a positive whole number")
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ConfigError(f"SubgroupConv2d: unknown options {unknown}; use some of {_OPTIONS}")
    kind = options.get("separability", "full")
    if kind not in ("full", "pointwise"):
        raise ConfigError(
            f"SubgroupConv2d: separability={kind!r}: use 'full' or 'pointwise'; for a chain of "
            f"factors on the subgroup, RestrictGroup and a GroupConv2d of that kind"
        )
