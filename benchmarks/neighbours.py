"""Jobs of laplace-torch: the same posterior with each of its back-ends, and its gradient step."""

from __future__ import annotations

import importlib
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.networks import Batches
from benchmarks.peers import import_laplace
from benchmarks.timing import Job

__all__ = ["neighbour_hyper_jobs", "neighbour_jobs"]

_FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "laplace-torch curvlinops exact": ("CurvlinopsGGN", {}),
    "laplace-torch ASDL exact": ("AsdlGGN", {}),
    "laplace-torch BackPACK exact": ("BackPackGGN", {}),
    "laplace-torch curvlinops MC-1": ("CurvlinopsGGN", {"stochastic": True}),
    "laplace-torch ASDL MC-1": ("AsdlGGN", {"stochastic": True}),
    "laplace-torch BackPACK MC-1": ("BackPackGGN", {"stochastic": True}),
    "laplace-torch curvlinops empirical": ("CurvlinopsEF", {}),
    "laplace-torch ASDL empirical": ("AsdlEF", {}),
}


def neighbour_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """Kronecker fits; each includes its eigenvalue decomposition."""
    import_laplace()
    return [
        # each back-end leaves hooks of its own on the model: everyone gets a copy
        Job(name, _Fit(deepcopy(model), batches, backend, options))
        for name, (backend, options) in _FITS.items()
    ]


def neighbour_hyper_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """One gradient step on the prior precisions of a fitted posterior."""
    import_laplace()
    fitted = _Fit(deepcopy(model), batches, "CurvlinopsGGN", {})()
    log_precision = torch.zeros(len(list(model.parameters())), requires_grad=True)

    def gradient_step() -> None:
        log_precision.grad = None
        fitted.log_marginal_likelihood(log_precision.exp()).backward()

    return [Job("laplace-torch gradient step", gradient_step, calls=20)]


class _Fit:
    """One fit; the parts of laplace-torch that stay the same are looked up once."""

    def __init__(
        self, model: nn.Module, batches: Batches, backend: str, options: dict[str, Any]
    ) -> None:
        self._laplace = importlib.import_module("laplace")
        self._backend = getattr(importlib.import_module("laplace.curvature"), backend)
        self._model, self._batches, self._options = model, batches, options

    def __call__(self) -> Any:
        posterior = self._laplace.Laplace(
            self._model,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=self._backend,
            backend_kwargs=self._options,
        )
        posterior.fit(self._batches)
        return posterior
