"""Layers of margeq as modules of torch, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from margeq.convert.plumbing import (
    BatchSubsampled,
    DataLast,
    Gated,
    Lifted,
    OnElements,
    Pooled,
    Reordered,
    Subsampled,
    graph_of,
    sequence,
)
from margeq.layers import (
    EquivariantLinear,
    FactoredLinear2d,
    GroupConv2d,
    GroupGate,
    GroupPool,
    IrrepGroupConv2d,
    Lift,
    LiftingConv2d,
    Linear2d,
    MergeGroup,
    MonotoneGates,
    PairSeparableConv2d,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    PerElement,
    PolyphaseSubsample,
    RestrictGroup,
    SeparableGroupConv2d,
    SparseConv2d,
    SparseFactoredLinear2d,
    SparseGroupConv2d,
    SplitGroup,
    SubgroupConv2d,
    to_conv2d,
)
from margeq.layers.pooling import BatchPolyphaseSubsample

__all__ = ["PLAIN", "PLAIN_AROUND"]


def _linear2d(layer: Linear2d) -> nn.Module:
    return _matrix(layer, layer.weight, layer.bias)


def _equivariant(layer: EquivariantLinear) -> nn.Module:
    bias = None if layer.bias is None else (layer.bias @ layer.bias_basis).flatten()
    return _matrix(layer, layer.induced_weight(), bias)


def _matrix(layer: Linear2d | EquivariantLinear, matrix: Tensor, bias: Tensor | None) -> nn.Module:
    linear = _on_meta(nn.Linear, matrix.shape[1], matrix.shape[0], bias)
    _fill(linear, layer.weight, matrix, bias)
    return sequence([nn.Flatten(1), linear, _to_map(layer)])


def _factored(layer: FactoredLinear2d) -> nn.Module:
    return _two_factors(layer, layer.weight_u, layer.weight_v, layer.bias_u, layer.bias_v)


def _sparse_factored(layer: SparseFactoredLinear2d) -> nn.Module:
    dtype = layer.weight_u.dtype
    u = torch.einsum("dcm,dmx->dcx", layer.weight_u, layer.basis_u().to(dtype))
    v = torch.einsum("mdc,dmy->ydc", layer.weight_v, layer.basis_v().to(dtype))
    return _two_factors(layer, u, v, layer.bias_u, None)


def _two_factors(
    layer: FactoredLinear2d | SparseFactoredLinear2d,
    u: Tensor,
    v: Tensor,
    bias_u: Tensor | None,
    bias_v: Tensor | None,
) -> nn.Module:
    """``U [D, C, X]`` for each input channel by itself, then ``V [Y, D, C]`` for each output's.

    Data stand on the line that the filters of size one run along: grouped convolutions are slow
    on a line of one.

    Returns:
        Two grouped convolutions inside a graph.
    """
    (d, c, n_in), n_out = u.shape, len(v)
    bias = None if bias_u is None else bias_u[:, None] * v.sum(2).T
    if bias is not None and bias_v is not None:
        bias = bias + bias_v
    first = _on_meta(nn.Conv1d, c * n_in, c * d, None, kernel_size=1, groups=c)
    second = _on_meta(nn.Conv1d, c * d, d * n_out, bias, kernel_size=1, groups=d)
    _fill(first, layer.weight_u, u.transpose(0, 1).flatten(0, 1)[..., None], None)
    by_output = v.transpose(0, 1).flatten(0, 1)[..., None]
    _fill(second, layer.weight_v, by_output, None if bias is None else bias.flatten())
    inner = DataLast(nn.Sequential(first, nn.ChannelShuffle(c), second))
    return sequence([graph_of(inner, "Factors"), _to_map(layer)])


def _sparse_conv(layer: SparseConv2d) -> nn.Module:
    window: dict[str, Any] = {
        name: getattr(layer, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    conv = _on_meta(nn.Conv2d, layer.in_channels, layer.out_channels, layer.bias, **window)
    _fill(conv, layer.weight, layer.filters(), layer.bias)
    return conv


def _group_conv(layer: Any) -> nn.Module:
    return sequence([nn.Flatten(1, 2), *_planar(layer)])


def _lifting_conv(layer: Any) -> nn.Module:
    return sequence(_planar(layer))


def _planar(layer: Any) -> list[nn.Module]:
    conv, order = to_conv2d(layer), layer.group.order
    if isinstance(layer, PartialGroupConv2d):
        weight = cast(Tensor, conv.weight)
        sees = weight.new_zeros(order).index_fill(0, layer.seen(), 1.0)
        by_element = weight.unflatten(1, (-1, order))
        by_element *= sees[:, None, None]
    return [conv, nn.Unflatten(1, (-1, order))]


def _restrict(layer: RestrictGroup) -> nn.Module:
    cosets = layer.cosets.clone()
    return graph_of(Reordered(cosets.flatten(), 1, len(cosets)), "RestrictedGroup")


def _subgroup_conv(layer: SubgroupConv2d) -> nn.Module:
    cosets = layer.restrict.cosets.clone()
    back = Reordered(cosets.flatten().argsort(), len(cosets), 1)
    inside = [_restrict(layer.restrict), _group_conv(layer.conv), graph_of(back, "WholeGroup")]
    return nn.Sequential(*inside)


def _gate(layer: GroupGate) -> nn.Module:
    return graph_of(Gated(layer.factors().detach().clone()), "Gate")


def _per_element(layer: PerElement) -> nn.Module:
    return graph_of(OnElements(layer.module), "PerElement")


def _monotone(layer: MonotoneGates) -> nn.Module:
    return layer.network


def _merge(layer: MergeGroup) -> nn.Module:
    return nn.Flatten(1, 2)


def _split(layer: SplitGroup) -> nn.Module:
    return nn.Unflatten(1, (-1, layer.group.order))


def _lift(layer: Lift) -> nn.Module:
    return graph_of(Lifted(layer.group.order), "Lift")


def _pool(layer: GroupPool) -> nn.Module:
    return graph_of(Pooled(layer.reduction), "GroupPool")


def _polyphase(layer: PolyphaseSubsample) -> nn.Module:
    return graph_of(Subsampled(), "PolyphaseSubsample")


def _batch_polyphase(layer: BatchPolyphaseSubsample) -> nn.Module:
    return graph_of(BatchSubsampled(), "BatchPolyphaseSubsample")


def _to_map(layer: Any) -> nn.Module:
    return nn.Unflatten(1, (layer.out_channels, *layer.out_shape))


def _on_meta(kind: Any, c: int, d: int, bias: Tensor | None, **options: Any) -> Any:
    with torch.device("meta"):
        return kind(c, d, bias=bias is not None, **options)


def _fill(new: Any, old: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Weights of its own, trained where those of the old layer are."""
    kept = torch.contiguous_format
    new.weight = nn.Parameter(
        weight.detach().clone(memory_format=kept), requires_grad=old.requires_grad
    )
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=old.requires_grad)


PLAIN_AROUND: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    PerElement: _per_element,
    MonotoneGates: _monotone,
}
"""Type of a layer -> plain form around its parts, which are plain already."""

PLAIN: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear2d: _linear2d,
    EquivariantLinear: _equivariant,
    FactoredLinear2d: _factored,
    SparseFactoredLinear2d: _sparse_factored,
    SparseConv2d: _sparse_conv,
    **dict.fromkeys((LiftingConv2d, PartialLiftingConv2d), _lifting_conv),
    **dict.fromkeys(
        (
            GroupConv2d, PartialGroupConv2d, PairSeparableConv2d, SeparableGroupConv2d,
            SparseGroupConv2d, IrrepGroupConv2d,
        ),
        _group_conv,
    ),
    SubgroupConv2d: _subgroup_conv,
    RestrictGroup: _restrict,
    GroupGate: _gate,
    MergeGroup: _merge,
    SplitGroup: _split,
    Lift: _lift,
    GroupPool: _pool,
    PolyphaseSubsample: _polyphase,
    BatchPolyphaseSubsample: _batch_polyphase,
}  # fmt: skip
"""Type of a layer -> plain form, parts included."""
