"""What a curvature pass sums up, and what the evidence needs to know of it.

A pass fills a :class:`CurvatureSums`; its sums are a :class:`Curvature`, one block per weight
tensor or one matrix for all of them; decomposing it gives :class:`Eigenvalues`, on which any number
of hyperparameter steps are cheap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from margeq.curvature.addition import require_same, require_same_kind
from margeq.curvature.capture import Use
from margeq.errors import ConfigError
from margeq.linalg import log1p_ratio

__all__ = [
    "Block",
    "BlockCurvature",
    "BlockEigenvalues",
    "Curvature",
    "CurvatureSums",
    "Eigenvalues",
    "without_zeros",
]


class CurvatureSums(Protocol):
    """Running sums of one pass over the data."""

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Add what one batch's inputs contribute, before or without its gradients."""
        ...

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add what one column of the root contributes."""
        ...

    def forget_gradients(self) -> None:
        """Begin anew with what columns contribute; inputs stay."""
        ...

    def finish(self, checksum: int) -> Curvature:
        """The sums, for data of this checksum."""
        ...


class Curvature(ABC):
    """Un-normalised sums over the data, free of prior, noise and temperature."""

    @abstractmethod
    def __add__(self, other: Curvature) -> Curvature:
        """Sums of two disjoint sets of data, at the same weights."""

    @abstractmethod
    def decompose(self) -> Eigenvalues:
        """Eigenvalues of the sums."""


class Eigenvalues(ABC):
    """Eigenvalues of a curvature ``H``, for any precisions ``delta`` and scale ``kappa``.

    Attributes:
        clamped: number of clearly negative eigenvalues that were set to zero.
    """

    clamped: int

    def state_dict(self) -> dict[str, Any]:
        """Fields by name, plain values and tensors: what the class is built from again."""
        return dict(vars(self))

    @abstractmethod
    def log_determinant(self, log_precisions: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """``log det(I + kappa Delta^-1/2 H Delta^-1/2)``, differentiable in both arguments.

        Args:
            log_precisions: ``log delta`` of each weight tensor.
            log_scale: ``log kappa``.
        """

    @abstractmethod
    def effective(
        self, log_precisions: Mapping[str, Tensor], log_scale: Tensor
    ) -> dict[str, Tensor]:
        """Trace of each weight tensor's block of ``kappa H (kappa H + Delta)^-1``."""


class Block(Protocol):
    """Curvature of one weight tensor, independent of all others."""

    def __add__(self, other: Any, /) -> Block:
        """Sums of two disjoint sets of data, at the same weights."""
        ...

    def log_eigenvalues(self, name: str = "weight") -> tuple[Tensor, int]:
        """Logarithms of all eigenvalues, ``-inf`` for zero, and the clamped count."""
        ...


@dataclass(frozen=True)
class BlockCurvature(Curvature):
    """One independent block per weight tensor.

    Attributes:
        blocks: weight tensor -> its curvature.
    """

    blocks: Mapping[str, Block]

    def __add__(self, other: Curvature) -> BlockCurvature:
        """Sums of two disjoint sets of data, at the same weights.

        Returns:
            The blocks of all data.

        Raises:
            ConfigError: for another kind of curvature, other weights, or a block that differs in
                shape, layout or basis, naming its weight.
        """
        require_same_kind(self, other)
        assert isinstance(other, BlockCurvature)
        require_same("list of weights", sorted(self.blocks), sorted(other.blocks))
        blocks = {}
        for name, block in self.blocks.items():
            try:
                blocks[name] = block + other.blocks[name]
            except ConfigError as error:
                raise ConfigError(f"weight {name!r}: {error}") from error
        return BlockCurvature(blocks)

    def decompose(self) -> BlockEigenvalues:
        """Eigenvalues of every block."""
        logs, clamped = {}, 0
        for name, block in self.blocks.items():
            values, repaired = block.log_eigenvalues(name)
            logs[name] = without_zeros(values)
            clamped += repaired
        return BlockEigenvalues(logs, clamped)


def without_zeros(logs: Tensor) -> Tensor:
    """The logarithms above ``-inf``, flat: a zero adds nothing at any precision.

    Where there are fewer data than weights, nearly all eigenvalues are zero.

    Returns:
        One axis; NaN stays.
    """
    return logs[logs != -math.inf]


@dataclass(frozen=True)
class BlockEigenvalues(Eigenvalues):
    """Eigenvalues of independent blocks.

    Attributes:
        logs: logarithms per weight tensor, of those that are not zero.
        clamped: as in :class:`Eigenvalues`.
    """

    logs: dict[str, Tensor]
    clamped: int

    def log_determinant(self, log_precisions: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """``sum log(1 + kappa lambda / delta)``."""
        total = torch.zeros_like(log_scale)
        for name, logs in self.logs.items():
            total = total + log1p_ratio(logs + log_scale, log_precisions[name]).sum()
        return total

    def effective(
        self, log_precisions: Mapping[str, Tensor], log_scale: Tensor
    ) -> dict[str, Tensor]:
        """``sum kappa lambda / (kappa lambda + delta)`` per weight tensor."""
        return {
            name: torch.sigmoid(logs + log_scale - log_precisions[name]).sum()
            for name, logs in self.logs.items()
        }
