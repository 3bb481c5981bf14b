"""The one form that every curvature rule translates its layer into, and the open registry.

    y[n,t,b,o] = sum_i theta[o,b,i] * a[n,t,b,i]

``n`` datum, ``v`` column of the loss-Hessian root, ``t`` shared position, ``b`` independent block,
``o`` out, ``i`` in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from margeq.curvature.frames import Frames
from margeq.errors import ConfigError

__all__ = [
    "Heard",
    "InputRows",
    "Layout",
    "LinearIO",
    "Rule",
    "bias_rows",
    "register_kfac_rule",
    "register_split_rule",
    "rule_for",
    "sampled_rows",
    "stored",
]

Layout = Literal["obi", "boi", "bio"]
"""Order in which a parameter stores its axes; as subscripts of an einsum."""
PositionSampler = Callable[[int], "Tensor | None"]


@dataclass(frozen=True)
class LinearIO:
    """Input and output gradient of one weight: ``y[n,t,b,o] = sum_i theta[o,b,i] a[n,t,b,i]``.

    Attributes:
        inputs: ``[n, t, b, i]``.
        output_grads: gradients of the output with respect to ``y``, ``[v, n, t, b, o]``, or
            ``[v, n, t, 1, o]`` if all blocks write the same output.
        layout: order of the axes in which the parameter itself is stored.
        is_bias: the inputs are constant ones, for which the block can be exact at no cost.
    """

    inputs: Tensor
    output_grads: Tensor
    layout: Layout = "obi"
    is_bias: bool = False


@dataclass(frozen=True)
class InputRows:
    """Inputs of one weight, possibly at a sample of the shared positions only.

    The shared positions of a weight that sees its inputs in several frames are ``(frame, place)``;
    places are sampled, frames never.

    Attributes:
        rows: ``[n, m, b, i]``, all sampled positions, or with ``frames`` all sampled places.
        n_positions: number of shared positions ``t`` per datum, frames times places.
        layout: as in :class:`LinearIO`.
        is_bias: as in :class:`LinearIO`.
        n_frames: number of frames that ``t`` runs over first.
        frames: how the rows look in each frame, if they do not yet run over them.
        frame_weights: factors ``[h]`` of the layer's output in each frame, where they differ. Rows
            and output gradients both carry their root, so that products carry the factor.
        joint: all blocks write the same output, so that output gradients ``[v, n, t, 1, o]`` and
            their covariance are theirs together.
    """

    rows: Tensor
    n_positions: int
    layout: Layout = "obi"
    is_bias: bool = False
    n_frames: int = 1
    frames: Frames | None = None
    frame_weights: Tensor | None = None
    joint: bool = False

    def expanded(self) -> InputRows:
        """The same with rows that run over the frames."""
        if self.frames is None:
            return self
        return replace(self, rows=self.frames.apply(self.rows), frames=None)


class Heard(Protocol):
    """Receives the maps inside layers that call no modules."""

    def __call__(
        self, layer: nn.Module, names: Sequence[str], rule: Rule, x: Tensor, y: Tensor, /
    ) -> Tensor:
        """Note ``y``, computed from ``x`` by these parameters; gives what to go on with."""
        ...


class KfacRule(Protocol):
    """What a user registers for a layer type."""

    def __call__(self, layer: Any, x: Tensor, grad_y: Tensor, /) -> Mapping[str, LinearIO]:
        """Translate input ``x`` and output gradients ``[v, *y.shape]`` into one IO per weight."""
        ...


@dataclass(frozen=True, eq=False)
class Rule:
    """The two halves of a rule, which the accumulation needs at different times.

    Attributes:
        inputs: ``(layer, x, sampler) -> {parameter: InputRows}``; ``sampler(t)`` gives the sampled
            positions (of a weight with frames: places) ``[n, m]`` or ``None`` for all of them.
        output_grads: ``(layer, x, grad_y) -> {parameter: [v, n, t, b, o]}``.
        listen: for a layer whose maps are no modules: ``(layers, heard)`` opens a context in which
            each of these maps is reported; see :class:`Heard`.
        starts_at: parameters that a random start would destroy, such as those that scale what they
            get: the value at which all their entries start for outputs of unit size, or ``None``
            for the values that they have.
    """

    inputs: Callable[[Any, Tensor, PositionSampler], Mapping[str, InputRows]]
    output_grads: Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]
    listen: Callable[[Sequence[nn.Module], Heard], AbstractContextManager[Any]] | None = None
    starts_at: Mapping[str, float | None] = field(default_factory=dict)

    def io(self, layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, LinearIO]:
        """Both halves together, at all positions."""
        rows = self.inputs(layer, x, _all_positions)
        grads = self.output_grads(layer, x, grad_y)
        return {
            name: LinearIO(row.expanded().rows, grads[name], row.layout, row.is_bias)
            for name, row in rows.items()
        }


_RULES: dict[type[nn.Module], Rule] = {}


def register_kfac_rule(
    layer_type: type[nn.Module],
) -> Callable[[KfacRule], KfacRule]:
    """Register ``rule(layer, x, grad_y) -> {parameter: LinearIO}`` for exactly ``layer_type``.

    Subclasses do not inherit the rule: another ``forward`` would silently make it wrong.

    Args:
        layer_type: the module class, not a parent of it.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        ConfigError: if ``layer_type`` is no module class.
    """
    _require_module_type(layer_type)

    def decorate(rule: KfacRule) -> KfacRule:
        _RULES[layer_type] = _split(rule)
        return rule

    return decorate


def register_split_rule(*layer_types: type[nn.Module], rule: Rule) -> None:
    """Register a rule whose inputs and gradients can be had separately, which is faster."""
    for layer_type in layer_types:
        _require_module_type(layer_type)
        _RULES[layer_type] = rule


def rule_for(layer_type: type[nn.Module]) -> Rule | None:
    """The rule of exactly this type, or ``None``."""
    return _RULES.get(layer_type)


def registered_types() -> tuple[type[nn.Module], ...]:
    """Every type with a rule."""
    return tuple(_RULES)


def bias_rows(n_data: int, n_positions: int, n_blocks: int, like: Tensor) -> InputRows:
    """Constant-one inputs ``[n, t, b, 1]`` of a bias, without memory of their own."""
    ones = torch.ones((), dtype=like.dtype, device=like.device)
    return InputRows(ones.expand(n_data, n_positions, n_blocks, 1), n_positions, is_bias=True)


def sampled_rows(rows: Tensor, sampler: PositionSampler) -> Tensor:
    """Rows ``[n, t, ...]`` at the positions that a sampler chooses."""
    positions = sampler(rows.shape[1])
    if positions is None:
        return rows
    return rows[torch.arange(len(rows), device=rows.device)[:, None], positions]


def stored(matrix: Tensor, layout: Layout) -> Tensor:
    """A matrix ``[o, b, i, o, b, i]`` with both triples in the order of a parameter's storage."""
    axes = ["obi".index(axis) for axis in layout]
    return matrix.permute(*axes, *(3 + axis for axis in axes))


def _require_module_type(layer_type: object) -> None:
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise ConfigError(f"a curvature rule belongs to an nn.Module class, not to {layer_type!r}")


def _all_positions(_: int) -> None:
    return None


def _split(rule: KfacRule) -> Rule:
    """Serve both halves from one function: inputs with zero columns, gradients with all."""

    def inputs(layer: nn.Module, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
        with torch.no_grad():
            # the output's shape is only known to the layer, so ask it once, without columns
            y = layer.forward(x)
        no_columns = torch.zeros((0, *y.shape), dtype=y.dtype, device=y.device)
        return {name: _subsample(io, sampler) for name, io in rule(layer, x, no_columns).items()}

    def output_grads(layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
        return {name: io.output_grads for name, io in rule(layer, x, grad_y).items()}

    return Rule(inputs, output_grads)


def _subsample(io: LinearIO, sampler: PositionSampler) -> InputRows:
    rows = io.inputs if io.is_bias else sampled_rows(io.inputs, sampler)
    return InputRows(rows, io.inputs.shape[1], io.layout, io.is_bias)
