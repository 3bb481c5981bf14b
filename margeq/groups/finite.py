"""Finite groups as multiplication tables: elements are the integers 0 .. order - 1, 0 is e."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["FiniteGroup", "S", "as_matrices", "require_group"]

_LARGEST_SYMMETRIC = 6
"""S(7) has a table of 25 million products."""


@dataclass(frozen=True, eq=False)
class FiniteGroup:
    """A finite group, given by a faithful representation.

        product[g, h] = g h,   inverse[g] = g^-1,   matrices[g h] = matrices[g] matrices[h]

    Two groups are equal if their elements have the same matrices in the same order.

    Attributes:
        name: for messages and ``repr``.
        matrices: one real matrix per element ``[order, d, d]``, the identity first; for groups of
            the plane, how the element moves a point ``(x, y)``.
        product: index of the product of two elements ``[order, order]``.
        inverse: index of the inverse of each element ``[order]``.
        generators: indices of elements whose products are the whole group.

    Raises:
        ConfigError: if the matrices are no faithful representation of a group.

    Example:
        >>> from margeq.groups import P4
        >>> P4.order, P4.compose(1, 3), P4.inverse.tolist()
        (4, 0, [0, 3, 2, 1])
    """

    name: str
    matrices: Tensor
    product: Tensor = field(init=False, repr=False)
    inverse: Tensor = field(init=False, repr=False)
    generators: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        matrices = as_matrices(str(self.name), self.matrices)
        with torch.device("cpu"):  # tables are there, whatever the default device
            product = _product_table(self.name, matrices)
            object.__setattr__(self, "matrices", matrices)
            object.__setattr__(self, "product", product)
            object.__setattr__(self, "inverse", (product == 0).int().argmax(1))
            object.__setattr__(self, "generators", _generators(product))

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.matrices)

    def compose(self, g: int, h: int) -> int:
        """Index of the product ``g h``."""
        return int(self.product[g, h])

    @property
    def relative(self) -> Tensor:
        """``relative[h, g] = h^-1 g``, the element that leads from h to g ``[order, order]``."""
        return self.product[self.inverse]

    def elements_of(self, subgroup: FiniteGroup) -> tuple[int, ...]:
        """Indices, in this group, of the elements of a subgroup in the subgroup's own order.

        Args:
            subgroup: a group whose matrices are among this group's.

        Returns:
            ``subgroup.order`` indices; the first is 0.

        Raises:
            ConfigError: if it is no subgroup.

        Example:
            >>> from margeq.groups import C, P4, P4M
            >>> P4.elements_of(C(2)), P4M.elements_of(P4)
            ((0, 2), (0, 1, 2, 3))
        """
        require_group(subgroup, "subgroup")
        found = []
        for matrix in subgroup.matrices:
            same = (
                [i for i, own in enumerate(self.matrices) if _same(own, matrix)]
                if matrix.shape == self.matrices.shape[1:]
                else []
            )
            if not same:
                raise ConfigError(f"{subgroup.name} is no subgroup of {self.name}")
            found.append(same[0])
        return tuple(found)

    def has_subgroup(self, subgroup: FiniteGroup) -> bool:
        """Whether every element of another group is one of this group."""
        require_group(subgroup, "subgroup")
        try:
            self.elements_of(subgroup)
        except ConfigError:
            return False
        return True

    def cosets(self, subgroup: FiniteGroup) -> Tensor:
        """Right cosets ``K r``: ``cosets[c, k] = k r_c``, each element of the group once.

        Args:
            subgroup: a subgroup ``K``.

        Returns:
            ``[order / |K|, |K|]``; column 0 holds the representatives ``r_c``, the first is e.

        Raises:
            ConfigError: if it is no subgroup.
        """
        elements = list(self.elements_of(subgroup))
        rows: list[Tensor] = []
        seen: set[int] = set()
        for representative in range(self.order):
            if representative not in seen:
                rows.append(self.product[elements, representative])
                seen.update(rows[-1].tolist())
        return torch.stack(rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FiniteGroup):
            return NotImplemented
        if self.matrices.shape != other.matrices.shape:
            return False
        return _same(self.matrices, other.matrices)

    def __hash__(self) -> int:
        return hash((tuple(self.matrices.shape), self.order))

    def __repr__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: object) -> FiniteGroup:
        return self  # immutable


def S(n: int) -> FiniteGroup:
    """All permutations of ``n`` things, by their permutation matrices.

    Args:
        n: from 1 to 6.

    Returns:
        The symmetric group, with ``n!`` elements.

    Raises:
        ConfigError: for another number.

    Example:
        >>> S(3).order
        6
    """
    if not is_count(n) or n > _LARGEST_SYMMETRIC:
        raise ConfigError(f"S({n!r}): use a whole number from 1 to {_LARGEST_SYMMETRIC}")
    return _symmetric(int(n))


@cache
def _symmetric(n: int) -> FiniteGroup:
    eye = torch.eye(n, dtype=torch.float64, device="cpu")
    # the matrix of p moves thing i to place p[i]
    moves = torch.stack([eye[:, list(inverse)] for inverse in permutations(range(n))])
    return FiniteGroup(f"S({n})", moves)


def require_group(group: object, name: str = "group") -> None:
    """Refuse what is no group.

    Args:
        group: an argument.
        name: what it is called.

    Raises:
        ConfigError: with an example of one.
    """
    if not isinstance(group, FiniteGroup):
        raise ConfigError(f"{name}={group!r:.80}: use a FiniteGroup such as margeq.groups.P4")


def as_matrices(name: str, matrices: Any) -> Tensor:
    """Square real matrices in double precision, on the CPU.

    Args:
        name: what they belong to, for messages.
        matrices: an argument.

    Returns:
        A copy ``[count, d, d]``.

    Raises:
        ConfigError: for anything else, and for entries that are not finite.
    """
    if not isinstance(matrices, Tensor) or matrices.is_complex():
        raise ConfigError(f"{name}: matrices must be a real tensor, got {matrices!r:.80}")
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or not matrices.numel():
        raise ConfigError(f"{name}: matrices {tuple(matrices.shape)} must be [count, d, d]")
    values = matrices.detach().to("cpu", torch.float64, copy=True).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"{name}: matrices have entries that are not finite")
    return values


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-9)


def _product_table(name: str, matrices: Tensor) -> Tensor:
    """The index of each product, found through a random functional that tells elements apart."""
    if not _same(matrices[0], torch.eye(matrices.shape[1], dtype=matrices.dtype)):
        raise ConfigError(f"{name}: the first matrix must be the identity")
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, matrices.shape[1], generator=generator, dtype=matrices.dtype)
    from_left, from_right = left @ matrices, matrices @ right
    values = matrices @ right @ left
    order = values.argsort()
    products = from_left @ from_right.mT
    sorted_values = values[order].contiguous()
    if len(values) > 1 and float(sorted_values.diff().min()) < 1e-9:
        raise ConfigError(f"{name}: two elements have the same matrix; use a faithful one")
    place = torch.searchsorted(sorted_values, products - 1e-9).clamp_max(len(values) - 1)
    table = order[place]
    if float((values[table] - products).abs().max()) > 1e-8:
        raise ConfigError(f"{name}: the product of two matrices is not among the matrices")
    return table


def _generators(product: Tensor) -> tuple[int, ...]:
    """A short list of elements that generate the group, the greedy choice."""
    chosen: list[int] = []
    reached = {0}
    while len(reached) < len(product):
        chosen.append(min(set(range(len(product))) - reached))
        reached = _closure(product, chosen)
    return tuple(chosen)


def _closure(product: Tensor, elements: Iterable[int]) -> set[int]:
    generators = torch.tensor(list(elements))
    reached = torch.zeros(len(product), dtype=torch.bool)
    reached[0] = True
    count = 0
    while count < int(reached.sum()):
        count = int(reached.sum())
        reached[product[reached.nonzero().flatten()][:, generators].flatten()] = True
    return set(reached.nonzero().flatten().tolist())
