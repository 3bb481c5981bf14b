"""Rules of ``nn.Conv1d/2d/3d``: any padding mode, stride, dilation and groups.

Shared positions are the output pixels, blocks are the ``groups``, rows are the patches.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
)
from margeq.layers.window import Window

__all__ = ["Conv", "ConvTranspose", "conv_inputs", "conv_output_grads", "patch_rows", "patch_view"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def conv_inputs(layer: Conv, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
    """Patches ``[n, m, groups, C / groups * k^d]`` of a convolution, and the bias's ones."""
    rows, n_positions = patch_rows(layer, x, sampler)
    found = {"weight": InputRows(rows, n_positions, "boi")}
    if layer.bias is not None:
        # one block for all groups: exact, and no larger than that of a dense convolution
        found["bias"] = bias_rows(len(x), n_positions, 1, x)
    return found


def patch_rows(layer: Conv | Window, x: Tensor, sampler: PositionSampler) -> tuple[Tensor, int]:
    """Patches ``[n, m, groups, C / groups * k^d]`` at sampled positions, and how many there are."""
    padded = _padded(layer, x)
    patches, out_shape = patch_view(layer, padded)
    n_positions = out_shape.numel()
    positions = sampler(n_positions)
    if positions is not None:
        return _rows_at(padded, patches, positions, out_shape), n_positions
    if padded.requires_grad and torch.is_grad_enabled() and padded.ndim == 4:
        return cast(Tensor, _DifferentiableRows.apply(padded, layer)), n_positions
    return _all_rows(patches), n_positions


def conv_output_grads(layer: Conv, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Gradients ``[v, n, t, groups, D / groups]`` of a convolution's output."""
    v, n = grad_y.shape[:2]
    blocks = layer.groups
    grads = grad_y.reshape(v, n, blocks, layer.out_channels // blocks, -1)
    grads = grads.permute(0, 1, 4, 2, 3)
    return {"weight": grads, "bias": grads.flatten(3)[:, :, :, None]}


def _padded(layer: Conv | Window, x: Tensor) -> Tensor:
    # the same pads that the module itself applies for every mode but zeros
    pads = layer.pads if isinstance(layer, Window) else layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, pads, mode=mode) if any(pads) else x
    return padded.contiguous()  # padding keeps channels_last, whose strides _rows_at cannot use


def patch_view(layer: Conv | ConvTranspose | Window, x: Tensor) -> tuple[Tensor, torch.Size]:
    """A view ``[n, b, c, *kernel, *out]`` of all patches, without a copy."""
    n, channels, *extents = x.shape
    batch_stride, channel_stride, *strides = x.stride()
    kernel, step, dilation = layer.kernel_size, layer.stride, layer.dilation
    out_shape = torch.Size(
        (extent - d * (k - 1) - 1) // s + 1
        for extent, k, s, d in zip(extents, kernel, step, dilation, strict=True)
    )
    per_block = channels // layer.groups
    view = x.as_strided(
        (n, layer.groups, per_block, *kernel, *out_shape),
        (
            batch_stride,
            channel_stride * per_block,
            channel_stride,
            *(stride * d for stride, d in zip(strides, dilation, strict=True)),
            *(stride * s for stride, s in zip(strides, step, strict=True)),
        ),
    )
    return view, out_shape


def _all_rows(patches: Tensor) -> Tensor:
    """``[n, t, b, i]`` with positions innermost in memory: the copy is several times faster."""
    n, blocks = patches.shape[:2]
    n_axes = (patches.ndim - 3) // 2
    axes = list(range(patches.ndim))
    order = [1, *axes[2 : 3 + n_axes], 0, *axes[3 + n_axes :]]
    columns = patches.permute(order).reshape(
        blocks, patches[0, 0, ..., *[0] * n_axes].numel(), n, -1
    )
    return columns.permute(2, 3, 0, 1)


class _DifferentiableRows(torch.autograd.Function):
    """As :func:`_all_rows` for pictures, with the fast gradient of ``unfold``."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, layer: Conv | Window) -> Tensor:
        ctx.shape, ctx.layer = padded.shape, layer
        return _all_rows(patch_view(layer, padded)[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        columns = grad_outputs[0].permute(0, 2, 3, 1).flatten(1, 2)
        extents = (ctx.shape[2:], layer.kernel_size, layer.dilation, 0, layer.stride)
        return nn.functional.fold(columns, *extents), None


def _rows_at(x: Tensor, patches: Tensor, positions: Tensor, out_shape: torch.Size) -> Tensor:
    """``[n, m, b, i]``: patches at a sample of positions of each datum, gathered directly."""
    # from the flat memory of x, of which patches is a view: indexing the view is far slower
    blocks, n_axes = patches.shape[1], len(out_shape)
    offsets = _offsets(patches[0, ..., *[0] * n_axes]).reshape(blocks, -1)
    starts = _offsets(patches[0, 0, 0, *[0] * n_axes]).flatten()[positions]
    starts = starts + _offsets(patches[(slice(None), *[0] * (patches.ndim - 1))])[:, None]
    index = starts[:, :, None, None] + offsets
    return x.flatten().index_select(0, index.flatten()).reshape(index.shape)


def _offsets(view: Tensor) -> Tensor:
    """Memory offset of each entry of a view from its first one, in the view's shape."""
    offsets = torch.zeros((), dtype=torch.long, device=view.device)
    for extent, stride in zip(view.shape, view.stride(), strict=True):
        offsets = offsets[..., None] + stride * torch.arange(extent, device=view.device)
    return offsets


register_split_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, rule=Rule(conv_inputs, conv_output_grads))
