"""margeq's curvature in the form in which laplace-torch asks for it.

Imports laplace-torch: only :mod:`margeq.integrations.laplace_torch` imports this module, when it
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from margeq.curvature.spectral import SpectralBlock
from margeq.integrations.neighbours import import_laplace
from margeq.linalg import log1p_ratio
from margeq.posterior import Posterior

__all__ = ["BlockKronDecomposed"]

_KronDecomposed: Any = import_laplace().utils.matrix.KronDecomposed


class BlockKronDecomposed(_KronDecomposed):
    """``H_t + delta_t`` per weight tensor ``t``, each ``H_t`` with blocks of its own.

    laplace-torch's class has one Kronecker product per tensor, in one layout; here a tensor has
    any number of independent blocks, in any layout, and eigenvalues that need not be products.

    Args:
        blocks: weight tensor -> its curvature.
        deltas: one for all tensors, or one per tensor; zero by default.
    """

    def __init__(self, blocks: Mapping[str, SpectralBlock], deltas: Tensor | None = None) -> None:
        self.blocks = dict(blocks)
        self.damping = False
        like = next(iter(self.blocks.values())).values
        self.deltas = torch.zeros(len(self), dtype=like.dtype, device=like.device)
        if deltas is not None:
            self._check_deltas(deltas)
            self.deltas = self.deltas + deltas

    @property
    def eigenvalues(self) -> list[list[Tensor]]:
        """Eigenvalues ``[b, o, i]`` of each tensor's curvature, without ``deltas``."""
        return [[block.values] for block in self.blocks.values()]

    @property
    def eigenvectors(self) -> list[tuple[Tensor, ...]]:
        """``U_B`` and ``U_A`` of each tensor; none for the identity."""
        return [block.basis or () for block in self.blocks.values()]

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, deltas: Tensor) -> BlockKronDecomposed:
        self._check_deltas(deltas)
        return BlockKronDecomposed(self.blocks, self.deltas + deltas)

    def __mul__(self, scalar: Tensor | float) -> BlockKronDecomposed:
        scaled = {name: block.scaled(scalar) for name, block in self.blocks.items()}
        return BlockKronDecomposed(scaled, self.deltas)

    __radd__, __rmul__ = __add__, __mul__

    def posterior(self) -> Posterior:
        """The same as margeq's posterior."""
        return Posterior(self.blocks, dict(zip(self.blocks, self.deltas, strict=True)))

    def logdet(self) -> Tensor:
        """``sum log(lambda + delta)``, differentiable in ``deltas``."""
        total = self.deltas.new_zeros(())
        for block, delta in zip(self.blocks.values(), self.deltas, strict=True):
            # log delta + log(1 + lambda / delta): finite from 1e-30 to 1e30
            ratios = log1p_ratio(block.values.log(), delta.log())
            total = total + ratios.sum() + block.numel * delta.log()
        return total

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        rows = W.flatten(0, 1)
        parts = rows.split([block.numel for block in self.blocks.values()], 1)
        products = [
            block.times(part, values)
            for block, part, values in zip(
                self.blocks.values(), parts, self._powers(exponent), strict=True
            )
        ]
        return torch.cat(products, 1).reshape(W.shape)

    def diag(self, exponent: float = 1) -> Tensor:
        """Diagonal of a power, ``[P]``."""
        powers = zip(self.blocks.values(), self._powers(exponent), strict=True)
        return torch.cat([block.diagonal(values) for block, values in powers])

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """A power as a dense matrix ``[P, P]``, for small models."""
        powers = zip(self.blocks.values(), self._powers(exponent), strict=True)
        return torch.block_diag(*[block.dense(values) for block, values in powers])

    def _powers(self, exponent: float) -> list[Tensor]:
        pairs = zip(self.blocks.values(), self.deltas, strict=True)
        return [torch.pow(block.values + delta, exponent) for block, delta in pairs]

    def state(self) -> list[dict[str, Any]]:
        """Plain values and tensors, without ``deltas``."""
        return [
            {
                "name": name,
                "values": block.values,
                "basis": list(block.basis or ()),
                "layout": block.layout,
            }
            for name, block in self.blocks.items()
        ]

    @classmethod
    def from_state(
        cls, state: Sequence[Mapping[str, Any]], device: torch.device
    ) -> BlockKronDecomposed:
        """What :meth:`state` gave, on a device."""
        blocks = {}
        for entry in state:
            basis = tuple(side.to(device) for side in entry["basis"]) or None
            blocks[entry["name"]] = SpectralBlock(
                entry["values"].to(device), basis, entry["layout"]
            )
        return cls(blocks)
