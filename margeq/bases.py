"""Spatial bases: few anchors and a lengthscale span the filters of sparsified layers.

    Psi(l) = (K_ZZ + nu^2 I)^-1 K_Z,grid                        (ELLA eq. 6, GP-regression mean)

so that ``w = u Psi`` is the smooth filter with values about ``u`` at the anchors ``Z``. Positions
are in pixels, with the origin in the middle of the filter. A point of a filter on a group of the
plane is a position and an element, embedded such that Euclidean distances are those of both,

    (h, y, x) -> (y, x, M_h / sqrt(2)),   |M_h - M_h'|_F^2 / 2 = (2 sin(angle / 2))^2

for rotations, and 2 between a rotation and a reflection; no element moves two points apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from margeq.errors import ConfigError
from margeq.groups.finite import FiniteGroup
from margeq.groups.planar import require_planar
from margeq.linalg import is_finite

__all__ = ["Anchors", "Kernel", "grid", "group_grid", "interpolation", "place_anchors"]

Kernel = Literal["rbf", "exponential"]
"""How the similarity of two points falls with their distance, by name."""
Anchors = str | int | float | Tensor
"""Where anchors are, how many, or which share of the pixels: see :func:`place_anchors`."""

NOISE = 0.01
"""``nu``: how far, in units of the signal, a filter may miss the values at its anchors."""


def grid(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Positions of all pixels of a filter, row-major, centred.

    Args:
        shape: extents of the filter.
        dtype: of the result.
        device: of the result, whatever the default device.

    Returns:
        ``[X, d]``, from ``-(k - 1) / 2`` to ``(k - 1) / 2`` along each axis.

    Example:
        >>> grid((1, 3)).tolist()
        [[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]
    """
    axes = [torch.arange(k, dtype=dtype, device=device) - (k - 1) / 2 for k in shape]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def group_grid(
    group: FiniteGroup,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Points of a filter on a group: all pixels for each element, embedded.

    Args:
        group: rotations and reflections of the plane.
        shape: rows and columns of the filter.
        dtype: of the result.
        device: of the result, whatever the default device.

    Returns:
        ``[|H| X, 6]``, elements first.

    Example:
        >>> from margeq.groups import P4
        >>> group_grid(P4, (3, 3)).shape
        torch.Size([36, 6])
    """
    pixels = grid(shape)
    elements = torch.arange(group.order, device="cpu").repeat_interleave(len(pixels))
    return _embedded(group, elements, pixels.repeat(group.order, 1)).to(device, dtype)


def place_anchors(
    anchors: Anchors, shape: Sequence[int], seed: int = 0, group: FiniteGroup | None = None
) -> Tensor:
    """Anchor positions: on the grid, at random, or as given.

    Args:
        anchors: ``"grid"``; a share in (0, 1] of the pixels (rounded up, ELLA F.4) or a number
            of anchors, both uniformly at random over the filter; or positions ``[M, d]``.
        shape: extents of the filter.
        seed: of the random positions.
        group: of a filter on a group of the plane. Pixels are those of all elements, random
            positions take all elements in turn, and given ones are ``[M, 3]``: the index of an
            element, then row and column.

    Returns:
        ``[M, d]`` float64 on the CPU, in pixels; with a group ``[M, 6]``, embedded.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> place_anchors(0.5, (3, 3)).shape
        torch.Size([5, 2])
    """
    if group is not None:
        return _place_on_group(anchors, shape, seed, group)
    if isinstance(anchors, Tensor):
        return _given(anchors, len(shape))
    if isinstance(anchors, str) and anchors == "grid":
        return grid(shape)
    return _at_random(_count(anchors, math.prod(shape)), shape, _generator(seed))


def _place_on_group(
    anchors: Anchors, shape: Sequence[int], seed: int, group: FiniteGroup
) -> Tensor:
    require_planar(group)
    if isinstance(anchors, Tensor):
        given = _given(anchors, 3)
        elements = given[:, 0].long()
        if not torch.equal(elements, given[:, 0]) or not 0 <= elements.min() <= elements.max() < (
            group.order
        ):
            raise ConfigError(
                f"anchors: the first column holds elements of {group!r}, whole numbers from 0 to "
                f"{group.order - 1}"
            )
        return _embedded(group, elements, given[:, 1:])
    if isinstance(anchors, str) and anchors == "grid":
        return group_grid(group, shape)
    generator = _generator(seed)
    positions = _at_random(_count(anchors, group.order * math.prod(shape)), shape, generator)
    # in turn, but in a random order: no element has two anchors more than another
    order = torch.randperm(group.order, generator=generator, device="cpu")
    turns = torch.arange(len(positions), device="cpu") % group.order
    return _embedded(group, order[turns], positions)


def _embedded(group: FiniteGroup, elements: Tensor, positions: Tensor) -> Tensor:
    matrices = group.matrices[elements].flatten(1) / math.sqrt(2.0)
    return torch.cat([positions, matrices], 1)


def _given(anchors: Tensor, n_axes: int) -> Tensor:
    if anchors.ndim != 2 or anchors.shape[1] != n_axes or not len(anchors):
        raise ConfigError(f"anchors of shape {tuple(anchors.shape)}: use [M, {n_axes}] positions")
    if not is_finite(anchors):
        raise ConfigError("anchors: positions have to be finite, and some are not")
    return anchors.detach().double().cpu().clone()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _at_random(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    half = torch.tensor([(k - 1) / 2 for k in shape], dtype=torch.float64, device="cpu")
    draws = torch.rand(count, len(shape), generator=generator, dtype=torch.float64, device="cpu")
    return (2.0 * draws - 1.0) * half


def _count(anchors: str | float, n_pixels: int) -> int:
    if isinstance(anchors, float) and 0.0 < anchors <= 1.0:
        # 0.28 of 25 pixels are 7, although their product in floats is a little more
        return max(1, math.ceil(anchors * n_pixels - 1e-9))
    if isinstance(anchors, int) and not isinstance(anchors, bool) and anchors > 0:
        return anchors
    raise ConfigError(
        f"anchors={anchors!r}: use 'grid', a share in (0, 1], a positive integer, or positions"
    )


def interpolation(
    pixels: Tensor, anchors: Tensor, log_lengthscale: Tensor, kernel: Kernel = "rbf"
) -> Tensor:
    """The regression mean from values at anchors to all pixels (ELLA eq. 6).

        Psi = (K_ZZ + nu^2 I)^-1 K_Z,grid
        rbf: k(a, b) = exp(-|a - b|^2 / (2 l^2)),   exponential: k(a, b) = exp(-|a - b| / l)

    Differentiable in lengthscales and anchors.

    Args:
        pixels: ``[X, d]``.
        anchors: ``[M, d]``.
        log_lengthscale: ``[G]``, logarithm of pixels; one basis for each. ``[G, d]`` for a
            lengthscale along each axis.
        kernel: ``"rbf"`` or ``"exponential"``.

    Returns:
        ``[G, M, X]``.
    """
    inverse = (-log_lengthscale).exp().reshape(len(log_lengthscale), -1)
    inverse = inverse.expand(-1, pixels.shape[1])
    gram = _correlation(anchors, anchors, inverse, kernel)
    eye = torch.eye(len(anchors), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + NOISE**2 * eye)
    return torch.cholesky_solve(_correlation(anchors, pixels, inverse, kernel), factor)


def _correlation(a: Tensor, b: Tensor, inverse_lengthscale: Tensor, kernel: Kernel) -> Tensor:
    squares = torch.einsum("abd,gd->gab", (a[:, None] - b).square(), inverse_lengthscale.square())
    if kernel == "rbf":
        return (-0.5 * squares).exp()
    # the root has no derivative at zero, where the distance is the same for every lengthscale
    positive = squares > 0
    distance = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
    return (-distance).exp()
