"""Eigenvalues of input factors that commute with a group: all at once, or in Fourier blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Job, measure
from margeq.groups import P4, P4M, FiniteGroup
from margeq.laplace import accumulate
from margeq.layers import GroupConv2d
from margeq.likelihoods import Gaussian
from margeq.linalg import psd_eigenvalues

__all__ = ["FourierRow", "fourier_rows"]

_LAYERS = [(P4, 16, 3), (P4, 32, 3), (P4M, 8, 3), (P4M, 16, 3), (P4M, 10, 5)]
_LARGE = 1152
_TARGET, _TARGET_MIRRORS = 3.0, 10.0


@dataclass(frozen=True)
class FourierRow:
    """One input factor of a group convolution, in milliseconds."""

    layer: str
    dimension: int
    dense_ms: float
    blocks_ms: float
    target: float

    @property
    def speed_up(self) -> float:
        """Of the blocks."""
        return self.dense_ms / self.blocks_ms


def fourier_rows(repeats: int) -> list[FourierRow]:
    """One row per layer."""
    return [_row(*sizes, repeats) for sizes in _LAYERS]


def _row(group: FiniteGroup, channels: int, size: int, repeats: int) -> FourierRow:
    layer = GroupConv2d(channels, 1, size, group=group, bias=False)
    x = torch.randn(16, channels, group.order, size + 7, size + 7)
    batch = x, torch.zeros_like(layer(x))
    kron = accumulate(layer, [batch], Gaussian(), hessian_root="mc").kron["weight"]
    symmetry, cov = kron.symmetry, kron.input_cov
    assert symmetry is not None
    dense = Job("dense", lambda: psd_eigenvalues(cov, "weight"))
    blocks = Job("blocks", lambda: symmetry.eigenvalues(cov, "weight"), calls=3)
    costs = measure([dense, blocks], blocks.run, repeats)
    dimension = cov.shape[-1]
    is_steep = group == P4M and dimension >= _LARGE
    return FourierRow(
        f"{group}, {channels} channels, {size} × {size}",
        dimension,
        *(1e3 * cost.seconds for cost in costs.values()),
        _TARGET_MIRRORS if is_steep else _TARGET,
    )
