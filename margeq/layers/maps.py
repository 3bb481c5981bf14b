"""Feature maps ``[n, c, *shape]``: shapes, checks and the initialisation all layers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError

__all__ = ["MapLayer", "Shape", "as_map_shape", "default_init"]

Shape = tuple[int, ...]


class MapLayer(nn.Module):
    """Base of layers between feature maps of given sizes; subclasses add weights and the map.

    Args:
        in_channels: ``C``.
        out_channels: ``D``.
        in_shape: spatial size of the input map.
        out_shape: spatial size of the output map.

    Raises:
        ConfigError: if a size is not positive.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_shape: int | Shape, out_shape: int | Shape
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.in_shape = as_map_shape("in_shape", in_shape, in_channels, out_channels)
        self.out_shape = as_map_shape("out_shape", out_shape)

    def check_input(self, x: Tensor) -> None:
        """Check that ``x`` is ``[n, C, *in_shape]`` (or the positions already flattened).

        Raises:
            DataError: naming both shapes.
        """
        if x.ndim < 2 or x.shape[1:].numel() != self.in_channels * self.in_shape.numel():
            expected = ", ".join(map(str, (self.in_channels, *self.in_shape)))
            raise DataError(
                f"{type(self).__name__} maps inputs [n, {expected}], got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"{self.in_channels}, {self.out_channels}, in_shape={tuple(self.in_shape)}, "
            f"out_shape={tuple(self.out_shape)}"
        )


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


@torch.no_grad()
def default_init(weight: nn.Parameter, fan_in: float) -> None:
    """Normal weights with unit gain, ``N(0, 1 / fan_in)``."""
    weight.normal_(0.0, fan_in**-0.5)
