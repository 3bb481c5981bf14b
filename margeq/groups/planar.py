"""Rotations and reflections of the plane, and how they move the pixels of a square grid.

Pixel ``[row, column]`` of a map lies at ``(x, y) = (column, row)`` relative to the map's centre; an
element moves points by its matrix and pictures with them, ``(T_h w)(x) = w(h^-1 x)``.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.errors import ConfigError, DataError
from margeq.groups.finite import FiniteGroup, require_group

__all__ = ["P2", "P4", "P4M", "PM", "Z2", "C", "D", "is_exact", "require_planar", "stencil"]


def C(n: int) -> FiniteGroup:
    """Rotations by multiples of ``360 / n`` degrees; element r is the rotation by r steps.

    Returns:
        A group of ``n`` elements.

    Raises:
        ConfigError: if ``n`` is not a positive whole number.

    Example:
        >>> C(8).order
        8
    """
    _require_count("C", n)
    return _cyclic(int(n))


def D(n: int) -> FiniteGroup:
    """Rotations of ``C(n)`` and reflections; element ``m n + r`` is rotation r after m mirrors.

    The mirror is ``(x, y) -> (-x, y)``.

    Returns:
        A group of ``2 n`` elements.

    Raises:
        ConfigError: if ``n`` is not a positive whole number.

    Example:
        >>> D(4).order, D(4).has_subgroup(C(4))
        (8, True)
    """
    _require_count("D", n)
    return _dihedral(int(n))


def _require_count(name: str, n: object) -> None:
    if not is_count(n):
        raise ConfigError(f"{name}({n!r}): use a whole number of at least 1")


@cache
def _cyclic(n: int) -> FiniteGroup:
    names = {1: "Z2", 2: "P2", 4: "P4"}
    return FiniteGroup(names.get(n, f"C({n})"), _rotations(n))


@cache
def _dihedral(n: int) -> FiniteGroup:
    rotations = _rotations(n)
    mirror = torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, device="cpu")
    names = {1: "PM", 4: "P4M"}
    return FiniteGroup(names.get(n, f"D({n})"), torch.cat([rotations, rotations @ mirror]))


def _rotations(n: int) -> Tensor:
    angles = 2.0 * math.pi * torch.arange(n, dtype=torch.float64, device="cpu") / n
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    nearest = matrices.round()
    return torch.where((matrices - nearest).abs() < 1e-12, nearest, matrices)


Z2 = C(1)
"""The group of shifts alone: no rotation but the identity."""
P2 = C(2)
"""Rotations by half turns."""
P4 = C(4)
"""Rotations by quarter turns."""
PM = D(1)
"""One reflection, no rotation."""
P4M = D(4)
"""Quarter turns and reflections, eight elements."""


def require_planar(group: FiniteGroup) -> None:
    """Refuse groups that do not act on the plane by rotations and reflections.

    Raises:
        ConfigError: naming the group.
    """
    require_group(group)
    matrices = group.matrices
    eye = torch.eye(2, dtype=matrices.dtype, device="cpu")
    planar = matrices.shape[1] == 2 and float((matrices @ matrices.mT - eye).abs().max()) < 1e-9
    if not planar:
        raise ConfigError(f"group={group!r} does not act on the plane; use C(n) or D(n)")


def is_exact(group: FiniteGroup) -> bool:
    """Whether every element maps the pixels of a square grid to pixels.

    Returns:
        ``True`` for C(1), C(2), C(4), D(1), D(2) and D(4).

    Raises:
        ConfigError: for a group that does not act on the plane.

    Example:
        >>> is_exact(P4M), is_exact(C(8))
        (True, False)
    """
    require_planar(group)
    return bool((group.matrices == group.matrices.round()).all())


def stencil(group: FiniteGroup, height: int, width: int) -> Tensor:
    """Where each pixel of a transformed map comes from: ``(T_h w)[p] = w[stencil[h, p]]``.

    Args:
        group: one that is exact.
        height: rows of the map, odd or even.
        width: its columns; equal to the rows unless no element swaps the axes.

    Returns:
        Flat pixel indices ``[order, height * width]``.

    Raises:
        ConfigError: for a group that maps pixels between pixels.
        DataError: for a map that is not square, where the group needs one.

    Example:
        >>> stencil(P4, 2, 2)[1].tolist()
        [2, 0, 3, 1]
    """
    require_group(group)
    return _stencil(group, height, width)


@cache
def _stencil(group: FiniteGroup, height: int, width: int) -> Tensor:
    if not is_exact(group):
        raise ConfigError(f"{group!r} does not map pixels to pixels; use C(1, 2, 4) or D(1, 2, 4)")
    swaps = bool((group.matrices[:, 0, 0] == 0).any())
    if swaps and height != width:
        raise DataError(f"{group!r} needs square maps, got {height} x {width}")
    rows, columns = (torch.arange(extent, device="cpu") for extent in (height, width))
    # twice the distance from the centre, so that even sizes have whole numbers too
    y, x = torch.meshgrid(2 * rows - (height - 1), 2 * columns - (width - 1), indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()]).double()
    sources = group.matrices[group.inverse] @ points
    column, row = (sources[:, 0] + width - 1) / 2, (sources[:, 1] + height - 1) / 2
    return (row * width + column).round().long()
