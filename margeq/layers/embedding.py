"""The rule of ``nn.Embedding``: a linear map of one-hot vectors.

    y[n,t,o] = sum_b W[b,o] [x[n,t] = b]

Every row of the table is a block with one input, so that the input factor is a count per row; all
blocks write the same output and share their gradient factor.
"""

from __future__ import annotations

from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    register_split_rule,
    sampled_rows,
)
from margeq.errors import UnsupportedLayerError

__all__: list[str] = []

_MOST_NUMBERS = 2**28


def _inputs(layer: nn.Embedding, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    _require_linear(layer)
    indices = x.reshape(len(x), -1)
    n_positions = indices.shape[1]
    chosen = sampled_rows(indices, sampler)
    numbers = chosen.numel() * layer.num_embeddings
    if numbers > _MOST_NUMBERS:
        raise UnsupportedLayerError(
            f"{layer} on {chosen.numel()} positions of a batch would need {numbers} numbers; use "
            f"smaller batches for the evidence, freeze it (requires_grad_(False)), or exclude it "
            f"with parameters=[...]"
        )
    rows = nn.functional.one_hot(chosen, layer.num_embeddings).to(layer.weight.dtype)
    if layer.padding_idx is not None:
        rows[..., layer.padding_idx] = 0
    return {"weight": InputRows(rows[..., None], n_positions, "boi", joint=True)}


def _output_grads(layer: nn.Embedding, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    v, n = grad_y.shape[:2]
    return {"weight": grad_y.reshape(v, n, -1, 1, grad_y.shape[-1])}


def _require_linear(layer: nn.Embedding) -> None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(layer, option):
            raise UnsupportedLayerError(
                f"{layer}: with {option} its gradient is not that of a linear map; leave the "
                f"option out, freeze the layer (requires_grad_(False)), or exclude it with "
                f"parameters=[...]"
            )


register_split_rule(nn.Embedding, rule=Rule(_inputs, _output_grads))
