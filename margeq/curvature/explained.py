"""Do the rules explain the gradients? Compared with autograd, once, before they are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from margeq.curvature.capture import (
    Use,
    backpropagate,
    eval_mode,
    require_batch_axis,
    run_recorded,
    used_differently,
)
from margeq.curvature.sampling import tensors_of
from margeq.errors import DataError, UnsupportedLayerError

__all__ = ["check_calls", "check_rules"]


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
        _require_outputs(outputs, n_data)
        require_batch_axis(uses, n_data)
        check_calls(weights, outputs, uses)


def check_calls(weights: Mapping[str, nn.Parameter], outputs: Tensor, uses: Sequence[Use]) -> None:
    """As :func:`check_rules`, for calls that are recorded already; their graph is kept.

    Raises:
        UnsupportedLayerError: naming the weight and the relative difference.
    """
    # a fixed, sign-changing direction: no random state is touched
    column = torch.linspace(-1.0, 1.3, outputs.numel(), device=outputs.device)
    column = column.reshape(outputs.shape).to(outputs.dtype)
    by_rule = _gradients_by_rule(weights, uses, backpropagate(outputs, uses, column))
    by_autograd: dict[str, Tensor | None] = dict.fromkeys(weights)
    if outputs.requires_grad:
        found = torch.autograd.grad(
            outputs, list(weights.values()), column, retain_graph=True, allow_unused=True
        )
        by_autograd = dict(zip(weights, found, strict=True))
    for name, parameter in weights.items():
        _compare(name, parameter, by_rule.get(name), by_autograd[name])


def _require_outputs(outputs: Any, n_data: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n_data:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(f"the model returned {shape} for {n_data} data; expected [{n_data}, ...]")


def _gradients_by_rule(
    weights: Mapping[str, nn.Parameter], uses: Sequence[Use], grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
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
            gradient = torch.einsum(product, io.output_grads, io.inputs.to(grad.dtype))
            gradient = gradient.reshape(weights[name].shape)
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _compare(
    name: str, parameter: nn.Parameter, by_rule: Tensor | None, by_autograd: Tensor | None
) -> None:
    if by_autograd is None and by_rule is None:
        return
    rule = torch.zeros_like(parameter) if by_rule is None else by_rule
    auto = torch.zeros_like(parameter) if by_autograd is None else by_autograd
    scale = auto.double().norm()
    difference = (rule.double() - auto.double()).norm()
    tolerance = torch.finfo(parameter.dtype).eps ** 0.5
    if difference > max(tolerance, 3e-3) * scale + 1e-12:
        raise UnsupportedLayerError(
            f"the curvature rule of {name!r} does not explain its gradient (relative difference "
            f"{float(difference / scale.clamp_min(1e-300)):.2g}). Is the weight also used outside "
            f"its module's forward, made from other parameters by a hook (weight_norm, "
            f"spectral_norm, pruning), or its input changed in place? Freeze it, exclude it with "
            f"parameters=[...], or register a rule for the module that really uses it"
        )
