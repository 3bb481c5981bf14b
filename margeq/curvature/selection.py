"""Which weights a curvature pass is about."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from margeq.curvature.capture import require_rules
from margeq.curvature.full import require_small
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.parameters import named_weights, require_one_device, unwrapped

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
        raise ConfigError("the model has no trainable weight to learn a prior for")
    require_rules(model, weights)
    options.require_known(weights)
    if options.curvature == "full":
        require_small(weights)
    return weights
