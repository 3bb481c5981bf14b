"""Curvature of one weight with its eigenvectors: powers of it, as products with rows.

    H_b = U_b diag(d_b) U_b^T,   U_b = U_B[b] (x) U_A[b]

What eigenvalues alone cannot give: predictions and samples of a posterior.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from margeq.curvature.eigen import BlockEigen
from margeq.curvature.forms import BlockCurvature, Curvature
from margeq.curvature.io import Layout
from margeq.curvature.kron import BlockKron
from margeq.errors import ConfigError
from margeq.linalg import psd_eigh

__all__ = ["SpectralBlock", "spectral_blocks"]


@dataclass(frozen=True)
class SpectralBlock:
    """``U diag(d) U^T`` of one weight tensor, batched over its independent blocks.

    Attributes:
        values: ``d [b, o, i]``.
        basis: ``U_B [b, o, o]`` or ``[1, o, o]``, and ``U_A [b, i, i]``; ``None`` for the
            identity.
        layout: order in which the parameter stores the axes o, b, i.
    """

    values: Tensor
    basis: tuple[Tensor, Tensor] | None = None
    layout: Layout = "obi"

    @property
    def numel(self) -> int:
        """Number of parameters that the block covers."""
        return self.values.numel()

    @property
    def is_empty(self) -> bool:
        """Whether no datum has reached the weight: all values are zero, in any shape."""
        return not bool(self.values.any())

    def scaled(self, factor: Tensor | float) -> SpectralBlock:
        """The block times a number."""
        return replace(self, values=self.values * factor)

    def times(self, rows: Tensor, powers: Tensor) -> Tensor:
        """``U diag(powers) U^T`` times each row.

        Args:
            rows: ``[m, P]``, row-major in the parameter's own layout.
            powers: ``[b, o, i]``, any function of the values.

        Returns:
            ``[m, P]``, in the dtype of the rows.
        """
        blocks, out, inner = self.values.shape
        sizes = {"b": blocks, "o": out, "i": inner}
        stored = rows.to(self.values.dtype).reshape(len(rows), *(sizes[a] for a in self.layout))
        product = torch.einsum(f"m{self.layout}->mboi", stored)
        if self.basis is None:
            product = product * powers
        else:
            grads, inputs = self.basis
            product = grads @ ((grads.mT @ product @ inputs) * powers) @ inputs.mT
        product = torch.einsum(f"mboi->m{self.layout}", product)
        return product.reshape(rows.shape).to(rows.dtype)

    def diagonal(self, powers: Tensor) -> Tensor:
        """Diagonal of ``U diag(powers) U^T``, ``[P]`` in the parameter's own layout."""
        if self.basis is not None:
            grads, inputs = self.basis
            powers = grads.square() @ powers @ inputs.square().mT
        return torch.einsum(f"boi->{self.layout}", powers).flatten()

    def dense(self, powers: Tensor) -> Tensor:
        """``U diag(powers) U^T`` as ``[P, P]``, for small weights."""
        return BlockEigen(powers, self.basis, self.layout).to_dense()


def spectral_blocks(curvature: Curvature) -> dict[str, SpectralBlock]:
    """Decompose every block, in the order of the weights.

    Args:
        curvature: sums over the data, of flavour ``"kfac"``, ``"ekfac"`` or ``"diag"``.

    Returns:
        Weight name -> its block; values carry neither noise nor temperature.

    Raises:
        ConfigError: for a curvature that has no independent block per weight.
        NonFiniteError: if a factor is NaN or infinite.
        NotPSDError: if a decomposition fails for good.
    """
    if not isinstance(curvature, BlockCurvature):
        raise ConfigError(
            f"a {type(curvature).__name__} has no block per weight tensor; accumulate with "
            f"curvature='kfac', 'ekfac' or 'diag'"
        )
    return {name: _spectral(name, block) for name, block in curvature.blocks.items()}


def _spectral(name: str, block: object) -> SpectralBlock:
    if isinstance(block, BlockEigen):
        return SpectralBlock(block.moments, block.basis, block.layout)
    if not isinstance(block, BlockKron):
        raise ConfigError(f"the curvature of {name!r}, a {type(block).__name__}, has no basis")
    if block.is_empty:
        zeros = block.input_cov.new_zeros(block.numel, 1, 1)
        return SpectralBlock(zeros)
    grad_values, grads, _ = psd_eigh(block.grad_cov, name, block.resolution)
    input_values, inputs, _ = psd_eigh(block.input_cov, name, block.resolution)
    values = grad_values[:, :, None] * input_values[:, None, :] / block.n_shared
    return SpectralBlock(values, (grads.contiguous(), inputs.contiguous()), block.layout)
