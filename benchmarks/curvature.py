"""Jobs on margeq's side: curvature updates and hyperparameter steps on the trained LeNet."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.networks import Batches, epoch, lenet, optimizer_for
from benchmarks.timing import Job
from margeq.accumulation import InputCovCache, accumulate_with
from margeq.curvature.options import KfacOptions
from margeq.laplace import Spectrum, accumulate, decompose, effective_parameters, hyper_gradient
from margeq.likelihoods import Categorical
from margeq.priors import GaussianPrior

__all__ = ["captured_trace", "curvature_jobs", "hyper_jobs", "plain_jobs"]

_LIKELIHOOD = Categorical()


def plain_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """Training without any of this; the first job is the unit."""
    learner = lenet()
    optimizer = optimizer_for(learner)
    return [
        Job("plain epoch", lambda: epoch(learner, optimizer, batches)),
        Job("forward only", lambda: _forward(model, batches)),
    ]


def curvature_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """Curvature updates: one accumulation and its eigenvalue decomposition."""

    def update(**options: Any) -> Spectrum:
        # as training does it, which has compared the rules with autograd before
        return decompose(accumulate_with(model, batches, _LIKELIHOOD, KfacOptions(**options)))

    cache = InputCovCache()
    draws = KfacOptions(hessian_root="mc", position_fraction=0.1)

    def cached() -> Spectrum:
        state = accumulate_with(model, batches, _LIKELIHOOD, draws, cache=cache)
        return decompose(state)

    tenth = {"position_fraction": 0.1}
    return [
        Job("margeq exact", update, 5.5),
        Job("margeq adaptive", lambda: update(hessian_root="adaptive"), 3.2),
        Job(
            "margeq adaptive, 10 % of positions",
            lambda: update(hessian_root="adaptive", **tenth),
            1.8,
        ),
        Job("margeq MC-1", lambda: update(hessian_root="mc")),
        Job("margeq MC-1, 10 % of positions", lambda: update(hessian_root="mc", **tenth)),
        Job("margeq MC-1, 10 % of positions, first layer cached", cached, 1.2),
    ]


def hyper_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """One step on the prior precisions, from the cached eigenvalues."""
    state = accumulate(model, batches, _LIKELIHOOD)
    spectrum, prior = decompose(state), GaussianPrior(model)
    mackay_prior = deepcopy(prior)

    def mackay() -> None:
        gammas = effective_parameters(spectrum, mackay_prior, _LIKELIHOOD)
        mackay_prior.assign(
            {name: (gamma / spectrum.square_norms[name]).log() for name, gamma in gammas.items()}
        )

    return [
        Job("margeq eigenvalues alone", lambda: decompose(state)),
        Job("margeq gradient step", lambda: hyper_gradient(spectrum, prior, _LIKELIHOOD), 0.02, 20),
        Job("margeq MacKay step", mackay, 0.02, 20),
    ]


def captured_trace(model: nn.Module, batches: Batches) -> float:
    """Share of the output Hessian's trace that the adaptive root keeps."""
    return accumulate(model, batches, _LIKELIHOOD, hessian_root="adaptive").captured_trace


@torch.no_grad()
def _forward(model: nn.Module, batches: Batches) -> None:
    for images, _ in batches:
        model(images)
