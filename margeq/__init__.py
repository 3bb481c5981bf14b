"""margeq: which symmetry, which layer, how much of it? Asked of the training data alone.

Wrap a model in candidate paths, call :func:`optimize_marglik`, read which path each layer chose.
Names are imported on first use, so that ``import margeq`` is cheap.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from margeq import (
        adjoint,
        bases,
        callbacks,
        checkpoint,
        convert,
        curvature,
        data,
        distributed,
        errors,
        group_distributions,
        groups,
        integrations,
        laplace,
        layers,
        models,
        posterior,
        runs,
        testing,
        trackers,
    )
    from margeq.comparison import compare
    from margeq.convert import harden, relax
    from margeq.curvature.final_layer import last_layer
    from margeq.curvature.io import LinearIO, register_kfac_rule
    from margeq.effective_dim import effective_dimension
    from margeq.laplace import log_marginal_likelihood
    from margeq.likelihoods import Categorical, Gaussian
    from margeq.optimize import optimize_marglik
    from margeq.parameters import named_hyperparameters, named_weights
    from margeq.priors import GaussianPrior
    from margeq.training.result import MargLikResult

__version__ = "0.1.0"

__all__ = [
    "Categorical",
    "Gaussian",
    "GaussianPrior",
    "LinearIO",
    "MargLikResult",
    "adjoint",
    "bases",
    "callbacks",
    "checkpoint",
    "compare",
    "convert",
    "curvature",
    "data",
    "distributed",
    "effective_dimension",
    "errors",
    "group_distributions",
    "groups",
    "harden",
    "integrations",
    "laplace",
    "last_layer",
    "layers",
    "log_marginal_likelihood",
    "models",
    "named_hyperparameters",
    "named_weights",
    "optimize_marglik",
    "posterior",
    "register_kfac_rule",
    "relax",
    "runs",
    "testing",
    "trackers",
]

_NAMESPACES = (
    "adjoint",
    "bases",
    "callbacks",
    "checkpoint",
    "convert",
    "curvature",
    "data",
    "distributed",
    "errors",
    "group_distributions",
    "groups",
    "integrations",
    "laplace",
    "layers",
    "models",
    "posterior",
    "runs",
    "testing",
    "trackers",
)
_HOMES = {
    "Categorical": "margeq.likelihoods",
    "Gaussian": "margeq.likelihoods",
    "GaussianPrior": "margeq.priors",
    "LinearIO": "margeq.curvature.io",
    "MargLikResult": "margeq.training.result",
    "compare": "margeq.comparison",
    "effective_dimension": "margeq.effective_dim",
    "harden": "margeq.convert",
    "last_layer": "margeq.curvature.final_layer",
    "log_marginal_likelihood": "margeq.laplace",
    "named_hyperparameters": "margeq.parameters",
    "named_weights": "margeq.parameters",
    "optimize_marglik": "margeq.optimize",
    "register_kfac_rule": "margeq.curvature.io",
    "relax": "margeq.convert",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in (*_NAMESPACES, *_HOMES):
        raise AttributeError(f"module 'margeq' has no attribute {name!r}")
    with _no_collection():
        if name in _NAMESPACES:
            return import_module(f"margeq.{name}")
        # the rules of the built-in layers register themselves when the layers are imported
        import_module("margeq.layers")
        return getattr(import_module(_HOMES[name]), name)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Imports leave no garbage, but set off collections of all torch objects: 0.1 s each."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted(__all__)
