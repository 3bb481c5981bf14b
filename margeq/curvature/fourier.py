"""Factors that commute with a group: in its Fourier basis they are block-diagonal, and cheaper.

A group H that moves no index to itself makes a covariance one circulant matrix on the group,

    A[h r, k s] = A_0[h^-1 k][r, s]  ~  sum_rho (sum_u A_0[u] (x) rho(u)) (x) I_d,

one block per irreducible representation ``rho``, whose eigenvalues appear d times, d the dimension
of ``rho``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from margeq.groups import FiniteGroup, irreps
from margeq.linalg import psd_block_eigenvalues

__all__ = ["GroupCirculant", "harmonics"]


@dataclass(frozen=True, eq=False)
class GroupCirculant:
    """The symmetry ``A[h l, h m] = A[l, m]`` of covariances, for an action without fixed points.

    Attributes:
        group: what acts.
        orbits: ``[h, r]``, the index to which h moves the r-th representative, within each of the
            channels; every index once.
    """

    group: FiniteGroup
    orbits: Tensor

    @classmethod
    def of(cls, group: FiniteGroup, moves: Tensor) -> GroupCirculant | None:
        """The symmetry under an action, if that moves every index to different places.

        Args:
            group: what acts.
            moves: ``[h, l]``, the index to which h moves l.

        Returns:
            ``None`` if two elements move some index to the same place.
        """
        length = moves.shape[1]
        first = (moves.amin(0) == torch.arange(length, device=moves.device)).nonzero().flatten()
        # an orbit has at most as many indices as the group has elements
        return cls(group, moves[:, first]) if len(first) * group.order == length else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        group = self.group
        return {"name": group.name, "matrices": group.matrices, "orbits": self.orbits}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> GroupCirculant:
        """The symmetry of a state, on a device."""
        group = FiniteGroup(state["name"], state["matrices"])
        return cls(group, state["orbits"].to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GroupCirculant):
            return NotImplemented
        return self.group == other.group and torch.equal(self.orbits, other.orbits)

    def eigenvalues(self, cov: Tensor, name: str, resolution: float = 0.0) -> tuple[Tensor, int]:
        """As :func:`margeq.linalg.psd_eigenvalues`, from one block per representation.

        Their gradients are right for changes of the covariance that keep the symmetry.

        Args:
            cov: ``[b, i, i]`` with the symmetry, ``i`` over channels and indices.
            name: what it belongs to, for messages.
            resolution: relative size of the noise floor.

        Returns:
            Eigenvalues ``[b, i]`` in any order, and the number of clamped ones.

        Raises:
            NonFiniteError: if an entry is NaN or infinite.
            NotPSDError: if the decomposition of a block fails for good.
        """
        values = self._first_rows(cov)
        blocks = ((_transformed(values, rho), times) for rho, times in harmonics(self.group))
        return psd_block_eigenvalues(blocks, name, resolution)

    def _first_rows(self, cov: Tensor) -> Tensor:
        """``A_0 [b, r, u, s]``: the rows of the representatives say everything."""
        length = self.orbits.numel()
        channels = torch.arange(cov.shape[-1] // length, device=cov.device)
        order = (channels[:, None] * length + self.orbits[:, None]).flatten(1)  # [h, (c r)]
        rows = cov.index_select(1, order[0])
        return rows.index_select(2, order.flatten()).unflatten(2, order.shape)


def harmonics(group: FiniteGroup) -> tuple[tuple[Tensor, int], ...]:
    """Representations whose blocks have all eigenvalues of real group-circulant matrices.

    Returns:
        Pairs of matrices ``[order, d, d]`` and how often the eigenvalues of their block appear:
        real matrices where that is possible; one of each pair of complex conjugate ones, for both.
    """
    with torch.device("cpu"):  # whatever the default: they are kept
        return _harmonics(group)


@cache
def _harmonics(group: FiniteGroup) -> tuple[tuple[Tensor, int], ...]:
    found: list[tuple[Tensor, int]] = []
    for rho in irreps(group):
        character = _character(rho)
        indicator = float(character[group.product.diagonal()].mean().real)  # of Frobenius and Schur
        if indicator > 0.5:
            found.append((_real_form(rho), rho.shape[-1]))
        elif indicator < -0.5:
            found.append((rho, rho.shape[-1]))
        elif not any(_overlap(character, _character(kept).conj()) > 0.5 for kept, _ in found):
            found.append((rho, 2 * rho.shape[-1]))
    return tuple(found)


def _transformed(values: Tensor, rho: Tensor) -> Tensor:
    """``sum_u A_0[u] (x) rho(u)``, ``[b, (r i), (s j)]``."""

    def product(matrices: Tensor) -> Tensor:
        return torch.einsum("brus,uij->brisj", values, matrices.to(values)).flatten(3).flatten(1, 2)

    return torch.complex(product(rho.real), product(rho.imag)) if rho.is_complex() else product(rho)


def _character(rho: Tensor) -> Tensor:
    return rho.diagonal(dim1=1, dim2=2).sum(-1)


def _overlap(one: Tensor, other: Tensor) -> float:
    return float((one.conj() * other).mean().abs())


def _real_form(rho: Tensor) -> Tensor:
    """Equivalent real matrices of a representation that has some."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *rho.shape[1:], generator=generator, dtype=rho.dtype)
    # rho(g) S = S rho(g)*, so the vectors v = S v* are moved to vectors of the same kind
    structure = (rho @ (first + first.mT) @ rho.mT).mean(0)
    structure = structure / torch.linalg.matrix_norm(structure, 2)
    vectors = second + structure @ second.conj()
    lower = torch.linalg.cholesky((vectors.mH @ vectors).real)
    basis = torch.linalg.solve_triangular(lower.to(rho.dtype), vectors.mT, upper=False).mT
    return (basis.mH @ rho @ basis).real
