"""Function scale: prior precisions under which every path starts with outputs of unit size.

    delta_0 = fan_in * scale^2 / gain^2

with ``gain^2 = 2`` for the last map before a rectifier and 1 otherwise, ``scale`` the factor of a
path sum, and ``delta_0 = scale^2`` for biases. A layer with a basis knows its ``fan_in`` itself.
A path of 32,000 weights and one of 72 then begin with the same output variance. Weights that only
scale, as those of a BatchNorm, have ``delta_0 = scale^2`` too: they are not drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from margeq.curvature.capture import Use, eval_mode, run_recorded
from margeq.curvature.io import InputRows
from margeq.parameters import matches
from margeq.paths import Shapes, path_prefixes, path_sums

__all__ = ["FunctionScale", "function_scale"]

_RECTIFIERS = (
    "Relu", "LeakyRelu", "Threshold", "Gelu", "Silu", "Elu", "Hardtanh", "Softplus", "Mish",
    "Hardswish", "Prelu",
)  # fmt: skip


@dataclass(frozen=True)
class FunctionScale:
    """What one forward pass tells about each weight.

    Attributes:
        precision: function-scale prior precision per weight tensor.
        is_bias: whether the tensor is a bias.
        path_outputs: layer -> path -> tensors of the map that writes the path's output.
        modules: tensors of the map that writes each module's output, weight and bias together.
        shapes: shape ``[c, ...]`` of one datum's input and output of each module with weights.
        starts_at: tensors that start at a constant instead of random values, and their constants
            at unit precision, or ``None`` for those that start at their own values.
    """

    precision: dict[str, float]
    is_bias: dict[str, bool]
    path_outputs: dict[str, dict[str, tuple[str, ...]]]
    modules: tuple[tuple[str, ...], ...]
    shapes: Shapes
    starts_at: dict[str, float | None] = field(default_factory=dict)


def function_scale(
    model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Any
) -> FunctionScale:
    """Trace one batch in evaluation mode and derive the function scale of every weight.

    Weights that the network does not use on this batch get precision 1.

    Returns:
        Precisions, which tensors are biases, and which write the output of a path.
    """
    with eval_mode(model), torch.enable_grad():
        outputs, uses = run_recorded(model, weights, inputs)
        inputs_of = [use.rule.inputs(use.layer, use.x[:1], lambda _: None) for use in uses]
    rectified = _before_rectifier(outputs, uses)
    path_outputs, path_scales = _path_outputs(model, uses)
    precision = dict.fromkeys(weights, 1.0)
    is_bias = dict.fromkeys(weights, False)
    starts_at: dict[str, float | None] = {}
    for position, (use, rows) in enumerate(zip(uses, inputs_of, strict=True)):
        constants = use.rule.starts_at
        for local, name in use.names.items():
            is_bias[name] = rows[local].is_bias and local not in constants
            first = local in getattr(use.layer, "first_factors", ())
            gain = 2.0 if position in rectified and not first else 1.0
            if local in constants:
                starts_at[name] = constants[local]
            drawn = not is_bias[name] and local not in constants
            fan_in = _fan_in(use.layer, local, rows[local]) / gain if drawn else 1.0
            precision[name] = fan_in * path_scales.get(name, 1.0) ** 2
    modules = dict.fromkeys(_output_tensors(use) for use in uses)
    shapes = {use.layer: (use.x.shape[1:], use.y.shape[1:]) for use in uses}
    return FunctionScale(precision, is_bias, path_outputs, tuple(modules), shapes, starts_at)


def _fan_in(layer: nn.Module, local: str, rows: InputRows) -> float:
    """Variance of the output under unit weights and white inputs; a layer may know better."""
    own = getattr(layer, "fan_in", None)
    return rows.rows.shape[-1] if own is None else own(local)


def _output_tensors(use: Use) -> tuple[str, ...]:
    first = getattr(use.layer, "first_factors", ())
    return tuple(name for local, name in use.names.items() if local not in first)


def _path_outputs(
    model: nn.Module, uses: list[Use]
) -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, float]]:
    """Tensors of the last map in each path, and the factor with which they enter the sum."""
    outputs: dict[str, dict[str, tuple[str, ...]]] = {}
    scales: dict[str, float] = {}
    sums = path_sums(model)
    for layer, prefixes in path_prefixes(model).items():
        outputs[layer] = {}
        for path, prefix in prefixes.items():
            inside = [u for u in uses if u.prefix == prefix or matches(u.prefix, [prefix])]
            outputs[layer][path] = _output_tensors(inside[-1]) if inside else ()
            for name in outputs[layer][path]:
                scales[name] = scales.get(name, 1.0) * sums[layer].scale
    return outputs, scales


def _before_rectifier(outputs: Tensor, uses: list[Use]) -> set[int]:
    """Positions of the uses whose output reaches a rectifier before any other recorded map."""
    recorded = {use.edge.node: number for number, use in enumerate(uses) if use.edge is not None}
    found: set[int] = set()
    nodes = list(_ancestors([outputs.grad_fn], stop=()))
    for node in nodes:
        if _is_rectifier(node):
            parents = [parent for parent, _ in node.next_functions]
            for ancestor in _ancestors(parents, stop=recorded):
                if ancestor in recorded:
                    found.add(recorded[ancestor])
    return found


def _is_rectifier(node: Any) -> bool:
    return node.name().removesuffix("0").removesuffix("Backward") in _RECTIFIERS


def _ancestors(starts: Iterable[Any], stop: Iterable[Any]) -> Iterable[Any]:
    """Nodes of the autograd graph above ``starts``; those in ``stop`` and rectifiers end a walk."""
    seen: set[Any] = set()
    stack = [node for node in starts if node is not None]
    limited = bool(stop)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if limited and (node in stop or _is_rectifier(node)):
            continue
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
