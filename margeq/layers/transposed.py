"""Rules of ``nn.ConvTranspose1d/2d/3d``: any stride, padding, dilation and groups.

    y = fold(z),   z[n,q,b,(d,k)] = sum_c W[c,d,k] x[n,c,q]

Shared positions ``q`` are the pixels of the input; ``o`` is a whole patch of the output, ``b`` the
``groups``. Folding has no weights.
"""

from __future__ import annotations

from typing import cast

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
from margeq.layers.convolution import ConvTranspose, patch_view

__all__: list[str] = []


def _inputs(layer: ConvTranspose, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    n_data = len(x)
    rows = x.reshape(n_data, layer.groups, layer.in_channels // layer.groups, -1)
    rows = rows.permute(0, 3, 1, 2)
    found = {"weight": InputRows(sampled_rows(rows, sampler), rows.shape[1], "bio")}
    if layer.bias is not None:
        found["bias"] = bias_rows(n_data, _output_size(layer, x).numel(), 1, x)
    return found


def _output_grads(layer: ConvTranspose, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    v, n = grad_y.shape[:2]
    pads = [p for size in reversed(layer.padding) for p in (int(size), int(size))]
    padded = nn.functional.pad(grad_y.flatten(0, 1), pads).contiguous()
    windows, _ = patch_view(layer, padded)
    for axis, extent in enumerate(x.shape[2:]):  # output_padding can make room for more windows
        windows = windows.narrow(axis - x.ndim + 2, 0, extent)
    rows = windows.flatten(-(x.ndim - 2)).flatten(2, -2)  # [v n, b, (d k), q]
    rows = rows.unflatten(0, (v, n)).permute(0, 1, 4, 2, 3)
    bias = grad_y.flatten(3).transpose(2, 3)[:, :, :, None]
    return {"weight": rows, "bias": bias}


def _output_size(layer: ConvTranspose, x: Tensor) -> torch.Size:
    axes = zip(
        x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size,
        layer.output_padding, strict=True,
    )  # fmt: skip
    return torch.Size(
        (extent - 1) * s - 2 * cast(int, p) + d * (k - 1) + extra + 1
        for extent, s, p, d, k, extra in axes
    )


register_split_rule(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, rule=Rule(_inputs, _output_grads)
)
