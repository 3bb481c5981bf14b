"""Curvature sums of each output on its own, for outputs that count by weights of their own.

    H = sum_c w_c H_c,   H_c from column c of the root alone

Weights that follow a noise per output move with every hyperparameter step. For Kronecker factors
only ``grad_cov = sum_c w_c grad_cov_c`` depends on them, for second moments and the dense matrix
all of it; each is linear in the weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from margeq.curvature.addition import require_same, require_same_kind
from margeq.curvature.capture import Use
from margeq.curvature.eigen import BlockEigen
from margeq.curvature.forms import (
    BlockCurvature,
    BlockEigenvalues,
    Curvature,
    CurvatureSums,
    Eigenvalues,
)
from margeq.curvature.full import FullCurvature, FullEigenvalues
from margeq.curvature.kron import BlockKron
from margeq.errors import ConfigError
from margeq.linalg import accumulation_dtype, psd_eigh

__all__ = [
    "LARGEST_PER_OUTPUT",
    "OutputCurvature",
    "OutputEigenvalues",
    "OutputFullEigenvalues",
    "OutputSums",
]

LARGEST_PER_OUTPUT = 2**28
"""Most numbers that are kept for all outputs together: 2 GiB."""

_ALL = "all weights"


class _SeparableSums(CurvatureSums, Protocol):
    """Sums whose part from gradients can be taken out."""

    def take_gradients(self) -> dict[str, Tensor]:
        """What columns have contributed since the last call, by weight; it is zero again then."""
        ...


class OutputSums:
    """Running sums of one pass, with those of gradients kept for each output.

    Args:
        inner: sums over all outputs.
    """

    def __init__(self, inner: _SeparableSums) -> None:
        self._inner = inner
        self._parts: dict[str, Tensor] = {}
        self._output, self._n_outputs = 0, 0

    def at_output(self, output: int, n_outputs: int) -> None:
        """Say which of the outputs the gradients to come belong to."""
        self._output, self._n_outputs = output, n_outputs

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Add what one batch's inputs contribute, the same for all outputs."""
        self._inner.add_inputs(uses, inputs, keys)

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add what one column of the root contributes to the present output."""
        self._inner.add_gradients(uses, grads)
        for name, part in self._inner.take_gradients().items():
            if name not in self._parts:
                self._parts[name] = self._zeros_like(name, part)
            self._parts[name][self._output] += part

    def add_drawn(
        self, uses: Sequence[Use], grads: Sequence[Tensor | None], which: Tensor, n_outputs: int
    ) -> None:
        """Add a column in which each datum stands for one output.

        Args:
            uses: recorded calls, whose inputs were added before.
            grads: the gradient of each call's output, ``None`` where it does not matter.
            which: the output of each datum, ``[n]``.
            n_outputs: number of outputs.
        """
        order, end = which.argsort(stable=True), 0
        uses = [replace(use, x=use.x[order]) for use in uses]
        grads = [None if grad is None else grad[order] for grad in grads]
        for output, count in enumerate(which.bincount(minlength=n_outputs).tolist()):
            if count:
                data = slice(end, end + count)
                end += count
                self.at_output(output, n_outputs)
                self.add_gradients(
                    [replace(use, x=use.x[data]) for use in uses],
                    [None if grad is None else grad[data] for grad in grads],
                )

    def _zeros_like(self, name: str, part: Tensor) -> Tensor:
        total = sum(found.numel() for found in self._parts.values())
        total += self._n_outputs * part.numel()
        if total > LARGEST_PER_OUTPUT:
            raise ConfigError(
                f"noise='per-output' keeps curvature for each of {self._n_outputs} outputs: "
                f"{total:,} numbers up to {name!r}, more than {LARGEST_PER_OUTPUT:,}; use "
                f"noise='shared' with targets scaled to unit noise, or integrate out fewer weights "
                f"with parameters=[...]"
            )
        dtype = accumulation_dtype(part.device)
        return torch.zeros(self._n_outputs, *part.shape, dtype=dtype, device=part.device)

    def forget_gradients(self) -> None:
        """Begin anew with what columns contribute."""
        self._inner.forget_gradients()
        self._parts = {}

    def finish(self, checksum: int) -> OutputCurvature:
        """The sums, for data of this checksum."""
        return OutputCurvature(self._inner.finish(checksum), self._parts)


@dataclass(frozen=True)
class OutputCurvature(Curvature):
    """Sums over the data, with those of gradients for each output.

    Attributes:
        base: the sums, with zero gradients.
        parts: weight -> sums of gradients per output, ``[K, ...]``; none for weights that no
            gradient has reached.
    """

    base: Curvature
    parts: Mapping[str, Tensor]

    @property
    def n_outputs(self) -> int:
        """Number of outputs; 0 without data."""
        return len(next(iter(self.parts.values()), ()))

    def __add__(self, other: Curvature) -> OutputCurvature:
        """Sums of two disjoint sets of data, at the same weights.

        Returns:
            The curvature of all data.

        Raises:
            ConfigError: for another kind of curvature, other weights, shapes or outputs.
        """
        require_same_kind(self, other)
        assert isinstance(other, OutputCurvature)
        parts = {**other.parts, **self.parts}
        for name in self.parts.keys() & other.parts.keys():
            one, two = self.parts[name], other.parts[name]
            require_same(f"shape per output of {name!r}", one.shape, two.shape)
            parts[name] = one + two
        # sums without gradients may not know how weights are stored
        first, second = (self, other) if len(self.parts) >= len(other.parts) else (other, self)
        return OutputCurvature(first.base + second.base, parts)

    def weighted(self, weights: Tensor) -> Curvature:
        """``sum_c w_c H_c``, differentiable in the weights ``[K]``."""
        base = self.base
        if isinstance(base, FullCurvature):
            return replace(base, matrix=_mixed(self.parts.get(_ALL), weights, base.matrix))
        assert isinstance(base, BlockCurvature)
        blocks: dict[str, Any] = dict(base.blocks)
        for name, part in self.parts.items():
            field = "grad_cov" if isinstance(blocks[name], BlockKron) else "moments"
            blocks[name] = replace(blocks[name], **{field: _mixed(part, weights, part[0])})
        return BlockCurvature(blocks)

    def decompose(self) -> Eigenvalues:
        """What eigenvalues at any weights need, with the rounding noise of each output removed.

        Returns:
            Input factors as eigenvalues, gradient factors as matrices per output.

        Raises:
            NonFiniteError: if the curvature is NaN or infinite.
            NotPSDError: if a decomposition fails for good.
        """
        if isinstance(self.base, FullCurvature):
            return self._decompose_full(self.base)
        assert isinstance(self.base, BlockCurvature)
        fixed: dict[str, Tensor] = {}
        grads, inputs, moments = {}, {}, {}
        clamped = 0
        for name, block in self.base.blocks.items():
            part = self.parts.get(name)
            if part is None or (isinstance(block, BlockKron) and block.is_empty):
                logs, repaired = block.log_eigenvalues(name)
                fixed[name] = logs.flatten()
            elif isinstance(block, BlockKron):
                values, repaired = block.input_eigenvalues(name)
                inputs[name] = block.joined_logs(torch.ones_like(part[0, :, :1, 0]), values)[0]
                grads[name], noisy = _without_noise(part, name, block.resolution)
                repaired += noisy
            else:
                assert isinstance(block, BlockEigen)
                _, repaired = replace(block, moments=part).log_eigenvalues(name)
                moments[name] = part
            clamped += repaired
        return OutputEigenvalues(fixed, inputs, grads, moments, list(self.base.blocks), clamped)

    def _decompose_full(self, base: FullCurvature) -> OutputFullEigenvalues:
        factors, clamped = [], 0
        for part in self.parts.get(_ALL, base.matrix[None]):
            found = replace(base, matrix=part).decompose()
            factors.append(found.factor)
            clamped += found.clamped
        return OutputFullEigenvalues(factors, dict(base.sizes), clamped)


def _mixed(part: Tensor | None, weights: Tensor, like: Tensor) -> Tensor:
    if part is None:
        return like
    if len(part) != len(weights):
        raise ConfigError(
            f"the curvature is that of {len(part)} outputs, the noise that of {len(weights)}"
        )
    return torch.tensordot(weights.to(part), part, 1)


def _without_noise(part: Tensor, name: str, resolution: float) -> tuple[Tensor, int]:
    """Gradient covariances, each without eigenvalues that are rounding noise of its own.

    In their weighted sum the noise of an output in small units would pass for another output's
    curvature. Sums of float64 gradients have none to speak of.

    Returns:
        The covariances, and the number of clearly negative eigenvalues.
    """
    values, vectors, clamped = psd_eigh(part, name, resolution)
    if resolution <= torch.finfo(torch.float64).eps:
        return part, clamped
    return (vectors * values[..., None, :]) @ vectors.mT, clamped


class _AtAnyWeights(Eigenvalues):
    """Eigenvalues at any weights of the outputs; by themselves those of equal weights."""

    @abstractmethod
    def _equal(self) -> Eigenvalues:
        """Those of equal weights."""

    def log_determinant(self, log_precisions: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """As that of equal weights."""
        return self._equal().log_determinant(log_precisions, log_scale)

    def effective(
        self, log_precisions: Mapping[str, Tensor], log_scale: Tensor
    ) -> dict[str, Tensor]:
        """As that of equal weights."""
        return self._equal().effective(log_precisions, log_scale)


@dataclass(frozen=True)
class OutputEigenvalues(_AtAnyWeights):
    """Eigenvalues of independent blocks at any weights of the outputs.

    Attributes:
        fixed: logarithms of the eigenvalues of weights that no output reaches.
        inputs: logarithms of input eigenvalues over the number of positions, ``[b, i]``.
        grads: gradient covariances per output, ``[K, b, o, o]``.
        moments: second moments per output, ``[K, b, o, i]``.
        names: of all weights, in their order.
        clamped: as in :class:`margeq.curvature.forms.Eigenvalues`.
    """

    fixed: dict[str, Tensor]
    inputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    moments: dict[str, Tensor]
    names: Sequence[str]
    clamped: int

    def weighted(self, weights: Tensor) -> BlockEigenvalues:
        """Eigenvalues of ``sum_c w_c H_c``, differentiable in the weights ``[K]``."""
        logs = {name: self._logs(name, weights) for name in self.names}
        return BlockEigenvalues(logs, self.clamped)

    def _logs(self, name: str, weights: Tensor) -> Tensor:
        if name in self.fixed:
            return self.fixed[name]
        if name in self.moments:
            return _log(_mixed(self.moments[name], weights, weights)).flatten()
        mixed = _mixed(self.grads[name], weights, weights)
        ones = mixed.new_ones(1, 1, 1)
        block = BlockKron(mixed, ones, ones.sum(), resolution=torch.finfo(mixed.dtype).eps)
        values, _ = block.grad_eigenvalues(name)
        return (_log(values).mT[:, :, None] + self.inputs[name][None]).flatten()

    def _equal(self) -> BlockEigenvalues:
        some = next(iter({**self.grads, **self.moments}.values()), torch.ones(0))
        return self.weighted(torch.ones(len(some), dtype=torch.float64, device=some.device))


@dataclass(frozen=True)
class OutputFullEigenvalues(_AtAnyWeights):
    """The dense curvature as ``sum_c w_c L_c L_c^T``.

    Attributes:
        factors: ``L_c [P, r_c]`` per output.
        sizes: as in :class:`margeq.curvature.full.FullCurvature`.
        clamped: as in :class:`margeq.curvature.forms.Eigenvalues`.
    """

    factors: Sequence[Tensor]
    sizes: Mapping[str, int]
    clamped: int

    def weighted(self, weights: Tensor) -> FullEigenvalues:
        """``L`` with ``L L^T = sum_c w_c L_c L_c^T``, differentiable in the weights ``[K]``."""
        if len(self.factors) != len(weights):
            raise ConfigError(
                f"the curvature is that of {len(self.factors)} outputs, the noise that of "
                f"{len(weights)}"
            )
        halves = weights.to(self.factors[0]).sqrt()
        scaled = [half * factor for half, factor in zip(halves, self.factors, strict=True)]
        return FullEigenvalues(torch.cat(scaled, 1), self.sizes, self.clamped)

    def _equal(self) -> FullEigenvalues:
        first = self.factors[0]
        return self.weighted(first.new_ones(len(self.factors)))


def _log(values: Tensor) -> Tensor:
    """``log`` with a zero gradient where the value is zero."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).log(), -torch.inf)
