"""Rules of ``nn.BatchNorm1d/2d/3d``, whose running statistics make them maps of single data.

    y[n,c,t] = weight[c] * xhat[n,c,t] + bias[c],   xhat = (x - mean) / sqrt(var + eps)

Shared positions are the positions of a map, every channel's weight is a block of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
    sampled_rows,
)
from margeq.errors import UnsupportedLayerError

__all__ = ["BatchNorm"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def _inputs(layer: BatchNorm, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    rows = _normalised(layer, x).flatten(2).permute(0, 2, 1)[..., None]
    n_data, n_positions = rows.shape[:2]
    found = {"weight": InputRows(sampled_rows(rows, sampler), n_positions, "boi")}
    if layer.bias is not None:
        # one block for all channels, as for a convolution: exact
        found["bias"] = bias_rows(n_data, n_positions, 1, x)
    return found


def _output_grads(layer: BatchNorm, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    grads = grad_y.reshape(*grad_y.shape[:3], -1).transpose(2, 3)
    return {"weight": grads[..., None], "bias": grads[:, :, :, None]}


def _normalised(layer: BatchNorm, x: Tensor) -> Tensor:
    """What the affine map of one channel gets, ``[n, c, *space]`` with at least one position."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise UnsupportedLayerError(
            f"{layer} has no running statistics: it normalises each datum by the batch around it, "
            f"so the data have no curvature of their own. Ways out: track_running_stats=True; or a "
            f"layer that normalises each datum alone, such as nn.GroupNorm(..., affine=False)"
        )
    if layer.training:
        raise UnsupportedLayerError(
            f"{layer} is in training mode, where the data of a batch share their statistics. "
            f"Curvature is taken in evaluation mode: call .eval() first, and let the .eval() of "
            f"the modules around it reach it"
        )
    axes = (-1, *[1] * max(x.ndim - 2, 1))
    x = x[..., None] if x.ndim == 2 else x
    return (x - mean.reshape(axes)) * (variance + layer.eps).rsqrt().reshape(axes)


register_split_rule(
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    rule=Rule(_inputs, _output_grads, starts_at={"weight": 1.0}),
)
