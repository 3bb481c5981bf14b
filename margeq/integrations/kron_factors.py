"""Kronecker factors of other libraries as they come, through laplace-torch's interfaces.

Nothing is corrected here: this is what their users get. See :mod:`margeq.testing.crosscheck`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.errors import MissingRuleError
from margeq.integrations.neighbours import import_laplace, import_neighbour
from margeq.parameters import named_weights

__all__ = ["neighbour_factors"]

_PACKAGES = {
    "CurvlinopsGGN": ("curvlinops", "curvlinops-for-pytorch"),
    "BackPackGGN": ("backpack", "backpack-for-pytorch"),
    "AsdlGGN": ("asdl", "asdfghjkl"),
}


def neighbour_factors(
    interface: str,
    model: nn.Module,
    batches: Iterable[Batch],
    likelihood: str,
    *,
    stochastic: bool = False,
    **options: Any,
) -> dict[str, list[Tensor]]:
    """Sums over the data of one of laplace-torch's back-ends.

    Args:
        interface: name in ``laplace.curvature``.
        model: a copy is used, because some libraries leave hooks behind.
        batches: the data.
        likelihood: ``"classification"`` or ``"regression"``.
        stochastic: Monte Carlo instead of the exact GGN.
        **options: of one of its passes.

    Returns:
        Weight name -> one matrix, or two whose Kronecker product is its curvature.

    Raises:
        ConfigError: if a library is not installed.
        MissingRuleError: if the library leaves out a weight, without saying so.
    """
    import_laplace()
    import_neighbour(*_PACKAGES[interface])
    twin = deepcopy(model).eval()
    everything = list(batches)
    n_data = sum(len(batch) for batch in everything)
    kron = None
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        kind = getattr(importlib.import_module("laplace.curvature"), interface)
        backend = kind(twin, likelihood, stochastic=stochastic)
        for batch in everything:
            twin.zero_grad()
            _, part = backend.kron(batch.inputs, batch.targets, N=n_data, **options)
            kron = part if kron is None else kron + part
    factors = [] if kron is None else [[f.detach() for f in block] for block in kron.kfacs]
    return _by_name(interface, named_weights(model), factors)


def _by_name(
    interface: str, weights: Mapping[str, nn.Parameter], factors: list[list[Tensor]]
) -> dict[str, list[Tensor]]:
    """They come as a list, from which some libraries silently leave out what they do not know."""
    for name, block in zip(weights, factors, strict=False):
        size = 1
        for factor in block:
            size *= len(factor)
        if size != weights[name].numel():
            raise MissingRuleError(
                f"{interface} gives {name!r} a curvature of {size} numbers, it has "
                f"{weights[name].numel()}"
            )
    if len(factors) != len(weights):
        left_out = list(weights)[len(factors) :]
        raise MissingRuleError(f"{interface} silently leaves out {', '.join(left_out)}")
    return dict(zip(weights, factors, strict=True))
