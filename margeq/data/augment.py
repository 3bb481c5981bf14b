"""Augmentation of training pictures: every picture of a batch has its own draw."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from margeq.errors import ConfigError

__all__ = ["random_shift_flip", "shift_flip"]


def random_shift_flip(
    images: Tensor, generator: torch.Generator, max_shift: int = 4, flip: bool = True
) -> Tensor:
    """Shift each picture by whole pixels and mirror every other one, each by its own draw.

    For the training batches only. Digits and other pictures with a handedness take ``flip=False``
    (``functools.partial(random_shift_flip, flip=False)``).

    Args:
        images: ``[n, channels, height, width]``.
        generator: on the CPU; moves on by ``3 n`` draws whatever the options are.
        max_shift: largest shift in pixels; each axis is uniform on -max_shift … max_shift.
        flip: whether to mirror left and right with probability ½.

    Returns:
        Pictures of the same shape; pixels that come from outside are 0, the mean of standardised
        pictures.

    Raises:
        ConfigError: if ``max_shift`` is negative or a side or more.

    Reference:
        van der Ouderaa et al. (2023), appendix F.6, for flips and shifts of 4 pixels.

    Examples:
        >>> images = torch.arange(3.0).expand(2, 1, 1, 3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> torch.equal(random_shift_flip(images, generator, max_shift=0, flip=False), images)
        True
    """
    smallest = min(images.shape[-2:])
    if not 0 <= max_shift < smallest:
        raise ConfigError(f"max_shift={max_shift}; use 0 to {smallest - 1} for these pictures")
    n = len(images)
    shifts = torch.randint(-max_shift, max_shift + 1, (n, 2), generator=generator)
    flips = torch.rand(n, generator=generator) < 0.5
    return shift_flip(images, shifts, flips if flip else torch.zeros_like(flips))


def shift_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Mirror the pictures with ``flips``, then move picture ``n`` by ``shifts[n]``.

    Args:
        images: ``[n, channels, height, width]``.
        shifts: whole pixels (down, right), ``[n, 2]``.
        flips: whether to mirror left and right, ``[n]``.

    Returns:
        Pictures of the same shape, 0 where nothing was.
    """
    n, _, height, width = images.shape
    shifts, flips = shifts.to(images.device), flips.to(images.device)
    margin = int(shifts.abs().max()) if n else 0
    padded = functional.pad(images, (margin,) * 4)
    # where the pixel of row y and column x comes from
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    datum = torch.arange(n, device=images.device)[:, None, None]
    moved = padded[datum, :, rows[:, :, None] + margin, columns[:, None, :] + margin]
    return moved.permute(0, 3, 1, 2).contiguous()
