"""The layers of networks on a group of the plane, of which the trivial group is an ordinary CNN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.groups import Z2, FiniteGroup
from margeq.groups.finite import require_group
from margeq.layers import (
    GroupConv2d,
    GroupPool,
    LiftingConv2d,
    PerElement,
    require_exact_sizes,
)

__all__ = [
    "PlanarLayers",
    "SeparableConv2d",
    "require_counts",
    "require_group",
    "warned",
    "with_rectifier_gain",
]


class SeparableConv2d(nn.Sequential):
    """Channels first, then the plane: a 1 x 1 convolution, and a depthwise one.

        y[n,o] = K[o] * (sum_i w[o,i] x[n,i] + b[o]) + c[o]

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of ``K``.
        bias: both of ``b`` and ``c``.
        window: further arguments of the depthwise ``torch.nn.Conv2d``.

    Shapes:
        ``[n, I, y, x] -> [n, O, y', x']``.

    Reference:
        Lengyel & van Gemert 2021, c-Z2CNN.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        **window: Any,
    ) -> None:
        channels = _conv2d(in_channels, out_channels, 1, bias=bias)
        plane = _conv2d(
            out_channels, out_channels, kernel_size, groups=out_channels, bias=bias, **window
        )
        super().__init__()
        self.channels, self.plane = channels, plane


@dataclass(frozen=True)
class PlanarLayers:
    """Makes layers between maps of one group; on :data:`margeq.groups.Z2`, torch's own.

    Convolutions start with normal weights at the gain of a rectifier, and zero biases.

    Attributes:
        group: rotations and reflections of the plane.
        separability: of all convolutions between maps, see :class:`margeq.layers.GroupConv2d`; on
            Z2, ``"full"`` or ``"gc"``, which is :class:`SeparableConv2d`.
        bias: whether convolutions have one.

    Raises:
        ConfigError: for something that is no group, or on Z2 for another kind.
    """

    group: FiniteGroup
    separability: str = "full"
    bias: bool = True

    def __post_init__(self) -> None:
        require_group(self.group)
        if self.is_plain and self.separability not in ("full", "gc"):
            raise ConfigError(
                f"separability={self.separability!r} on Z2, which has no elements to separate: "
                f"use 'full' or 'gc'"
            )

    @property
    def is_plain(self) -> bool:
        """Whether the maps are ordinary ones, without a group axis."""
        return self.group == Z2

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        lifts: bool = False,
        full: bool = False,
        **window: Any,
    ) -> nn.Module:
        """A convolution, followed by a rectifier sooner or later.

        Args:
            in_channels: of the map.
            out_channels: of the result.
            kernel_size: extent of the filters.
            lifts: whether it maps from pictures.
            full: whether it is not separable, as nothing is that maps from pictures.
            window: stride, padding and so on.

        Returns:
            A module without a rectifier.
        """
        sizes = (in_channels, out_channels, kernel_size)
        options: dict[str, Any] = {"bias": self.bias, **window}
        separability = "full" if full or lifts else self.separability
        if self.is_plain:
            make = _conv2d if separability == "full" else SeparableConv2d
            return with_rectifier_gain(make(*sizes, **options))
        if lifts:
            return with_rectifier_gain(LiftingConv2d(*sizes, group=self.group, **options))
        return with_rectifier_gain(
            GroupConv2d(*sizes, group=self.group, separability=separability, **options)
        )

    def norm(self, channels: int) -> nn.Module:
        """Batch normalisation of each channel over the data, the group and the positions."""
        return nn.BatchNorm2d(channels) if self.is_plain else nn.BatchNorm3d(channels)

    def on_pictures(self, module: nn.Module) -> nn.Module:
        """A module for ordinary maps that keeps channels apart, on the map of each element."""
        return module if self.is_plain else PerElement(module)

    def group_pool(self, reduction: Literal["max", "mean"]) -> nn.Module:
        """From maps of the group to ordinary ones."""
        return nn.Identity() if self.is_plain else GroupPool(self.group, reduction)


def require_counts(**counts: object) -> None:
    """Refuse arguments that are no whole numbers of at least 1.

    Raises:
        ConfigError: naming the first one; for a sequence, its first entry that is none.
    """
    for name, value in counts.items():
        entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for entry in entries:
            if not is_count(entry):
                raise ConfigError(f"{name}={entry!r} must be a whole number of at least 1")


def _conv2d(in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> nn.Conv2d:
    """A convolution with unit gain and no bias yet."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


@torch.no_grad()
def with_rectifier_gain(conv: nn.Module) -> nn.Module:
    """A convolution of unit gain, whose last factor makes up for the half that is cut off."""
    factors = list(conv.children())
    last: Any = factors[-1] if factors else conv
    last.weight.mul_(math.sqrt(2.0))
    return conv


def warned(
    network: nn.Sequential, group: FiniteGroup, in_channels: int, size: int | None
) -> nn.Sequential:
    """The network, after a warning if pictures of a known size lose the group's symmetry in it."""
    if size is not None:
        require_counts(size=size)
        require_exact_sizes(network, (in_channels, size, size), group, action="warn")
    return network
