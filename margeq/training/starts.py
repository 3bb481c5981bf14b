"""Where a run starts: weights, precisions, switched-off paths and gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.paths import path_prefixes, path_sums
from margeq.priors import GaussianPrior
from margeq.subsets import SymmetryGate, trained_gates
from margeq.training.function_scale import FunctionScale

__all__ = ["RELAXATION", "Start", "apply_start", "draw_path", "resolve_starts"]

RELAXATION = 100.0
"""Near the symmetric limit, less constrained paths have 1/100 of the function variance."""

_ENDS: dict[str, Callable[[SymmetryGate], None]] = {
    "whole": lambda gate: gate.to_whole(),
    "identity": lambda gate: gate.to_identity(),
}


@dataclass(frozen=True)
class Start:
    """One way to begin.

    Attributes:
        name: ``"symmetric"``, ``"free"``, ``"current"`` or ``"only:<path>"``, and perhaps the end
            of the gates after an @.
        near_symmetric: less constrained paths start near zero.
        draw: draw new weights; ``False`` keeps the model's own.
        only: the single path that is on in every layer that has it.
        gates: where gates that are trained begin: at the ``"whole"`` group, at the ``"identity"``
            alone, or, ``None``, where the model has them.
    """

    name: str
    near_symmetric: bool = False
    draw: bool = True
    only: str | None = None
    gates: str | None = None


def resolve_starts(
    model: nn.Module, restarts: str | Sequence[str], hyperparameters: Iterable[Tensor] = ()
) -> list[Start]:
    """Starts by name; ``"auto"`` is symmetric, free and each path alone, in this order.

    Without candidate paths ``"auto"`` is a single run from the model's current weights. With gates
    among the hyperparameters the first of these starts follows twice more, with all of them at the
    whole group and at the identity: at an end the evidence can have no gradient in a gate.

    Args:
        model: any module tree.
        restarts: ``"auto"``, or names.
        hyperparameters: tensors inside the network that the run trains.

    Returns:
        The starts, in the order in which they run.

    Raises:
        ConfigError: for an unknown name, or an end of gates where there are none.
    """
    layers = path_prefixes(model)
    paths = list(dict.fromkeys(path for named in layers.values() for path in named))
    has_gates = bool(trained_gates(model, hyperparameters))
    if not isinstance(restarts, (str, list, tuple)):
        raise ConfigError(f"restarts={restarts!r}: use 'auto' or a list of names")
    if restarts == "auto":
        alone = [f"only:{path}" for path in paths] if len(paths) > 1 else []
        names = ["symmetric", "free", *alone] if alone else ["symmetric" if paths else "current"]
        names += [f"{names[0]}@{end}" for end in _ENDS] if has_gates else []
    else:
        names = [restarts] if isinstance(restarts, str) else list(restarts)
    if not names:
        raise ConfigError("restarts is empty; use 'auto', 'symmetric', or a list of starts")
    return [_start(name, paths, has_gates) for name in names]


def _start(name: str, paths: Sequence[str], has_gates: bool) -> Start:
    known = {
        "symmetric": Start("symmetric", near_symmetric=True),
        "free": Start("free"),
        "current": Start("current", draw=False),
    } | {f"only:{path}": Start(f"only:{path}", only=path) for path in paths}
    if name in known:
        return known[name]
    base, _, end = str(name).rpartition("@")
    if base not in known or end not in _ENDS:
        ends = f", each also with @{' or @'.join(_ENDS)}" if has_gates else ""
        raise ConfigError(
            f"restarts: unknown start {name!r}; this model has {', '.join(known)}{ends}"
        )
    if not has_gates:
        raise ConfigError(
            f"restarts: {name!r} is about gates, and this run trains none (the model has none, or "
            f"they are frozen, trained_by='loss', or held by hyper_solver='fixed'); use {base!r}"
        )
    return replace(known[base], name=name, gates=end)


def apply_start(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    prior: GaussianPrior,
    scale: FunctionScale,
    start: Start,
    *,
    function_scale_prior: bool,
    seed: int,
    hyperparameters: Iterable[Tensor] = (),
) -> None:
    """Put model and prior into the start's state, and gates among the hyperparameters."""
    if start.gates is not None:
        _set_gates(model, hyperparameters, start.gates)
    for layer, named in path_prefixes(model).items():
        pathways = path_sums(model)[layer]
        # on before off: a layer must not be without a path in between
        for path in named if start.draw else ():
            pathways.switch_on(path)
        for path in named:
            if start.only in named and path != start.only:
                pathways.switch_off(path)
    precision = dict(scale.precision)
    if start.near_symmetric:
        for name in _relaxed_tensors(model, scale):
            precision[name] *= RELAXATION
    if start.draw:
        _draw(weights, precision, scale, seed)
    _silence_off_paths(model, weights)
    _set_prior(prior, precision, scale, function_scale_prior)


@torch.no_grad()
def _set_gates(model: nn.Module, hyperparameters: Iterable[Tensor], end: str) -> None:
    """Put gates at an end; of what is frozen in them, nothing moves."""
    trained = list(hyperparameters)
    moves = {id(tensor) for tensor in trained}
    for gate in trained_gates(model, trained).values():
        parameters = cast(nn.Module, gate).parameters()
        held = [(p, p.detach().clone()) for p in parameters if id(p) not in moves]
        _ENDS[end](gate)
        for parameter, value in held:
            parameter.copy_(value)


def draw_path(
    weights: Mapping[str, nn.Parameter],
    tensors: Sequence[str],
    prior: GaussianPrior,
    scale: FunctionScale,
    relaxed: Sequence[str],
    seed: int,
) -> None:
    """Give one path new weights near zero, so that the evidence can ask for it again."""
    precision = {
        name: scale.precision[name] * (RELAXATION if name in relaxed else 1.0) for name in tensors
    }
    _draw({name: weights[name] for name in tensors}, precision, scale, seed)
    prior.assign(_group_logs(prior, precision))


def _relaxed_tensors(model: nn.Module, scale: FunctionScale) -> list[str]:
    sums = path_sums(model)
    # one factor only: relaxing both factors of a product would square the effect
    return [
        name
        for layer, outputs in scale.path_outputs.items()
        for path in sums[layer].less_constrained(scale.shapes)
        for name in outputs[path]
    ]


@torch.no_grad()
def _draw(
    weights: Mapping[str, nn.Parameter],
    precision: Mapping[str, float],
    scale: FunctionScale,
    seed: int,
) -> None:
    """``N(0, 1 / delta_0)`` per tensor, seeded by its name: a path alone equals its own model.

    Biases start at zero, weights that only scale at their constant, bare ones where they are.
    """
    for name, weight in weights.items():
        if scale.is_bias[name]:
            weight.zero_()
            continue
        if name in scale.starts_at:
            constant = scale.starts_at[name]
            if constant is not None:
                weight.fill_(constant / math.sqrt(precision[name]))
            continue
        generator = torch.Generator().manual_seed(crc32(f"{seed}:{name}".encode()))
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(draw / math.sqrt(precision[name]))


@torch.no_grad()
def _silence_off_paths(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    for layer, named in path_prefixes(model).items():
        active = path_sums(model)[layer].active
        for path, prefix in named.items():
            if path not in active:
                for name, weight in weights.items():
                    if name.startswith(f"{prefix}."):
                        weight.zero_()


def _set_prior(
    prior: GaussianPrior,
    precision: Mapping[str, float],
    scale: FunctionScale,
    function_scale_prior: bool,
) -> None:
    prior.set_function_scale(scale.precision)
    prior.assign(
        _group_logs(prior, precision) if function_scale_prior else prior.log_prior_precision
    )


def _group_logs(prior: GaussianPrior, precision: Mapping[str, float]) -> dict[str, float]:
    """Mean log precision of each group that has members in ``precision``."""
    return prior.group_means({name: math.log(value) for name, value in precision.items()})
