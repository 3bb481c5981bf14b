"""Real linear representations of finite groups and of Lie algebras, and how they combine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.groups.finite import FiniteGroup, as_matrices, require_group

__all__ = [
    "LieRepresentation",
    "Representation",
    "kron_sum",
    "regular",
    "rotations",
    "standard",
    "trivial",
]

_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class Representation:
    """A real representation of a finite group, one matrix per element.

        matrices[g h] = matrices[g] matrices[h]

    ``a + b`` is the direct sum, ``a * b`` the tensor product, ``3 * a`` three copies.

    Args:
        group: its elements index the matrices.
        matrices: ``[order, d, d]``, real.

    Raises:
        ConfigError: if the matrices are no representation of the group.

    Example:
        >>> from margeq.groups import S
        >>> items = standard(S(3))
        >>> (2 * items + items * items).dim
        15
    """

    group: FiniteGroup
    matrices: Tensor

    def __post_init__(self) -> None:
        require_group(self.group)
        matrices = as_matrices("Representation", self.matrices)
        object.__setattr__(self, "matrices", matrices)
        if len(matrices) != self.group.order:
            raise ConfigError(
                f"{len(matrices)} matrices for the {self.group.order} elements of {self.group!r}; "
                f"use one per element"
            )
        _require_homomorphism(self.group, matrices)

    @property
    def dim(self) -> int:
        """Dimension ``d`` of the vectors."""
        return self.matrices.shape[-1]

    @property
    def characters(self) -> Tensor:
        """Trace of each element's matrix ``[order]``."""
        return self.matrices.diagonal(dim1=-2, dim2=-1).sum(-1)

    @cached_property
    def permutation(self) -> Tensor | None:
        """Where each element moves each entry ``[order, d]``; None unless it only moves entries."""
        ones = self.matrices == 1.0
        is_one = bool((ones.sum(-2) == 1).all()) and bool(((self.matrices == 0.0) | ones).all())
        return ones.int().argmax(-2) if is_one else None

    def dual(self) -> Representation:
        """On linear functions of the vectors, ``rho(g^-1)^T``."""
        return Representation(self.group, self.matrices[self.group.inverse].mT)

    def __add__(self, other: Representation) -> Representation:
        if not isinstance(other, Representation):
            return NotImplemented
        self.require_same_group(other)
        return Representation(self.group, _direct_sum(self.matrices, other.matrices))

    def __mul__(self, other: Representation) -> Representation:
        if not isinstance(other, Representation):
            return NotImplemented
        self.require_same_group(other)
        return Representation(self.group, _kron(self.matrices, other.matrices))

    def __rmul__(self, copies: int) -> Representation:
        return Representation(self.group, _copies(self.matrices, copies))

    def __repr__(self) -> str:
        return f"Representation({self.group!r}, dim={self.dim})"

    def __deepcopy__(self, memo: object) -> Representation:
        return self  # immutable

    def require_same_group(self, other: Representation) -> None:
        """Refuse another group's representation.

        Raises:
            ConfigError: naming both groups.
        """
        if self.group != other.group:
            raise ConfigError(
                f"representations of two groups, {self.group!r} and {other.group!r}; use one"
            )


@dataclass(frozen=True, eq=False, repr=False)
class LieRepresentation:
    """A real representation of a Lie algebra, one matrix per generator.

    ``a + b`` is the direct sum, ``a * b`` the tensor product ``X (x) I + I (x) X``, ``3 * a`` three
    copies. Two representations belong together if they list the same generators in one order.

    Args:
        generators: ``[m, d, d]``, real; the group's elements are their exponentials.

    Raises:
        ConfigError: if they are no square matrices.

    Example:
        >>> vector = rotations(3)
        >>> (vector + vector * vector).dim
        12
    """

    generators: Tensor

    def __post_init__(self) -> None:
        generators = as_matrices("LieRepresentation", self.generators)
        object.__setattr__(self, "generators", generators)

    @property
    def dim(self) -> int:
        """Dimension ``d`` of the vectors."""
        return self.generators.shape[-1]

    def dual(self) -> LieRepresentation:
        """On linear functions of the vectors, ``-X^T``."""
        return LieRepresentation(-self.generators.mT)

    def __add__(self, other: LieRepresentation) -> LieRepresentation:
        if not isinstance(other, LieRepresentation):
            return NotImplemented
        self.require_same_algebra(other)
        return LieRepresentation(_direct_sum(self.generators, other.generators))

    def __mul__(self, other: LieRepresentation) -> LieRepresentation:
        if not isinstance(other, LieRepresentation):
            return NotImplemented
        self.require_same_algebra(other)
        return LieRepresentation(kron_sum(self.generators, other.generators))

    def __rmul__(self, copies: int) -> LieRepresentation:
        return LieRepresentation(_copies(self.generators, copies))

    def __repr__(self) -> str:
        return f"LieRepresentation(generators={len(self.generators)}, dim={self.dim})"

    def __deepcopy__(self, memo: object) -> LieRepresentation:
        return self  # immutable

    def require_same_algebra(self, other: LieRepresentation) -> None:
        """Refuse a representation with another number of generators.

        Raises:
            ConfigError: with both numbers.
        """
        own, others = len(self.generators), len(other.generators)
        if own != others:
            raise ConfigError(
                f"representations of algebras with {own} and {others} generators; list the same "
                f"generators in both"
            )


@overload
def trivial(of: FiniteGroup) -> Representation: ...
@overload
def trivial(of: LieRepresentation) -> LieRepresentation: ...
def trivial(of: FiniteGroup | LieRepresentation) -> Representation | LieRepresentation:
    """The one-dimensional representation that moves nothing, of a group or of an algebra."""
    if isinstance(of, LieRepresentation):
        return LieRepresentation(of.generators.new_zeros(len(of.generators), 1, 1))
    require_group(of, "of")
    return Representation(of, of.matrices.new_ones(of.order, 1, 1))


def regular(group: FiniteGroup) -> Representation:
    """Functions on the group, moved by ``(g f)(h) = f(g^-1 h)``; for ``C(n)``, cyclic shifts.

    Args:
        group: of an order up to some hundred, for the matrices take order^3 numbers.

    Returns:
        A representation by permutation matrices, of dimension ``order``.

    Raises:
        ConfigError: for something that is no group.

    Example:
        >>> from margeq.groups import C
        >>> regular(C(5)).matrices[1].int().tolist()[0]
        [0, 0, 0, 0, 1]
    """
    require_group(group)
    return Representation(group, _eye(group.order)[group.product].mT)


def standard(group: FiniteGroup) -> Representation:
    """The group's own matrices: permutations of things for ``S(n)``, of the plane for ``D(n)``."""
    require_group(group)
    return Representation(group, group.matrices)


def rotations(n: int) -> LieRepresentation:
    """Vectors of n-dimensional space under the rotations SO(n).

    Args:
        n: at least 2.

    Returns:
        One generator per pair of axes, ``n (n - 1) / 2``.

    Raises:
        ConfigError: for another number.
    """
    if not is_count(n, least=2):
        raise ConfigError(f"rotations({n!r}): use a whole number of at least 2")
    pairs = torch.combinations(torch.arange(n, device="cpu"))
    generators = torch.zeros(len(pairs), n, n, dtype=torch.float64, device="cpu")
    number = torch.arange(len(pairs), device="cpu")
    generators[number, pairs[:, 0], pairs[:, 1]] = -1.0
    generators[number, pairs[:, 1], pairs[:, 0]] = 1.0
    return LieRepresentation(generators)


def _require_homomorphism(group: FiniteGroup, matrices: Tensor) -> None:
    """Compare both sides on a random vector, which tells any two matrices apart."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.empty_like(matrices[0, 0]).normal_(generator=generator)
    images = matrices @ vector
    tolerance = _TOLERANCE * float(images.abs().max())
    wrong = [0] if float((images[0] - vector).abs().max()) > tolerance else []
    for g in group.generators:
        difference = images @ matrices[g].T - images[group.product[g]]
        wrong += [g] if float(difference.abs().max()) > tolerance else []
    if wrong:
        raise ConfigError(
            f"the matrices are no representation of {group!r}: products with element {wrong[0]} "
            f"differ from the matrix of the product"
        )


def _direct_sum(one: Tensor, other: Tensor) -> Tensor:
    above = torch.cat([one, one.new_zeros(len(one), one.shape[1], other.shape[1])], -1)
    below = torch.cat([one.new_zeros(len(one), other.shape[1], one.shape[1]), other], -1)
    return torch.cat([above, below], -2)


def _copies(matrices: Tensor, copies: object) -> Tensor:
    if not is_count(copies):
        raise ConfigError(f"{copies!r} copies of a representation: use a whole number above 0")
    return _kron(_eye(int(copies))[None], matrices)  # pyright: ignore[reportArgumentType]


def _kron(one: Tensor, other: Tensor) -> Tensor:
    product = torch.einsum("gac,gbd->gabcd", one.expand(len(other), -1, -1), other)
    return product.flatten(3, 4).flatten(1, 2)


def kron_sum(one: Tensor, other: Tensor) -> Tensor:
    """``X (x) I + I (x) Y`` of each pair, ``[m, a, a], [m, b, b] -> [m, a b, a b]``."""
    eye, other_eye = (_eye(t.shape[-1]).expand_as(t) for t in (one, other))
    return _kron(one, other_eye) + _kron(eye, other)


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64, device="cpu")
