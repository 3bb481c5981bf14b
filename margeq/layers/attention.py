"""Rules of ``nn.MultiheadAttention``, whose projections are no modules of their own.

    q, k, v = W_q x_q + b_q, W_k x_k + b_k, W_v x_v + b_v,   y = W_o attention(q, k, v) + b_o

Each of the three input projections is a block of its own, shared positions are those of the
sequence, and the packed bias is one exact block. While the curvature listens, the projections are
computed here and torch's own function, with identities in their place, does the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode

from margeq.curvature.io import (
    Heard,
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
    sampled_rows,
)
from margeq.errors import UnsupportedLayerError
from margeq.layers.dense import LINEAR

__all__: list[str] = []

_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_SIGNATURE = inspect.signature(multi_head_attention_forward)


class _Listening(TorchFunctionMode):
    """Reports the projections of attention layers while the context is open.

    Args:
        layers: attention layers; calls of others pass through.
        heard: told of each projection.
    """

    def __init__(self, layers: Sequence[nn.Module], heard: Heard) -> None:
        super().__init__()
        self._layers = {id(layer.out_proj.weight): layer for layer in layers}  # pyright: ignore[reportAttributeAccessIssue]
        self._heard = heard

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is multi_head_attention_forward:
            given = _SIGNATURE.bind(*args, **(kwargs or {})).arguments
            layer = self._layers.get(id(given["out_proj_weight"]))
            if isinstance(layer, nn.MultiheadAttention):
                return _attention(layer, given, self._heard)
        return func(*args, **(kwargs or {}))


def _attention(
    layer: nn.MultiheadAttention, given: dict[str, Any], heard: Heard
) -> tuple[Tensor, Tensor | None]:
    """Torch's attention, with projections that are heard; sequences come first, as there."""
    sequences = [given[name] for name in ("query", "key", "value")]
    if any(sequence.ndim != 3 for sequence in sequences):
        raise UnsupportedLayerError(
            "nn.MultiheadAttention was called without a data axis; give it batches of sequences"
        )
    project = _packed if layer.in_proj_weight is not None else _separate
    query, key, value = project(layer, sequences, heard)
    eye = torch.eye(layer.embed_dim, dtype=query.dtype, device=query.device)
    identities = {"out_proj_weight": eye, **dict.fromkeys(_PARTS, eye)}
    own = {
        "query": query, "key": key, "value": value,
        "in_proj_weight": None, "in_proj_bias": None, "out_proj_bias": None,
        "use_separate_proj_weight": True, **identities,
    }  # fmt: skip
    mixed, weights = multi_head_attention_forward(**{**given, **own})
    data_first = mixed.transpose(0, 1)
    out = layer.out_proj
    y = linear(data_first, out.weight, out.bias)
    y = heard(out, ("weight", "bias"), LINEAR, data_first, y)
    return y.transpose(0, 1), weights


def _packed(
    layer: nn.MultiheadAttention, sequences: Sequence[Tensor], heard: Heard
) -> Sequence[Tensor]:
    """All three by one weight; ``x`` is ``[n, t, i]``, or ``[n, t, 3, i]`` if they differ."""
    query, key, value = sequences
    if query is key and key is value:
        x = query.transpose(0, 1)
        y = linear(x, layer.in_proj_weight, layer.in_proj_bias)
    else:
        if len({sequence.shape for sequence in sequences}) > 1:
            raise UnsupportedLayerError(
                f"nn.MultiheadAttention between sequences of {len(query)} and {len(key)} positions "
                f"has one weight for maps with different numbers of positions; keep the "
                f"projections apart (kdim={layer.embed_dim + 1} or any other width), freeze "
                f"in_proj_weight (nn.TransformerDecoderLayer: that of multihead_attn), or exclude "
                f"it with parameters=[...]"
            )
        x = torch.stack([sequence.transpose(0, 1) for sequence in sequences], 2)
        weight = layer.in_proj_weight.unflatten(0, (3, -1))
        y = torch.einsum("ntpi,poi->ntpo", x, weight).flatten(2)
        y = y if layer.in_proj_bias is None else y + layer.in_proj_bias
    y = heard(layer, ("in_proj_weight", "in_proj_bias"), _PACKED, x, y)
    return [part.transpose(0, 1) for part in y.chunk(3, -1)]


def _separate(
    layer: nn.MultiheadAttention, sequences: Sequence[Tensor], heard: Heard
) -> Sequence[Tensor]:
    """Each by a weight of its own; the bias is packed nevertheless."""
    bias = layer.in_proj_bias
    parts = [None] * 3 if bias is None else bias.chunk(3)
    found = []
    for number, (name, sequence) in enumerate(zip(_PARTS, sequences, strict=True)):
        x = sequence.transpose(0, 1)
        y = linear(x, getattr(layer, name), parts[number])
        y = heard(layer, (name, "in_proj_bias"), _SEPARATE[number], x, y)
        found.append(y.transpose(0, 1))
    return found


def _packed_inputs(
    layer: nn.MultiheadAttention, x: Tensor, sampler: PositionSampler
) -> dict[str, InputRows]:
    rows = x if x.ndim == 4 else x[:, :, None].expand(-1, -1, 3, -1)
    n_data, n_positions = rows.shape[:2]
    found = {"in_proj_weight": InputRows(sampled_rows(rows, sampler), n_positions, "boi")}
    if layer.in_proj_bias is not None:
        found["in_proj_bias"] = bias_rows(n_data, n_positions, 1, x)
    return found


def _packed_grads(layer: nn.MultiheadAttention, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    return {
        "in_proj_weight": grad_y.unflatten(-1, (3, -1)),
        "in_proj_bias": grad_y[:, :, :, None],
    }


def _separate_rule(number: int) -> Rule:
    name = _PARTS[number]

    def inputs(
        layer: nn.MultiheadAttention, x: Tensor, sampler: PositionSampler
    ) -> dict[str, InputRows]:
        n_data, n_positions = x.shape[:2]
        found = {name: InputRows(sampled_rows(x[:, :, None], sampler), n_positions)}
        if layer.in_proj_bias is not None:
            found["in_proj_bias"] = bias_rows(n_data, n_positions, 1, x)
        return found

    def grads(layer: nn.MultiheadAttention, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
        size = grad_y.shape[-1]
        packed = nn.functional.pad(grad_y, (number * size, (2 - number) * size))
        return {name: grad_y[:, :, :, None], "in_proj_bias": packed[:, :, :, None]}

    return Rule(inputs, grads)


_PACKED = Rule(_packed_inputs, _packed_grads, _Listening)
_SEPARATE = tuple(map(_separate_rule, range(3)))
register_split_rule(nn.MultiheadAttention, rule=_PACKED)
register_split_rule(NonDynamicallyQuantizableLinear, rule=LINEAR)
