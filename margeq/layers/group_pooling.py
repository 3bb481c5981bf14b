"""To, from and between feature maps of groups ``[n, c, g, *space]``, without weights.

Maps are in the aligned frame, ``(L_u f)(g, x) = f(u^-1 g, u^-1 x)``; every layer here commutes
with that action and the pixels' shifts (:class:`RestrictGroup` with that of the subgroup).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError
from margeq.groups.finite import FiniteGroup, require_group

__all__ = ["GroupPool", "Lift", "MergeGroup", "PerElement", "RestrictGroup", "SplitGroup"]


class GroupPool(nn.Module):
    """Maximum or mean over all elements of a group.

        y[n,c,x] = max_g f[n,c,g,x]   or   sum_g f[n,c,g,x] / |H|

    The whole group at once: maxima over the cosets of a subgroup are a map of a group only if the
    subgroup is normal, and then of a quotient that no longer acts on pixels.

    Args:
        group: ``H``.
        reduction: ``"max"`` or ``"mean"``.

    Shapes:
        ``[n, c, |H|, *space] -> [n, c, *space]``.

    Raises:
        ConfigError: for something that is no group, or an unknown reduction.
        DataError: if an input has another group axis.

    Reference:
        Cohen & Welling 2016, section 6.3.

    Example:
        >>> import torch
        >>> from margeq.groups import P4
        >>> GroupPool(P4)(torch.arange(8.0).reshape(1, 1, 4, 1, 2))
        tensor([[[[6., 7.]]]])
    """

    def __init__(self, group: FiniteGroup, reduction: Literal["max", "mean"] = "max") -> None:
        super().__init__()
        require_group(group)
        if reduction not in ("max", "mean"):
            raise ConfigError(f"GroupPool: reduction={reduction!r}: use 'max' or 'mean'")
        self.group, self.reduction = group, reduction

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the group axis."""
        _require_group_axis(self, self.group, x)
        return x.amax(2) if self.reduction == "max" else x.mean(2)

    def extra_repr(self) -> str:
        """Group and reduction, for ``print(model)``."""
        return f"{self.group}, reduction={self.reduction!r}"


class RestrictGroup(nn.Module):
    """A map of a group as a map of a subgroup, whose cosets become channels.

        y[n, (c, r), k, x] = f[n, c, k h_r, x]

    for the right cosets ``K h_r`` of ``group.cosets(subgroup)``: the action from the left mixes no
    cosets.

    Args:
        group: ``H``.
        subgroup: ``K``.

    Shapes:
        ``[n, c, |H|, *space] -> [n, c * |H| / |K|, |K|, *space]``; all cosets of a channel lie
        together.

    Raises:
        ConfigError: if it is no subgroup of a group.
        DataError: if an input has another group axis.

    Example:
        >>> import torch
        >>> from margeq.groups import P4, P4M
        >>> RestrictGroup(P4M, P4)(torch.zeros(2, 3, 8, 5, 5)).shape
        torch.Size([2, 6, 4, 5, 5])
    """

    cosets: Tensor

    def __init__(self, group: FiniteGroup, subgroup: FiniteGroup) -> None:
        super().__init__()
        require_group(group)
        self.group, self.subgroup = group, subgroup
        self._exact_cosets = group.cosets(subgroup)
        cosets = self._exact_cosets.to(torch.get_default_device())
        # it follows from the groups, so it is no state
        self.register_buffer("cosets", cosets, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Sort the group axis into channels and elements of the subgroup."""
        _require_group_axis(self, self.group, x)
        cosets = self.cosets_on(x.device)
        return x.index_select(2, cosets.flatten()).unflatten(2, cosets.shape).flatten(1, 2)

    def cosets_on(self, device: torch.device) -> Tensor:
        """The cosets on the device of a map, wherever the layer was made."""
        return self.cosets if self.cosets.device == device else self._exact_cosets.to(device)

    def extra_repr(self) -> str:
        """Both groups, for ``print(model)``."""
        return f"{self.group}, {self.subgroup}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # to_empty() leaves no values
        self.cosets = self._exact_cosets.to(self.cosets.device)
        return self


class Lift(nn.Module):
    """A map as one of a group that is the same for all elements: a picture in every pose.

        y[n,c,g,x] = f[n,c,x]

    In the aligned frame the copies are not rotated; the filters of the next layer are.

    Args:
        group: ``H``.

    Shapes:
        ``[n, c, *space] -> [n, c, |H|, *space]``.

    Raises:
        ConfigError: for something that is no group.
        DataError: if an input has no channels.

    Example:
        >>> import torch
        >>> from margeq.groups import P4
        >>> Lift(P4)(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 3, 4, 5, 5])
    """

    def __init__(self, group: FiniteGroup) -> None:
        super().__init__()
        require_group(group)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Copy the map for each element."""
        if x.ndim < 2:
            raise DataError(f"Lift lifts maps [n, c, *space] to {self.group}, got {tuple(x.shape)}")
        return x.unsqueeze(2).repeat_interleave(self.group.order, dim=2)

    def extra_repr(self) -> str:
        """The group, for ``print(model)``."""
        return str(self.group)


class MergeGroup(nn.Module):
    """Channels times elements as channels of an ordinary map, each channel's elements together.

    For layers without the group's symmetry, such as fully connected paths.

    Shapes:
        ``[n, c, g, *space] -> [n, c * g, *space]``.

    Raises:
        DataError: if an input has no group axis.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Merge the axes of channels and elements."""
        if x.ndim < 3:
            raise DataError(f"MergeGroup merges maps [n, c, g, *space], got {tuple(x.shape)}")
        return x.flatten(1, 2)


class SplitGroup(nn.Module):
    """The inverse of :class:`MergeGroup`.

    Args:
        group: ``H``.

    Shapes:
        ``[n, c * |H|, *space] -> [n, c, |H|, *space]``.

    Raises:
        ConfigError: for something that is no group.
        DataError: if the number of channels is no multiple of the group's order.

    Example:
        >>> import torch
        >>> from margeq.groups import P4
        >>> SplitGroup(P4)(MergeGroup()(torch.zeros(2, 3, 4, 5, 5))).shape
        torch.Size([2, 3, 4, 5, 5])
    """

    def __init__(self, group: FiniteGroup) -> None:
        super().__init__()
        require_group(group)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Split the channels."""
        order = self.group.order
        if x.ndim < 2 or x.shape[1] % order:
            raise DataError(
                f"SplitGroup({self.group}) splits maps [n, c * {order}, *space], got "
                f"{tuple(x.shape)}"
            )
        return x.unflatten(1, (-1, order))

    def extra_repr(self) -> str:
        """The group, for ``print(model)``."""
        return str(self.group)


class PerElement(nn.Module):
    """A layer for pictures that treats channels alike and apart, on the map of each element.

    For pooling such as ``nn.MaxPool2d``; elements go along as channels. For batch normalisation
    use ``nn.BatchNorm3d`` without this wrapper, which shares its statistics among the elements.

    Args:
        module: a map ``[n, c, *space] -> [n, c, *other]`` that is the same for all channels.

    Shapes:
        ``[n, c, g, *space] -> [n, c, g, *other]``.

    Raises:
        DataError: if an input has no group axis.
        ConfigError: if the module returns another number of channels.

    Example:
        >>> import torch
        >>> PerElement(nn.MaxPool2d(2))(torch.zeros(2, 3, 4, 6, 6)).shape
        torch.Size([2, 3, 4, 3, 3])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the module to each element's map."""
        if x.ndim < 3:
            raise DataError(f"PerElement acts on maps [n, c, g, *space], got {tuple(x.shape)}")
        y = self.module(x.flatten(1, 2))
        if y.ndim < 2 or y.shape[1] != x.shape[1] * x.shape[2]:
            raise ConfigError(
                f"PerElement: {self.module} maps {tuple(x.flatten(1, 2).shape)} to "
                f"{tuple(y.shape)}; use a module that keeps the number of channels"
            )
        return y.unflatten(1, x.shape[1:3])


def _require_group_axis(layer: nn.Module, group: FiniteGroup, x: Tensor) -> None:
    if x.ndim < 3 or x.shape[2] != group.order:
        raise DataError(
            f"{layer} needs maps [n, c, {group.order}, *space] of {group}, got {tuple(x.shape)}"
        )
