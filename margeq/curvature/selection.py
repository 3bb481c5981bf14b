"""Which weights a curvature pass is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from margeq.curvature.bare import bare_weights
from margeq.curvature.full import require_small
from margeq.curvature.io import rule_for
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, MissingRuleError
from margeq.parameters import named_weights, owners, require_one_device, unwrapped

__all__ = ["weights_with_rules"]


def weights_with_rules(
    model: nn.Module, parameters: str | Sequence[str], options: KfacOptions
) -> dict[str, nn.Parameter]:
    """The weights to integrate out, checked: there are some, and each one has a curvature rule.

    Returns:
        As :func:`margeq.named_weights`.

    Raises:
        ConfigError: for a model without weights, on several devices, or without these names.
    """
    model = unwrapped(model)
    require_one_device(model)
    weights = named_weights(model, parameters)
    if not weights:
        raise ConfigError(
            "the model has no trainable weight to learn a prior for: set requires_grad=True on some"
        )
    _require_rules(model, weights)
    options.require_known(weights)
    if options.curvature == "full":
        require_small(weights)
    return weights


def _require_rules(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Check that every weight sits in a module type with a curvature rule.

    Raises:
        MissingRuleError: naming the module, its type, its parameters and the ways out.
    """
    bare = bare_weights(model, weights)
    without: dict[nn.Module, list[str]] = {}
    for name, (layer, _) in owners(model).items():
        if name in weights and name not in bare and rule_for(type(layer)) is None:
            without.setdefault(layer, []).append(name)
    for layer, (first, *others) in without.items():
        kind, prefix = type(layer).__name__, first.rpartition(".")[0] or "the model itself"
        more = f", nor for {', '.join(map(repr, others))}" if others else ""
        raise MissingRuleError(
            f"no curvature rule for parameter {first!r} of {prefix} ({kind}){more}. Ways out: "
            f"freeze it (requires_grad_(False)); exclude it from the Laplace approximation "
            f"(parameters=[...]); replace the module; {_last_way_out(layer)}"
        )


def _last_way_out(layer: nn.Module) -> str:
    kind = type(layer)
    if "torch.nn.utils.parametrize" in (kind.__module__, kind.__bases__[0].__module__):
        return (
            "or take its parametrisation off (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return f"or register a rule with margeq.register_kfac_rule({kind.__name__})"
