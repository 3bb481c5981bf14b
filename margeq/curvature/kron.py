"""Kronecker-factored curvature of one weight, batched over its independent blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from margeq.curvature.addition import require_same, require_same_kind
from margeq.curvature.fourier import GroupCirculant
from margeq.curvature.io import Layout, stored
from margeq.linalg import psd_eigenvalues

__all__ = ["BlockKron"]


@dataclass(frozen=True)
class BlockKron:
    """``H_b = grad_cov[b] (x) input_cov[b] / n_shared``, both factors plain sums over data.

    Attributes:
        grad_cov: ``[b, o, o]``, summed over data, root columns and shared positions; ``[1, o, o]``
            for blocks that write one output together.
        input_cov: ``[b, i, i]``, summed over data and shared positions (reduce: of means).
        n_shared: sum over data of the number of shared positions (reduce: number of data).
        layout: order in which the parameter stores the axes o, b, i.
        resolution: machine epsilon of the dtype in which the products were formed.
        symmetry: what commutes with ``input_cov``, if anything is known to.

    Reference:
        Martens & Grosse 2015; Eschenhagen et al. 2023 (expand, reduce).
    """

    grad_cov: Tensor
    input_cov: Tensor
    n_shared: Tensor
    layout: Layout = "obi"
    resolution: float = 0.0
    symmetry: GroupCirculant | None = None

    def __add__(self, other: BlockKron) -> BlockKron:
        """Sums of two disjoint sets of data, at the same weights.

        Returns:
            The block of all data; ``resolution`` is that of the coarser part, and a symmetry is
            kept if both parts have it.

        Raises:
            ConfigError: for blocks of other shapes or another layout.
        """
        require_same_kind(self, other)
        if self.is_empty or other.is_empty:
            require_same("number of weights", self.numel, other.numel)
            return self if other.is_empty else other
        require_same("shape of grad_cov", self.grad_cov.shape, other.grad_cov.shape)
        require_same("shape of input_cov", self.input_cov.shape, other.input_cov.shape)
        require_same("layout", self.layout, other.layout)
        return replace(
            self,
            grad_cov=self.grad_cov + other.grad_cov,
            input_cov=self.input_cov + other.input_cov,
            n_shared=self.n_shared + other.n_shared,
            resolution=max(self.resolution, other.resolution),
            symmetry=self.symmetry if self.symmetry == other.symmetry else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums over data, by name."""
        return {name: getattr(self, name) for name in ("grad_cov", "input_cov", "n_shared")}

    @property
    def is_empty(self) -> bool:
        """Whether no datum has reached the weight; all sums are then zero, in any shape."""
        return not float(self.n_shared)

    @property
    def numel(self) -> int:
        """Number of parameters that the block covers."""
        blocks, inner, _ = self.input_cov.shape
        return blocks * self.grad_cov.shape[-1] * inner

    def log_eigenvalues(self, name: str = "weight") -> tuple[Tensor, int]:
        """Logarithms of the eigenvalues ``[o, b, i]`` (``-inf`` for zero) and the clamped count."""
        grad_values, grad_clamped = self.grad_eigenvalues(name)
        input_values, input_clamped = self.input_eigenvalues(name)
        return self.joined_logs(grad_values, input_values), grad_clamped + input_clamped

    def grad_eigenvalues(self, name: str = "weight") -> tuple[Tensor, int]:
        """Eigenvalues ``[b, o]`` of ``grad_cov`` and the clamped count."""
        return psd_eigenvalues(self.grad_cov, name, self.resolution)

    def input_eigenvalues(self, name: str = "weight") -> tuple[Tensor, int]:
        """Eigenvalues ``[b, i]`` of ``input_cov`` and the clamped count."""
        decompose = psd_eigenvalues if self.symmetry is None else self.symmetry.eigenvalues
        return decompose(self.input_cov, name, self.resolution)

    def joined_logs(self, grad_values: Tensor, input_values: Tensor) -> Tensor:
        """Logarithms ``[o, b, i]`` of the eigenvalues, from those of the factors."""
        logs = (
            _safe_log(grad_values).mT[:, :, None]
            + _safe_log(input_values)[None]
            - _safe_log(self.n_shared)
        )
        empty = self.n_shared <= 0
        return torch.where(empty, -torch.inf, logs)

    def to_dense(self) -> Tensor:
        """``[P, P]``, row-major in the parameter's own layout."""
        blocks, inner, _ = self.input_cov.shape
        out, grad_cov = self.grad_cov.shape[-1], self.grad_cov.expand(blocks, -1, -1)
        dense = self.grad_cov.new_zeros(out, blocks, inner, out, blocks, inner)
        scale = 1.0 / self.n_shared.clamp_min(1.0)
        for b in range(blocks):
            block = torch.einsum("op,ij->oipj", grad_cov[b], self.input_cov[b])
            dense[:, b, :, :, b, :] = block * scale
        return stored(dense, self.layout).reshape(self.numel, self.numel)


def _safe_log(values: Tensor) -> Tensor:
    """``log`` with a zero gradient, instead of NaN, where the value is zero."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).log(), -torch.inf)
