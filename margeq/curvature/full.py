"""The dense GGN of all weights together, for small models.

H = sum_(n,v) g_nv g_nv^T,   rows in the order of the weights, each row-major in its own layout
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from margeq.curvature.addition import require_same, require_same_kind
from margeq.curvature.capture import Use
from margeq.curvature.forms import Curvature, Eigenvalues
from margeq.curvature.per_datum import CallReader, gradient
from margeq.errors import ConfigError
from margeq.linalg import accumulation_dtype, log_det_one_plus, psd_eigh, whitened

__all__ = ["LARGEST_FULL", "FullCurvature", "FullEigenvalues", "FullSums", "require_small"]

LARGEST_FULL = 10_000
"""Most weights that a dense curvature is formed for: 0.8 GB, and minutes for its eigenvalues."""


def require_small(weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse a dense curvature of too many weights.

    Raises:
        ConfigError: with the number of weights, and the ways out.
    """
    total = sum(weight.numel() for weight in weights.values())
    if total > LARGEST_FULL:
        raise ConfigError(
            f"curvature='full' forms a dense matrix of {total:,} weights, more than "
            f"{LARGEST_FULL:,}; use curvature='ekfac', a bound on the same evidence, or name fewer "
            f"weights with parameters=[...]"
        )


@dataclass(frozen=True)
class FullCurvature(Curvature):
    """GGN of all weights, a plain sum over data.

    Attributes:
        matrix: ``[P, P]`` over all weights.
        sizes: weight name -> number of its rows, in their order.
    """

    matrix: Tensor
    sizes: Mapping[str, int]

    def __add__(self, other: Curvature) -> FullCurvature:
        """Sums of two disjoint sets of data, at the same weights.

        Returns:
            The matrix of all data.

        Raises:
            ConfigError: for another kind of curvature, or other weights.
        """
        require_same_kind(self, other)
        assert isinstance(other, FullCurvature)
        require_same("list of weights", list(self.sizes.items()), list(other.sizes.items()))
        return replace(self, matrix=self.matrix + other.matrix)

    def decompose(self) -> FullEigenvalues:
        """A factor ``H = L L^T`` without the rounding noise of a deficient rank.

        Returns:
            ``L [P, r]`` from one eigenvalue decomposition.

        Raises:
            NonFiniteError: if the matrix is NaN or infinite.
            NotPSDError: if the decomposition fails for good.
        """
        resolution = torch.finfo(self.matrix.dtype).eps
        values, vectors, clamped = psd_eigh(self.matrix, "all weights", resolution)
        kept = values > 0
        return FullEigenvalues(vectors[:, kept] * values[kept].sqrt(), self.sizes, clamped)


@dataclass(frozen=True)
class FullEigenvalues(Eigenvalues):
    """The dense curvature as ``H = L L^T``; each choice of precisions takes one factorisation.

    Attributes:
        factor: ``L [P, r]``.
        sizes: as in :class:`FullCurvature`.
        clamped: as in :class:`margeq.curvature.forms.Eigenvalues`.
    """

    factor: Tensor
    sizes: Mapping[str, int]
    clamped: int

    def log_determinant(self, log_precisions: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """``log det(I_r + kappa L^T Delta^-1 L)``."""
        return log_det_one_plus(self._scaled(log_precisions, log_scale))

    def effective(
        self, log_precisions: Mapping[str, Tensor], log_scale: Tensor
    ) -> dict[str, Tensor]:
        """``sum diag(M (I + M)^-1)`` per tensor, with ``M = kappa Delta^-1/2 H Delta^-1/2``."""
        rows = whitened(self._scaled(log_precisions, log_scale)).square().sum(1)
        parts = rows.split(list(self.sizes.values()))
        return {name: part.sum() for name, part in zip(self.sizes, parts, strict=True)}

    def _scaled(self, log_precisions: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """``(kappa / Delta)^1/2 L``."""
        halves = [0.5 * (log_scale - log_precisions[name]) for name in self.sizes]
        parts = self.factor.split(list(self.sizes.values()))
        return torch.cat([half.exp() * part for half, part in zip(halves, parts, strict=True)])


class FullSums:
    """The dense GGN as a plain sum over the columns that are added.

    Args:
        weights: the weights to integrate out.

    Raises:
        ConfigError: for too many weights.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        require_small(weights)
        self._calls = CallReader()
        self._sizes = {name: weight.numel() for name, weight in weights.items()}
        device = next(iter(weights.values())).device
        size = sum(self._sizes.values())
        self._matrix = torch.zeros(size, size, dtype=accumulation_dtype(device), device=device)

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Nothing to add: the matrix needs gradients."""

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add the outer products of all gradients of one column of the root.

        Args:
            uses: recorded calls.
            grads: the gradient of each call's output, ``None`` where it does not matter.
        """
        calls = self._calls.read(uses, grads)
        if not calls:
            return
        n_data = len(uses[0].x)
        rows = self._matrix.new_zeros(n_data, len(self._matrix))
        for name, part in zip(self._sizes, rows.split(list(self._sizes.values()), 1), strict=True):
            if name in calls:
                found = gradient(calls[name], slice(None))
                in_order = torch.einsum(f"nboi->n{self._calls.layouts[name]}", found)
                part.copy_(in_order.flatten(1))
        self._matrix.addmm_(rows.mT, rows)

    def take_gradients(self) -> dict[str, Tensor]:
        """The matrix so far, of all weights together; that to come is summed anew."""
        taken, self._matrix = self._matrix, torch.zeros_like(self._matrix)
        return {"all weights": taken}

    def forget_gradients(self) -> None:
        """Begin anew."""
        self._matrix.zero_()

    def finish(self, checksum: int) -> FullCurvature:
        """The matrix."""
        return FullCurvature(self._matrix, self._sizes)
