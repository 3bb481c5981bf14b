"""Filter bases that rotate, for groups that move pixels to places between pixels.

    psi_h[m, x] = (T_h psi_m)(x) = psi_m(h^-1 x)

for each element h, sampled on the pixels of a square filter, so that the filter of element h,
``sum_m weight[o, i, m] psi_h[m]``, is linear in weights that all elements share. A filter that is
smooth, and gone where the pixels end, means the same after a rotation; two things prevent it:

- what is too fast for the pixels appears as something slower: ring r carries no more than ``2 r``
  periods, and sines by default no more than half of what pixels can show;
- pixels outside of the square would have to come in: smooth bases end at radius ``(k + 1) / 2``,
  the distance of the nearest pixel that is missing.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from margeq.bases import grid
from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.groups.finite import FiniteGroup
from margeq.groups.planar import require_planar, stencil

__all__ = ["rotated_basis"]

_KINDS = ("pixels", "bilinear", "band-limited", "siren")

_RING_WIDTH = 0.6
"""Standard deviation of rings, in pixels: narrower ones alias, wider ones are nearly the same."""

_MOST_FEATURES = 32


def rotated_basis(
    group: FiniteGroup,
    kernel_size: int,
    kind: str,
    *,
    omega_0: float | None = None,
    n_features: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Basis functions of a square filter, moved by each element of a group.

        psi_h[m, x] = psi_m(h^-1 x),   sum_m,x psi_e[m, x]^2 = kernel_size^2

    so weights of unit variance give filters of unit variance per pixel on average, of every kind.
    A subgroup has the same functions: its basis is the group's, for the elements it has.

    Args:
        group: rotations and reflections of the plane.
        kernel_size: rows and columns of the filter; of size 1 there is one function.
        kind: ``"pixels"``, one function per pixel, for groups that map pixels to pixels;
            ``"band-limited"``, circular harmonics on rings (Weiler & Cesa 2019), under which
            independent weights have the same distribution after every rotation; ``"siren"``,
            windowed sines of the position (Knigge et al. 2022); or ``"bilinear"``, interpolated
            pixels in the disk of radius ``(kernel_size - 1) / 2``, the least accurate.
        omega_0: of ``"siren"``, the largest angular frequency over half a filter; by default
            ``pi / 2`` per pixel, ``(pi / 2) (kernel_size - 1) / 2``.
        n_features: of ``"siren"``, an even number, as each frequency has two phases a quarter
            apart; by default the largest that is at most the number of pixels and 32.
        seed: of the frequencies and phases of ``"siren"``.

    Returns:
        ``[order, M, kernel_size^2]`` float64, pixels row-major.

    Raises:
        ConfigError: for a group that does not act on the plane, or not on pixels where the kind
            needs it, an unknown kind, or numbers that cannot be used.

    Example:
        >>> from margeq.groups import C
        >>> rotated_basis(C(8), 3, "band-limited").shape
        torch.Size([8, 6, 9])
    """
    _require_usable(kernel_size, kind)
    require_planar(group)
    if kind == "pixels":
        return _moved_pixels(group, kernel_size)
    if kernel_size == 1:
        return torch.ones(group.order, 1, 1, dtype=torch.float64, device="cpu")
    with torch.device("cpu"):  # whatever the default device, as the group's tables
        sources = grid((kernel_size, kernel_size)).flip(-1) @ group.matrices[group.inverse].mT
        if kind == "bilinear":
            basis = _bilinear(sources, kernel_size)
        elif kind == "band-limited":
            basis = _band_limited(sources, kernel_size)
        else:
            waves = _waves(kernel_size, omega_0, n_features, seed)
            basis = _siren(sources, kernel_size, *waves)
        return basis * (kernel_size / torch.linalg.vector_norm(basis[0]))


def _require_usable(kernel_size: int, kind: str) -> None:
    if kind not in _KINDS:
        raise ConfigError(f"kind={kind!r}: use one of {', '.join(map(repr, _KINDS))}")
    if not is_count(kernel_size):
        raise ConfigError(f"kernel_size={kernel_size!r}: use a whole number of at least 1")


def _moved_pixels(group: FiniteGroup, k: int) -> Tensor:
    sources = stencil(group, k, k)
    return (torch.arange(k * k, device="cpu")[:, None] == sources[:, None]).double()


def _bilinear(sources: Tensor, k: int) -> Tensor:
    """Tents over the pixels of a disk: psi_m is 1 at pixel m and 0 at all others."""
    radius = max((k - 1) / 2, math.sqrt(0.5)) + 1e-9  # no pixel of 2 x 2 is nearer than that
    pixels = grid((k, k)).flip(-1)
    pixels = pixels[pixels.norm(dim=-1) <= radius]
    tents = (1.0 - (sources[:, None] - pixels[:, None]).abs()).clamp_min(0.0).prod(-1)
    return tents * (sources.norm(dim=-1) <= radius)[:, None]


def _window(radius: Tensor, k: int) -> Tensor:
    """Smooth over the filter, 0 from the nearest pixel that the filter lacks."""
    return (math.pi * radius / (k + 1)).clamp_max(math.pi / 2).cos()


def _band_limited(sources: Tensor, k: int) -> Tensor:
    """Circular harmonics times radial profiles, orthonormal on average over all rotations."""
    radius = sources[0].norm(dim=-1)
    direction = torch.view_as_complex(sources.contiguous()) / radius.clamp_min(1e-9)
    # rings lie one pixel apart, the last through the middle of the filter's sides
    rings = [ring / 2 for ring in range((k - 1) % 2, k, 2)]
    # averaged over rotations only products of equal frequency remain: profiles orthonormal within
    # each frequency make functions that rotations mix by orthogonal matrices
    functions = []
    for frequency in range(k):
        carriers = torch.tensor([ring for ring in rings if frequency <= 2 * ring])
        profiles = _profiles(radius, carriers, k)
        if frequency == 0:
            functions.append(_orthonormal(profiles).expand(len(sources), -1, -1))
            continue
        wave = math.sqrt(2.0) * direction**frequency
        profiles = _orthonormal(profiles * (radius > 0))  # the centre has no angle
        functions += [profiles * wave.real[:, None], profiles * wave.imag[:, None]]
    return torch.cat(functions, 1)


def _profiles(radius: Tensor, rings: Tensor, k: int) -> Tensor:
    distance = (radius - rings.to(radius)[:, None]) / _RING_WIDTH
    return (-0.5 * distance.square()).exp() * _window(radius, k)


def _orthonormal(rows: Tensor) -> Tensor:
    """The orthonormal rows nearest to the given ones; unique, as singular vectors are not."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    return left @ right


def _waves(k: int, omega_0: float | None, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Frequencies per pixel, uniform over a disk, and phases."""
    half = (k - 1) / 2
    omega_0 = math.pi / 2 * half if omega_0 is None else omega_0
    if not isinstance(omega_0, Real) or not 0.0 < omega_0 < math.inf:
        raise ConfigError(f"omega_0={omega_0!r}: use a positive number, about {half:g} pi / 2")
    count = min(k * k // 2 * 2, _MOST_FEATURES) if count is None else count
    if not is_count(count) or count % 2:
        raise ConfigError(f"n_features={count!r}: use an even number of at least 2")
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.rand(3, count // 2, generator=generator, dtype=torch.float64, device="cpu")
    angle, phase = 2.0 * math.pi * draws[:2]
    speed = omega_0 / half * draws[2].sqrt()
    return torch.stack([speed * angle.cos(), speed * angle.sin()], -1), phase


def _siren(sources: Tensor, k: int, frequencies: Tensor, phases: Tensor) -> Tensor:
    angles = (sources @ frequencies.mT + phases).mT
    window = _window(sources.norm(dim=-1), k)
    return torch.cat([angles.sin(), angles.cos()], 1) * window[:, None]
