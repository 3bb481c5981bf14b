"""The linear maps that commute with two representations (ELLA eq. 28).

Psi rho_in(g) = rho_out(g) Psi   for all g of a finite group,
Psi rho_in(X) = rho_out(X) Psi   for all X of a Lie algebra
"""

from __future__ import annotations

import torch
from torch import Tensor

from margeq.errors import ConfigError
from margeq.groups.finite import FiniteGroup
from margeq.groups.representations import LieRepresentation, Representation, kron_sum, trivial

__all__ = ["intertwiners", "invariants"]

_LARGEST_NULL_SPACE = 4096
"""Entries of a map up to which its constraints are decomposed densely: a minute, and 0.5 GB."""


def intertwiners(
    rep_in: Representation | LieRepresentation, rep_out: Representation | LieRepresentation
) -> Tensor:
    """An orthonormal basis of all linear maps that commute with two representations.

        Psi[b] rho_in(g) = rho_out(g) Psi[b],   sum_rs Psi[b,r,s] Psi[c,r,s] = 1 if b = c else 0

    The basis depends on the space of maps alone, so it is the same on every machine.

    Args:
        rep_in: of the inputs.
        rep_out: of the outputs, of the same group or algebra.

    Returns:
        ``[b, d_out, d_in]``, float64; without maps, ``b = 0``.

    Raises:
        ConfigError: if the two do not belong together, or are too large for a Lie algebra.

    Reference:
        Finzi, Welling & Wilson 2021.

    Example:
        >>> from margeq.groups import S, standard
        >>> items = standard(S(4))
        >>> len(intertwiners(items, items)), len(intertwiners(items * items, items * items))
        (2, 15)
    """
    with torch.device("cpu"):
        return _flat_maps(rep_in, rep_out).reshape(-1, rep_out.dim, rep_in.dim)


def invariants(rep: Representation | LieRepresentation) -> Tensor:
    """An orthonormal basis of the vectors that a representation does not move.

    Args:
        rep: of a finite group or a Lie algebra.

    Returns:
        ``[b, d]``, float64; without such vectors, ``b = 0``.

    Example:
        >>> from margeq.groups import S, standard
        >>> invariants(standard(S(4))).tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """
    one = trivial(rep.group) if isinstance(rep, Representation) else trivial(rep)
    return intertwiners(one, rep)[:, :, 0]


def _flat_maps(
    rep_in: Representation | LieRepresentation, rep_out: Representation | LieRepresentation
) -> Tensor:
    if isinstance(rep_in, Representation) and isinstance(rep_out, Representation):
        rep_in.require_same_group(rep_out)
        if rep_in.permutation is not None and rep_out.permutation is not None:
            return _orbits(rep_in.group, rep_in.permutation, rep_out.permutation)
        return _canonical(_averages(rep_in, rep_out))
    if isinstance(rep_in, LieRepresentation) and isinstance(rep_out, LieRepresentation):
        rep_in.require_same_algebra(rep_out)
        return _canonical(_null_space(rep_in.generators, rep_out.generators))
    raise ConfigError(
        f"maps from {rep_in!r} to {rep_out!r}: use two Representation of one group, or two "
        f"LieRepresentation of one algebra"
    )


def _orbits(group: FiniteGroup, places_in: Tensor, places_out: Tensor) -> Tensor:
    """Maps that are constant on the orbits of pairs of entries: ``W[g r, g s] = W[r, s]``."""
    d_out, d_in = places_out.shape[1], places_in.shape[1]
    generators = list(group.generators)
    moved = places_out[generators][:, :, None] * d_in + places_in[generators][:, None, :]
    labels = _smallest_in_orbit(moved.flatten(1), d_out * d_in)
    found, numbers = labels.unique(return_inverse=True)
    orbits = torch.zeros(len(found), d_out * d_in, dtype=torch.float64)
    orbits[numbers, torch.arange(d_out * d_in)] = 1.0
    return orbits / orbits.sum(1, keepdim=True).sqrt()


def _smallest_in_orbit(permutations: Tensor, n: int) -> Tensor:
    """The smallest of ``n`` points that products of permutations ``[m, n]`` lead to from each."""
    labels = torch.arange(n)
    while True:
        nearer = torch.cat([labels[None], labels[permutations]]).amin(0)
        nearer = nearer[nearer]  # what a point in the orbit has found already
        if torch.equal(nearer, labels):
            return labels
        labels = nearer


def _averages(rep_in: Representation, rep_out: Representation) -> Tensor:
    """The span of random maps averaged over the group; characters know its dimension."""
    inverse = rep_in.group.inverse
    dimension = round(float((rep_out.characters * rep_in.characters[inverse]).mean()))
    generator = torch.Generator().manual_seed(0)
    # a few more than the dimension: a square random matrix may be nearly singular
    shape = (dimension + 8, rep_out.dim, rep_in.dim)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64)
    average = torch.zeros_like(maps)
    for left, right in zip(rep_out.matrices, rep_in.matrices[inverse], strict=True):
        average += left @ maps @ right
    return torch.linalg.svd(average.flatten(1), full_matrices=False).Vh[:dimension]


def _null_space(generators_in: Tensor, generators_out: Tensor) -> Tensor:
    d_in, d_out = generators_in.shape[-1], generators_out.shape[-1]
    if d_in * d_out > _LARGEST_NULL_SPACE:
        raise ConfigError(
            f"maps from {d_in} to {d_out} dimensions have {d_in * d_out} entries, more than "
            f"{_LARGEST_NULL_SPACE}; use smaller representations, or several layers"
        )
    # rho_out(X) W - W rho_in(X), as a matrix on the entries of W in rows
    constraints = kron_sum(generators_out, -generators_in.mT).flatten(0, 1)
    _, values, vectors = torch.linalg.svd(constraints, full_matrices=False)
    return vectors[values <= 1e-8 * values.max().clamp_min(1.0)]


def _canonical(rows: Tensor) -> Tensor:
    """The orthonormal basis of the same space that the first independent columns lead to."""
    # decompositions are free to rotate a basis, and do so differently on different machines
    directions = rows.new_zeros(0, len(rows))
    for column in rows.T:
        if len(directions) == len(rows):
            break
        rest = column
        for _ in range(2):  # once more, against rounding
            rest = rest - directions.T @ (directions @ rest)
        if float(rest.norm()) > 1e-6:
            directions = torch.cat([directions, (rest / rest.norm())[None]])
    return directions @ rows
