"""The candidate paths that a layer can get, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from margeq.bases import place_anchors
from margeq.errors import ConfigError
from margeq.groups import P2, P4, P4M, PM, C, D, FiniteGroup
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    LiftingConv2d,
    Linear2d,
    MergeGroup,
    SparseConv2d,
    SparseFactoredLinear2d,
    SplitGroup,
)

__all__ = ["ORIGINALS", "Maker", "Spot", "Unfit", "makers"]

Maker = Callable[[nn.Module, torch.Size, torch.Size], nn.Module | None]
"""Layer, shape of its input, shape of its output -> a path, or ``None`` for none."""

ORIGINALS: Mapping[type[nn.Module], str] = {nn.Conv2d: "conv", Linear2d: "fc"}
"""Type of a layer -> name of the path that it becomes."""

_GROUPS = {"p2": P2, "p4": P4, "pm": PM, "p4m": P4M}
_SHARE = 0.5  # of the pixels, anchors of sparsified paths
_KERNEL = 3  # of convolutions in place of linear layers


class Unfit(Exception):
    """A path that a layer cannot have; the reason."""


@dataclass(frozen=True)
class Spot:
    """A layer and what it maps.

    Attributes:
        name: in the model.
        layer: an ``nn.Conv2d`` or a :class:`Linear2d`.
        in_shape: ``[c, y, x]`` of its input.
        out_shape: of its output.
        is_first: whether it maps from pictures.
        largest_path: largest number of weights of a dense path.
    """

    name: str
    layer: nn.Conv2d | Linear2d
    in_shape: torch.Size
    out_shape: torch.Size
    is_first: bool
    largest_path: int

    @property
    def has_bias(self) -> bool:
        """Whether the layer has one."""
        return self.layer.bias is not None

    def maps(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """Channels and sizes, in the order in which layers between whole maps take them."""
        if isinstance(self.layer, nn.Conv2d) and self.layer.groups > 1:
            raise Unfit(f"the {self.layer.groups} groups of channels of the layer would be mixed")
        (c, *before), (d, *after) = self._shapes()
        return c, d, tuple(before), tuple(after)

    def convolution(self) -> nn.Conv2d:
        """The layer, or the convolution between maps of the same sizes."""
        if isinstance(self.layer, nn.Conv2d):
            return self.layer
        (c, *before), (d, *after) = self._shapes()
        strides = {size // reduced for size, reduced in zip(before, after, strict=False)}
        fits = [size % reduced for size, reduced in zip(before, after, strict=False)]
        if len(before) != 2 or len(after) != 2 or len(strides) > 1 or any(fits):
            raise Unfit(f"no convolution maps {tuple(before)} to {tuple(after)} pixels")
        with torch.device("meta"):  # only its arguments matter
            return nn.Conv2d(
                c, d, _KERNEL, strides.pop(), _KERNEL // 2, bias=False, padding_mode="circular"
            )

    def require_small(self, count: int) -> None:
        """Refuse a dense path with too many weights.

        Raises:
            ConfigError: naming the layer, the number, and those of the factored paths.
        """
        if count <= self.largest_path:
            return
        c, d, before, after = self.maps()
        factored = c * d * (math.prod(before) + math.prod(after))
        sparse = c * d * _n_anchors(before, after)
        raise ConfigError(
            f"{self.name or 'the model itself'}: the dense path would have {count:,} weights, more "
            f"than largest_path={self.largest_path:,}; 'factored' would have {factored:,} and "
            f"'s_factored' {sparse:,}. Use one of them, leave the layer with exclude=[...], or "
            f"raise largest_path"
        )

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.layer, Linear2d):
            c, d = self.layer.in_channels, self.layer.out_channels
            return (c, *self.layer.in_shape), (d, *self.layer.out_shape)
        return tuple(self.in_shape), tuple(self.out_shape)


def makers(paths: Sequence[str] | Mapping[str, str | Maker]) -> dict[str, Callable[[Spot], Any]]:
    """Path name -> what makes it for a layer.

    Args:
        paths: names of built-in paths, or path name -> name of a built-in one or a function.

    Returns:
        Functions that return a module or raise :class:`Unfit`.

    Raises:
        ConfigError: for unknown names.
    """
    if isinstance(paths, str):
        raise ConfigError(f"paths={paths!r}: use a tuple of names, ({paths!r},)")
    if not isinstance(paths, Mapping) and not all(isinstance(name, str) for name in paths):
        raise ConfigError(f"paths={paths!r}: own paths need a mapping from names to functions")
    named = dict(paths) if isinstance(paths, Mapping) else {name: name for name in paths}
    if not named:
        raise ConfigError("paths is empty; name at least one candidate, such as 'factored'")
    found: dict[str, Callable[[Spot], Any]] = {}
    for name, kind in named.items():
        if name in ORIGINALS.values() and kind != name:
            raise ConfigError(
                f"paths: {name!r} is the path of original layers; name your own differently"
            )
        found[name] = _built_in(kind) if isinstance(kind, str) else _own(name, kind)
    return found


def _built_in(name: str) -> Callable[[Spot], nn.Module]:
    if name in _PATHS:
        return _PATHS[name]
    group = _group(name)
    if group is None:
        raise ConfigError(
            f"paths: unknown path {name!r}; use {', '.join(_PATHS)}, a group "
            f"({', '.join(_GROUPS)}, c<n>, d<n>), or a mapping from a name to a function"
        )
    return lambda spot: _of_group(spot, group)


def _own(name: str, make: Maker) -> Callable[[Spot], nn.Module]:
    if not callable(make):
        raise ConfigError(f"paths[{name!r}]={make!r}: use a name or a function")

    def made(spot: Spot) -> nn.Module:
        path = make(spot.layer, spot.in_shape, spot.out_shape)
        if path is None:
            raise Unfit("its function returned none")
        if not isinstance(path, nn.Module):
            raise ConfigError(f"paths[{name!r}] returned a {type(path).__name__}, not a module")
        return path

    return made


def _group(name: str) -> FiniteGroup | None:
    match = re.fullmatch(r"([cd])([1-9]\d*)", name)
    if match is not None and name != "c1":
        return (C if match[1] == "c" else D)(int(match[2]))
    return _GROUPS.get(name)


def _fc(spot: Spot) -> nn.Module:
    maps = spot.maps()
    spot.require_small(math.prod((maps[0], maps[1], *maps[2], *maps[3])))
    return Linear2d(*maps, bias=spot.has_bias)


def _n_anchors(*shapes: tuple[int, ...]) -> int:
    """Anchors of a sparsified path, of all shapes together."""
    return sum(len(place_anchors(_SHARE, shape)) for shape in shapes)


def _factored(spot: Spot) -> nn.Module:
    c, d, before, after = spot.maps()
    return FactoredLinear2d(c, d, before, after, bias=spot.has_bias)


def _s_factored(spot: Spot) -> nn.Module:
    c, d, before, after = spot.maps()
    return SparseFactoredLinear2d(c, d, before, after, bias=spot.has_bias, anchors=_SHARE)


def _conv(spot: Spot) -> nn.Module:
    conv = spot.convolution()
    return nn.Conv2d(conv.in_channels, conv.out_channels, **_window(conv), bias=False)


def _s_conv(spot: Spot) -> nn.Module:
    conv = spot.convolution()
    if math.prod(conv.kernel_size) == 1:
        raise Unfit("a filter of one pixel has nothing to leave out")
    return SparseConv2d(
        conv.in_channels, conv.out_channels, **_window(conv), bias=False, anchors=_SHARE
    )


def _of_group(spot: Spot, group: FiniteGroup) -> nn.Module:
    conv, order = spot.convolution(), group.order
    c, d = conv.in_channels, conv.out_channels
    lifts = spot.is_first
    if d % order or (c % order and not lifts):
        raise Unfit(f"{c} -> {d} channels are no maps on {group!r}, whose order is {order}")
    window = {name: _equal(name, value) for name, value in _window(conv).items()}
    try:
        if lifts:
            return nn.Sequential(
                LiftingConv2d(c, d // order, group=group, bias=False, **window), MergeGroup()
            )
        inside = GroupConv2d(c // order, d // order, group=group, bias=False, **window)
    except ConfigError as error:
        raise Unfit(str(error)) from error
    return nn.Sequential(SplitGroup(group), inside, MergeGroup())


def _window(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def _equal(name: str, value: Any) -> Any:
    """One number for both axes, as layers need it whose filters are turned."""
    if value == "valid":
        return 0
    if not isinstance(value, tuple):
        return value
    if len(set(value)) > 1:
        raise Unfit(f"{name}={value} differs between the axes, which turns would swap")
    return value[0]


_PATHS: dict[str, Callable[[Spot], nn.Module]] = {
    "conv": _conv,
    "fc": _fc,
    "factored": _factored,
    "s_conv": _s_conv,
    "s_factored": _s_factored,
}
