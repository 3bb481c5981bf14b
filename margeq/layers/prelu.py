"""Rule of ``nn.PReLU``: the slopes of its negative side.

    y[n,c,t] = max(x, 0) + weight[c] * min(x, 0)

Slopes are few, so that the gradient of each datum is formed, and their block is exact. More than
512 of them are blocks of their own.
"""

from __future__ import annotations

from torch import Tensor, nn

from margeq.curvature.input_terms import promoted
from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
)

__all__: list[str] = []

_LARGEST_BLOCK = 512


def _inputs(layer: nn.PReLU, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    slopes = layer.num_parameters
    return {"weight": bias_rows(len(x), 1, slopes if slopes > _LARGEST_BLOCK else 1, x)}


def _output_grads(layer: nn.PReLU, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    slopes = layer.num_parameters
    products = promoted(grad_y) * promoted(x).clamp(max=0.0)
    # one slope for everything, or one per entry of the axis behind the data
    rows = products.reshape(*grad_y.shape[:2], slopes, -1).sum(-1).to(grad_y)[:, :, None]
    return {"weight": rows[..., None] if slopes > _LARGEST_BLOCK else rows[..., None, :]}


register_split_rule(nn.PReLU, rule=Rule(_inputs, _output_grads, starts_at={"weight": None}))
