"""Do the rules explain the gradients? Compared with autograd, once, before they are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import map_tensors
from margeq.curvature.capture import (
    Use,
    backpropagate,
    eval_mode,
    forward,
    record,
    run_recorded,
    used_differently,
)
from margeq.curvature.sampling import tensors_of
from margeq.errors import UnsupportedLayerError

__all__ = ["check_calls", "check_data_axis", "check_rules", "require_batch_axis"]


def check_rules(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Any) -> None:
    """Compare the gradient of each weight by its rule with autograd's, on one batch.

    It catches what no rule can see: a weight used outside its module's ``forward``, a subclass
    trick, an input changed in place.

    Raises:
        UnsupportedLayerError: naming the weight and the relative difference.
    """
    n_data = len(tensors_of(inputs)[0])
    with eval_mode(model), torch.enable_grad():
        outputs, uses = run_recorded(model, weights, inputs)
        require_batch_axis(uses, n_data)
        check_data_axis(model, weights, inputs)
        check_calls(weights, outputs, uses)


def check_calls(weights: Mapping[str, nn.Parameter], outputs: Tensor, uses: Sequence[Use]) -> None:
    """As :func:`check_rules`, for calls that are recorded already; their graph is kept.

    Raises:
        UnsupportedLayerError: naming the weight and the relative difference.
    """
    # a fixed, sign-changing direction: no random state is touched
    column = torch.linspace(-1.0, 1.3, outputs.numel(), device=outputs.device)
    column = column.reshape(outputs.shape).to(outputs.dtype)
    by_rule, magnitudes = _gradients_by_rule(weights, uses, backpropagate(outputs, uses, column))
    by_autograd: dict[str, Tensor | None] = dict.fromkeys(weights)
    if outputs.requires_grad:
        found = torch.autograd.grad(
            outputs, list(weights.values()), column, retain_graph=True, allow_unused=True
        )
        by_autograd = dict(zip(weights, found, strict=True))
    for name, parameter in weights.items():
        # where all terms cancel, as for the bias of an attention's keys, rounding is what is left
        rounding = 10 * torch.finfo(parameter.dtype).eps * magnitudes.get(name, 0.0)
        _compare(name, parameter, by_rule.get(name), by_autograd[name], rounding)


def check_data_axis(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Any) -> None:
    """Check that the rows of each call are data, by a run with one datum less.

    A table of positions, or maps with the sequence first, may have as many rows as there are data
    by chance. Their gradients in sum are then explained, those of each datum are not.

    Raises:
        UnsupportedLayerError: naming a layer whose rows do not follow the data.
    """
    n_data = len(tensors_of(inputs)[0])
    if n_data < 2:
        return
    fewer = map_tensors(lambda t: t[:-1], inputs)
    with eval_mode(model), torch.no_grad(), record(model, weights) as uses:
        try:
            forward(model, fewer)
        except Exception:
            return  # a model of one batch size, whatever it says about others
    require_batch_axis(uses, n_data - 1)


def require_batch_axis(uses: Sequence[Use], n_data: int) -> None:
    """Check that each recorded call saw one row per datum.

    Raises:
        UnsupportedLayerError: if a module was called with another leading size.
    """
    for use in uses:
        if len(use.x) != n_data or len(use.y) != n_data:
            raise UnsupportedLayerError(
                f"{use.prefix or 'the model'} ({type(use.layer).__name__}) was called with "
                f"{len(use.x)} rows for {n_data} data; {_axis_first(use)}; or freeze it "
                f"(requires_grad_(False)), or exclude it with parameters=[...]"
            )


def _axis_first(use: Use) -> str:
    if isinstance(use.layer, nn.Embedding):
        return (
            "give it indices of every datum: a table of positions takes "
            "torch.arange(length).expand(n, -1), not torch.arange(length)"
        )
    return (
        "keep the data axis first (batch_first=True) and leave shared positions in axes of their "
        "own, [n, ..., features]"
    )


def _gradients_by_rule(
    weights: Mapping[str, nn.Parameter], uses: Sequence[Use], grads: Sequence[Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums over data and positions, and the norms of the sums of absolute values."""
    total: dict[str, Tensor] = {}
    magnitudes: dict[str, float] = {}
    forms: dict[str, object] = {}
    for use, grad in zip(uses, grads, strict=True):
        if grad is None:
            continue
        for local, io in use.rule.io(use.layer, use.x, grad[None]).items():
            if local not in use.names:
                continue
            name = use.names[local]
            form = (io.layout, io.inputs.shape[2:])
            if forms.setdefault(name, form) != form:
                raise used_differently(name)
            product = f"vntbo,ntbi->{io.layout}"
            inputs = io.inputs.to(grad.dtype)
            gradient = torch.einsum(product, io.output_grads, inputs)
            gradient = gradient.reshape(weights[name].shape)
            absolute = torch.einsum(product, io.output_grads.abs(), inputs.abs())
            magnitudes[name] = magnitudes.get(name, 0.0) + float(absolute.detach().double().norm())
            total[name] = total[name] + gradient if name in total else gradient
    return total, magnitudes


def _compare(
    name: str,
    parameter: nn.Parameter,
    by_rule: Tensor | None,
    by_autograd: Tensor | None,
    rounding: float,
) -> None:
    if by_autograd is None and by_rule is None:
        return
    rule = torch.zeros_like(parameter) if by_rule is None else by_rule
    auto = torch.zeros_like(parameter) if by_autograd is None else by_autograd
    scale = auto.double().norm()
    difference = (rule.double() - auto.double()).norm()
    tolerance = torch.finfo(parameter.dtype).eps ** 0.5
    if difference > max(tolerance, 3e-3) * scale + rounding + 1e-12:
        raise UnsupportedLayerError(
            f"the curvature rule of {name!r} does not explain its gradient (relative difference "
            f"{float(difference / scale.clamp_min(1e-300)):.2g}). Is the weight also used outside "
            f"its module's forward, made from other parameters by a hook (weight_norm, "
            f"spectral_norm, pruning), or its input changed in place? Freeze it, exclude it with "
            f"parameters=[...], or register a rule for the module that really uses it"
        )
