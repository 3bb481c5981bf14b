"""How the elements of a group of the plane move pictures and feature maps.

picture  [n, c, y, x]     (T_u f)(x)    = f(u^-1 x)
map      [n, c, g, y, x]  (L_u f)(g, x) = f(u^-1 g, u^-1 x)
elements [n, c, g]        (L_u f)(g)    = f(u^-1 g)
vector   [n, k]           stays as it is
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.errors import ConfigError, DataError
from margeq.groups.finite import FiniteGroup, require_group
from margeq.groups.planar import P4M, D, require_planar, stencil

__all__ = ["Interpolation", "Kind", "act", "disk", "is_shift", "maps_pixels_to_pixels"]

Kind = Literal["picture", "map", "elements", "vector"]
Interpolation = Literal["bicubic", "bilinear"]

_AXES: dict[Kind, int] = {"picture": 4, "map": 5, "elements": 3, "vector": 2}


def act(
    x: Tensor,
    group: FiniteGroup,
    element: int,
    kind: Kind,
    *,
    shift: tuple[int, int] = (0, 0),
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Move pictures or maps by one element, then around the edges by whole pixels.

        (T_u f)(x) = f(u^-1 x),   (L_u f)(g, x) = f(u^-1 g, u^-1 x)

    Quarter turns and mirrors move pixels to pixels and are exact, in whatever group they are. All
    other elements interpolate, and what comes from outside is zero: good enough to see how far from
    equivariant a network is, no more.

    Args:
        x: what to move.
        group: rotations and reflections of the plane.
        element: index of ``u`` in the group.
        kind: ``"picture"`` ``[n, c, y, x]``, ``"map"`` ``[n, c, g, y, x]``, ``"elements"``
            ``[n, c, g]`` or ``"vector"`` ``[n, k]``.
        shift: rows and columns of a circular shift.
        interpolation: ``"bicubic"`` or ``"bilinear"``, for elements that are not exact.

    Returns:
        A tensor of the same shape.

    Raises:
        ConfigError: for a group that does not act on the plane, or an argument out of range.
        DataError: for another shape than that of the kind.

    Example:
        >>> from margeq.groups import P4
        >>> act(torch.arange(4.0).reshape(1, 1, 2, 2), P4, 1, "picture")
        tensor([[[[2., 0.],
                  [3., 1.]]]])
    """
    require_planar(group)
    _require_arguments(x, group, element, kind, shift, interpolation)
    if kind in ("map", "elements"):
        x = x.index_select(2, group.relative[element].to(x.device))
    if kind in ("picture", "map"):
        x = _moved(x, group, element, interpolation)
        x = x.roll(shift, (-2, -1)) if any(shift) else x
    return x


def maps_pixels_to_pixels(group: FiniteGroup, element: int) -> bool:
    """Whether one element is a combination of quarter turns and mirrors.

    Returns:
        False if it moves some pixel to a place between pixels.

    Raises:
        ConfigError: for something that is no group.

    Example:
        >>> from margeq.groups import C
        >>> [maps_pixels_to_pixels(C(8), u) for u in range(4)]
        [True, False, True, False]
    """
    require_group(group)
    return _as_exact(group, element) is not None


def is_shift(value: object) -> bool:
    """Whether an argument is a number of rows and one of columns, of any sign."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(v, Integral) and not isinstance(v, bool) for v in value)
    )


def disk(height: int, width: int, share: float = 1.0) -> Tensor:
    """Pixels in a central disk, whose radius is a share of that of the largest disk that fits.

    Returns:
        Flags ``[height, width]``.
    """
    radius = share * min(height - 1, width - 1) / 2 + 1e-9
    return _centred(height, width).norm(dim=0).unflatten(0, (height, width)) <= radius


@cache
def _as_exact(group: FiniteGroup, element: int) -> tuple[FiniteGroup, int] | None:
    """The same motion in a group that is exact, the first one that also moves rectangles."""
    matrix = group.matrices[element]
    for exact in (D(2), P4M):
        same = (exact.matrices - matrix).abs().amax((1, 2)) < 1e-9
        if bool(same.any()):
            return exact, int(same.int().argmax())
    return None


def _moved(x: Tensor, group: FiniteGroup, element: int, interpolation: Interpolation) -> Tensor:
    """``(T_u f)(x) = f(u^-1 x)`` of maps ``[..., y, x]``."""
    height, width = x.shape[-2:]
    exact = _as_exact(group, element)
    if exact is not None:
        if exact[0] is P4M and height != width:
            raise DataError(
                f"element {element} of {group!r} swaps rows and columns, so it needs square maps; "
                f"got {height} x {width}"
            )
        sources = stencil(exact[0], height, width)[exact[1]].to(x.device)
        return x.flatten(-2).index_select(-1, sources).unflatten(-1, (height, width))
    # the inverse of an orthogonal matrix: where each pixel comes from
    sources = group.matrices[element].mT @ _centred(height, width)
    # half a map is one unit, from its centre to the outer side of its last pixel
    units = sources.mT / torch.tensor([width / 2, height / 2], dtype=sources.dtype, device="cpu")
    places = units.unflatten(0, (height, width)).to(x)
    return nn.functional.grid_sample(
        x.flatten(1, -3), places.expand(len(x), -1, -1, -1), mode=interpolation,
        padding_mode="zeros", align_corners=False,
    ).view(x.shape)  # fmt: skip


def _centred(height: int, width: int) -> Tensor:
    """``(x, y)`` of each pixel relative to the centre, ``[2, height * width]``."""
    y = torch.arange(height, dtype=torch.float64, device="cpu") - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device="cpu") - (width - 1) / 2
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()])


def _require_arguments(
    x: Tensor, group: FiniteGroup, element: int, kind: str, shift: object, interpolation: str
) -> None:
    if kind not in _AXES:
        raise ConfigError(f"kind={kind!r}: use one of {get_args(Kind)}")
    if interpolation not in get_args(Interpolation):
        raise ConfigError(f"interpolation={interpolation!r}: use {get_args(Interpolation)}")
    if not is_shift(shift):
        raise ConfigError(f"shift={shift!r}: use whole numbers of pixels, (rows, columns)")
    if not is_count(element, least=0) or element >= group.order:
        raise ConfigError(f"element={element!r} of {group!r}: use 0 to {group.order - 1}")
    on_group = kind in ("map", "elements")
    if x.ndim != _AXES[kind] or (on_group and x.shape[2] != group.order):
        raise DataError(
            f"a {kind} of {group!r} has {_AXES[kind]} axes"
            f"{f', the third of size {group.order}' if on_group else ''}; got {tuple(x.shape)}"
        )
