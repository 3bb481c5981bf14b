"""F-FC as einsum against the same map with block-diagonal matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import Job, measure
from margeq.layers import FactoredLinear2d

__all__ = ["TARGET", "FactoredRow", "factored_rows"]

TARGET = 20.0
_BATCH = 32
_LAYERS = {
    "layer 6 (80 → 80 channels, 4×4 → 2×2)": (80, 80, (4, 4), (2, 2)),
    "layer 7 (80 → 160 channels, 2×2 → 1×1)": (80, 160, (2, 2), (1, 1)),
}
Forward = Callable[[FactoredLinear2d, Tensor], Tensor]


@dataclass(frozen=True)
class FactoredRow:
    """Forward and backward at one layer of the paper, in milliseconds."""

    layer: str
    einsum_ms: float
    block_diagonal_ms: float
    diag_embed_ms: float

    @property
    def speed_up(self) -> float:
        """Over the faster of the two block-diagonal formulations."""
        return min(self.block_diagonal_ms, self.diag_embed_ms) / self.einsum_ms


def factored_rows(repeats: int) -> list[FactoredRow]:
    """One row per layer."""
    return [_row(name, FactoredLinear2d(*sizes), repeats) for name, sizes in _LAYERS.items()]


def _row(name: str, layer: FactoredLinear2d, repeats: int) -> FactoredRow:
    for bias in (layer.bias_u, layer.bias_v):
        assert bias is not None
        nn.init.normal_(bias)
    x = torch.randn(_BATCH, layer.in_channels, *layer.in_shape, requires_grad=True)
    for reference in (_with_block_diag, _with_diag_embed):
        torch.testing.assert_close(reference(layer, x), layer(x), rtol=1e-3, atol=1e-4)
    einsum = Job("einsum", _step(FactoredLinear2d.forward, layer, x), calls=5)
    block_diagonal = Job("block_diag", _step(_with_block_diag, layer, x))
    embedded = Job("diag_embed", _step(_with_diag_embed, layer, x))
    costs = measure([einsum, block_diagonal, embedded], einsum.run, repeats)
    return FactoredRow(name, *(1e3 * cost.seconds for cost in costs.values()))


def _step(forward: Forward, layer: FactoredLinear2d, x: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn(_BATCH, layer.out_channels, *layer.out_shape)
    return lambda: torch.autograd.grad(forward(layer, x), leaves, cotangent)


def _with_block_diag(layer: FactoredLinear2d, x: Tensor) -> Tensor:
    """As in ELLA: one dense map on a block-diagonal matrix per datum, twice."""
    return _blockwise(layer, x, _block_diagonals)


def _with_diag_embed(layer: FactoredLinear2d, x: Tensor) -> Tensor:
    """The same matrices, built for the whole batch at once."""
    return _blockwise(layer, x, _embedded_diagonals)


def _blockwise(layer: FactoredLinear2d, x: Tensor, expand: Callable[[Tensor], Tensor]) -> Tensor:
    maps = x.reshape(len(x), layer.in_channels, -1)
    assert layer.bias_u is not None
    assert layer.bias_v is not None
    u = layer.weight_u.flatten(1)  # [D, C X]
    v = layer.weight_v.flatten(1)  # [Y, D C]
    hidden = u @ expand(maps) + layer.bias_u[:, None]  # [n, D, C]
    y = v @ expand(hidden)  # [n, Y, D]
    return (y.mT + layer.bias_v).reshape(len(x), layer.out_channels, *layer.out_shape)


def _block_diagonals(rows: Tensor) -> Tensor:
    """``[n, b, i] -> [n, b i, b]``, zero off the blocks."""
    return torch.stack([torch.block_diag(*datum[:, :, None]) for datum in rows])


def _embedded_diagonals(rows: Tensor) -> Tensor:
    return torch.diag_embed(rows.mT).transpose(1, 2).flatten(1, 2)
