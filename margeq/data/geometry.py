"""Where pictures stand: quadrants of a canvas, shifts, turns and sizes, one value per picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PADDINGS", "in_quadrants", "resized", "rotated", "shifted", "warped"]

PADDINGS = ("zeros", "border", "reflection")


def in_quadrants(images: Tensor, quadrants: Tensor) -> Tensor:
    """Pictures on an empty canvas of twice the side.

    Args:
        images: ``[n, channels, height, width]``.
        quadrants: 0 upper left, 1 upper right, 2 lower left, 3 lower right, ``[n]``.

    Returns:
        ``[n, channels, 2 height, 2 width]``.
    """
    n, channels, height, width = images.shape
    # [n, c, upper/lower, y, left/right, x]: a quadrant is one index on each of two axes
    canvas = images.new_zeros(n, channels, 2, height, 2, width)
    canvas[torch.arange(n), :, quadrants // 2, :, quadrants % 2, :] = images
    return canvas.reshape(n, channels, 2 * height, 2 * width)


def resized(images: Tensor, size: int, antialias: bool) -> Tensor:
    """Square pictures of side ``size``, by bilinear interpolation.

    Args:
        images: ``[n, channels, height, width]``.
        size: side of the result in pixels.
        antialias: whether a pixel averages over all that it covers when the picture shrinks.

    Returns:
        ``[n, channels, size, size]``.
    """
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=antialias)


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Move picture ``n`` by ``shifts[n]`` pixels (down, right); fractions are interpolated."""
    height, width = images.shape[-2:]
    identity = torch.eye(2).expand(len(images), 2, 2)
    # half a side is one unit of the grid, which says where a pixel comes from: hence the sign
    units = -shifts.flip(1) * torch.tensor([2 / width, 2 / height])
    return warped(images, torch.cat([identity, units[:, :, None]], dim=2))


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Turn picture ``n`` about its centre, anticlockwise, by ``angles[n]`` in degrees."""
    radians = angles * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # the inverse turn, in coordinates (x to the right, y down)
    turn = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    return warped(images, torch.cat([turn, turn.new_zeros(len(turn), 2, 1)], dim=2))


def warped(images: Tensor, maps: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear pictures at affine maps from output to input coordinates.

    Args:
        images: ``[n, channels, height, width]``.
        maps: ``[n, 2, 3]``, in coordinates (x to the right, y down) that run from -1 to 1 over
            each side, whatever its length.
        padding: what lies outside, one of ``PADDINGS``.

    Returns:
        Pictures of the same shape, differentiable in the maps.
    """
    grid = functional.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode=padding, align_corners=False
    )
