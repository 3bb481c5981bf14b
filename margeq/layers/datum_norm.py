"""Rules of layers that normalise each datum alone: Layer-, RMS-, Group- and InstanceNorm.

    y[n,t,c] = weight[c] * xhat[n,t,c] + bias[c],   xhat normalised over the datum itself

Every weight is a block of its own. Biases are one exact block, or blocks of their own where that
would be larger than ``1024 x 1024``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
    sampled_rows,
)

__all__ = ["DatumNorm"]

DatumNorm = (
    nn.LayerNorm
    | nn.RMSNorm
    | nn.GroupNorm
    | nn.InstanceNorm1d
    | nn.InstanceNorm2d
    | nn.InstanceNorm3d
)
_LARGEST_BIAS_BLOCK = 1024


def _inputs(layer: DatumNorm, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    rows = _by_entry(layer, _normalised(layer, x))[..., None]
    n_data, n_positions, n_entries = rows.shape[:3]
    found = {"weight": InputRows(sampled_rows(rows, sampler), n_positions, "boi")}
    if getattr(layer, "bias", None) is not None:
        blocks = n_entries if n_entries > _LARGEST_BIAS_BLOCK else 1
        found["bias"] = bias_rows(n_data, n_positions, blocks, x)
    return found


def _output_grads(layer: DatumNorm, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    v, n = grad_y.shape[:2]
    grads = _by_entry(layer, grad_y.flatten(0, 1)).unflatten(0, (v, n))
    blocks = grads.shape[-1] > _LARGEST_BIAS_BLOCK
    return {"weight": grads[..., None], "bias": grads[..., None] if blocks else grads[..., None, :]}


def _by_entry(layer: DatumNorm, values: Tensor) -> Tensor:
    """``[n, t, c]``: positions, and the entries that have a weight each."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        n_entries = torch.Size(layer.normalized_shape).numel()
        return values.reshape(len(values), -1, n_entries)
    return values.reshape(*values.shape[:2], -1).transpose(1, 2)


def _normalised(layer: DatumNorm, x: Tensor) -> Tensor:
    """What the affine map gets."""
    functional = nn.functional
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return functional.rms_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(x, layer.num_groups, eps=layer.eps)
    if layer.track_running_stats and not layer.training:
        means, variances = layer.running_mean, layer.running_var
        return functional.instance_norm(x, means, variances, use_input_stats=False, eps=layer.eps)
    return functional.instance_norm(x, eps=layer.eps)


register_split_rule(
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    rule=Rule(_inputs, _output_grads, starts_at={"weight": 1.0}),
)
