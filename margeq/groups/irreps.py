"""The complex irreducible representations of a finite group."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from margeq.errors import CurvatureError
from margeq.groups.finite import FiniteGroup, require_group

__all__ = ["irreps"]

_ATTEMPTS = 5
"""Seeds to try until no two eigenvalues of a random matrix fall together."""


def irreps(group: FiniteGroup) -> tuple[Tensor, ...]:
    """One unitary matrix set per complex irreducible representation, up to equivalence.

        rho(g h) = rho(g) rho(h),   sum of d^2 = order,   sum_g chi(g) chi'(g)* = order or 0

    A random Hermitian matrix that commutes with the regular representation has one eigenspace per
    copy of an irreducible representation in it.

    Args:
        group: any finite group.

    Returns:
        ``[order, d, d]`` each, complex128; the trivial one first, then by dimension.

    Raises:
        ConfigError: for something that is no group.
        CurvatureError: if the regular representation could not be split.

    Example:
        >>> from margeq.groups import S
        >>> [rho.shape[-1] for rho in irreps(S(4))]
        [1, 1, 2, 3, 3]
    """
    require_group(group)
    with torch.device("cpu"):  # whatever the default: they are kept
        return _irreps(group)


@cache
def _irreps(group: FiniteGroup) -> tuple[Tensor, ...]:
    for seed in range(_ATTEMPTS):
        found = _distinct(_eigenspaces(group, seed), group)
        if sum(rho.shape[-1] ** 2 for rho in found) == group.order:
            return tuple(sorted(found, key=_rank))
    raise CurvatureError(f"the regular representation of {group!r} has not been split")


def _eigenspaces(group: FiniteGroup, seed: int) -> list[Tensor]:
    """Orthonormal bases ``[order, d]`` of irreducible spaces of functions on the group."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(group.order, generator=generator, dtype=torch.complex128)
    values = draw + draw[group.inverse].conj()
    # M[h, g] = c[h^-1 g] commutes with (L_u f)(h) = f(u^-1 h)
    eigenvalues, vectors = torch.linalg.eigh(values[group.relative])
    apart = eigenvalues.diff() > 1e-9 * eigenvalues.abs().max()
    sizes = torch.diff(
        torch.cat([torch.tensor([-1]), apart.nonzero().flatten(), torch.tensor([group.order - 1])])
    )
    return list(vectors.split(sizes.tolist(), dim=1))


def _distinct(spaces: list[Tensor], group: FiniteGroup) -> list[Tensor]:
    """The representations on the spaces, each once; those with one character are equivalent."""
    # a space on which two eigenvalues fell together has a character of norm 2, not 1
    moved = group.product[group.inverse]
    found: list[Tensor] = []
    characters: list[Tensor] = []
    for space in sorted(spaces, key=lambda space: space.shape[1]):
        images = space[moved]
        character = torch.einsum("hi,ghi->g", space.conj(), images)
        overlaps = [float((character.conj() * other).mean().abs()) for other in characters]
        if float(character.abs().square().mean()) < 1.5 and max(overlaps, default=0.0) < 0.5:
            found.append(torch.einsum("hi,ghj->gij", space.conj(), images))
            characters.append(character)
    return found


def _rank(rho: Tensor) -> tuple[int, float]:
    """Small ones first; of those, the one whose character is closest to the trivial one's."""
    character = rho.diagonal(dim1=1, dim2=2).sum(-1)
    return rho.shape[-1], round(float((character - 1.0).abs().square().mean()), 6)
