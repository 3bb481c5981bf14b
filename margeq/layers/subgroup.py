"""Convolutions between maps of a group that commute with a subgroup only (ELLA eq. 27)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from margeq.groups import FiniteGroup
from margeq.layers.group import GroupConv2d
from margeq.layers.group_pooling import RestrictGroup

__all__ = ["SubgroupConv2d"]


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
        **options: stride, padding, dilation, bias, ... of a :class:`GroupConv2d` on ``K``.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``conv.weight
        [O |H| / |K|, I |H| / |K|, |K|, M]``.

    Raises:
        ConfigError: if it is no subgroup, or for an option out of range.
        DataError: for an input that is no map on ``H``.

    Example:
        >>> import torch
        >>> from margeq.groups import P4, P4M
        >>> layer = SubgroupConv2d(1, 1, 3, group=P4M, subgroup=P4, padding=1, bias=False)
        >>> layer(torch.zeros(1, 1, 8, 6, 6)).shape, layer.conv.weight.numel()
        (torch.Size([1, 1, 8, 6, 6]), 144)
    """

    place: Tensor

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
        self.restrict = RestrictGroup(group, subgroup)
        cosets = self.restrict.cosets
        self.conv = GroupConv2d(
            in_channels * len(cosets), out_channels * len(cosets), kernel_size, group=subgroup,
            **options,
        )  # fmt: skip
        # where each element of the group lies among all cosets
        self.register_buffer("place", cosets.flatten().argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, |H|, y, x]`` to ``[n, O, |H|, y', x']``."""
        by_coset = self.conv(self.restrict(x))
        n_cosets = len(self.restrict.cosets)
        return by_coset.unflatten(1, (-1, n_cosets)).flatten(2, 3).index_select(2, self.place)

    def dense_filters(self) -> Tensor:
        """Filters between all channels and elements, ``[O, |H|, I, |H|, k, k]``."""
        n_cosets = len(self.restrict.cosets)
        filters = (
            self.conv.dense_filters().unflatten(2, (-1, n_cosets)).unflatten(0, (-1, n_cosets))
        )
        by_element = filters.flatten(4, 5).flatten(1, 2)
        return by_element.index_select(1, self.place).index_select(3, self.place)

    def extra_repr(self) -> str:
        """Both groups, for ``print(model)``."""
        return f"group={self.group!r}, subgroup={self.subgroup!r}"
