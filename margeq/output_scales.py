"""Sums over the data in units in which all outputs have one noise.

With the weights ``w_c = sigma^2 / sigma_c^2`` of outputs, the geometric mean ``sigma`` and
``kappa = 1 / (sigma^2 T)``, that of

    kappa sum_c w_c H_c   and   -1/2 kappa sum_c w_c SSE_c

is the evidence of a single noise ``sigma``: of outputs and targets times ``w_c^1/2``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from margeq.curvature.outputs import OutputCurvature, OutputEigenvalues, OutputFullEigenvalues
from margeq.errors import ConfigError
from margeq.likelihoods import Gaussian, Likelihood

__all__ = ["of_scaled_outputs"]

_KEPT = (OutputCurvature, OutputEigenvalues, OutputFullEigenvalues)
_Sums = TypeVar("_Sums")


def of_scaled_outputs(sums: _Sums, likelihood: Likelihood) -> tuple[_Sums, Likelihood]:
    """Sums and likelihood with one noise for all outputs, of the same evidence.

    Args:
        sums: a curvature state, or a spectrum.
        likelihood: noise and temperature.

    Returns:
        The arguments themselves without a noise per output; else sums with plain curvature, and a
        likelihood with one noise, both differentiable in the noises.

    Raises:
        ConfigError: for a noise per output and sums that were accumulated without.
    """
    found: Any = sums
    field = "curvature" if hasattr(found, "curvature") else "eigenvalues"
    curvature = getattr(found, field)
    n_outputs = found.fit.numel()
    if isinstance(likelihood, Gaussian) and likelihood.weighs_outputs:
        weights = likelihood.output_weights(n_outputs)
        shared: Likelihood = likelihood.of_scaled_outputs(n_outputs)
    else:
        if not isinstance(curvature, _KEPT):
            return sums, likelihood
        weights, shared = torch.ones(n_outputs, dtype=torch.float64), likelihood
    weights = weights.to(found.fit.device)
    if not isinstance(curvature, _KEPT):
        _require_equal(weights)
        return sums, shared
    weighted = {field: curvature.weighted(weights), "fit": found.fit * weights}
    return replace(found, **weighted), shared


def _require_equal(weights: Tensor) -> None:
    if not torch.allclose(weights, torch.ones_like(weights), rtol=0.0, atol=1e-12):
        raise ConfigError(
            "the curvature is that of all outputs together, which a noise per output cannot weigh "
            "any more; accumulate with this likelihood"
        )
