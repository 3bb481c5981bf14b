"""Feature maps ``[n, c, *shape]``: shapes, checks and the initialisation all layers share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError

__all__ = ["Shape", "as_map_shape", "check_map", "default_init"]

Shape = tuple[int, ...]


class _MapLayer(Protocol):
    in_channels: int
    in_shape: torch.Size


def as_map_shape(name: str, shape: int | Shape, *channels: int) -> torch.Size:
    """A spatial shape; an int stands for a one-dimensional map.

    Returns:
        The extents.

    Raises:
        ConfigError: if an extent, or one of ``channels``, is not a positive integer.
    """
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    for extent in (*extents, *channels):
        if not (isinstance(extent, int) and extent > 0):
            raise ConfigError(f"{name}={shape!r}, channels={channels}: sizes must be positive")
    if not extents:
        raise ConfigError(f"{name} is empty; use 1 for maps with a single position")
    return torch.Size(extents)


def check_map(layer: _MapLayer, x: Tensor) -> None:
    """Check that ``x`` is ``[n, C, *in_shape]`` (or the positions already flattened).

    Raises:
        DataError: naming both shapes.
    """
    expected = (layer.in_channels, *layer.in_shape)
    if x.ndim < 2 or x.shape[1:].numel() != torch.Size(expected).numel():
        raise DataError(
            f"{type(layer).__name__} maps inputs [n, {', '.join(map(str, expected))}], got "
            f"{tuple(x.shape)}"
        )


@torch.no_grad()
def default_init(weight: nn.Parameter, fan_in: int) -> None:
    """Normal weights with unit gain, ``N(0, 1 / fan_in)``."""
    weight.normal_(0.0, fan_in**-0.5)
