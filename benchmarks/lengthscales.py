"""Gradients of the evidence in the lengthscales of an S-CONV LeNet, each way to find them."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.full_graph import full_graph_gradient
from benchmarks.networks import Batches, epoch, optimizer_for, sparse_lenet
from benchmarks.timing import Job
from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit, network_gradient
from margeq.closed_form import closed_form_gradient, factor_cotangent, fixed_filters
from margeq.curvature.options import KfacOptions
from margeq.laplace import decompose
from margeq.likelihoods import Categorical
from margeq.parameters import named_hyperparameters
from margeq.priors import GaussianPrior

__all__ = ["EPOCHS", "N_DATA", "lengthscale_jobs", "memory_jobs"]

N_DATA, EPOCHS = 2560, 10
"""Twenty batches, so that one of them is a twentieth."""

_LIKELIHOOD = Categorical()


def lengthscale_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """The unit first, then each way."""
    learner = sparse_lenet()
    optimizer = optimizer_for(learner)
    prior, inside = GaussianPrior(model), named_hyperparameters(model)
    state = accumulate_with(model, batches, _LIKELIHOOD, KfacOptions())
    closed = fixed_filters(model, inside)
    cotangents = [
        factor_cotangent(candidate, state.kron[candidate.weight], prior, _LIKELIHOOD)
        for candidate in closed
    ]

    def evidence_alone() -> None:
        decompose(accumulate_with(model, batches, _LIKELIHOOD, KfacOptions()))

    def second_phase(**how: float) -> object:
        return network_gradient(
            model, batches, state, prior, _LIKELIHOOD, inside, KfacOptions(),
            revisit=Revisit(**how),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def at_fixed_filters() -> None:
        for candidate, cotangent in zip(closed, cotangents, strict=True):
            closed_form_gradient(candidate, state.kron[candidate.weight], cotangent, prior)

    def eigenvalues_too() -> None:
        for candidate in closed:
            factor_cotangent(candidate, state.kron[candidate.weight], prior, _LIKELIHOOD)
        at_fixed_filters()

    return [
        Job("plain epoch", lambda: epoch(learner, optimizer, batches)),
        Job("evidence alone, exact", evidence_alone),
        *memory_jobs(model, batches),
        Job("second phase, exact", lambda: second_phase()),
        Job("second phase, sketched", lambda: second_phase(sketched=True)),
        Job(
            "second phase, sketched, 1 of 20 batches",
            lambda: second_phase(sketched=True, share=1 / 20),
            0.4,
        ),
        Job("closed form, at fixed filters", at_fixed_filters, 0.01, 20),
        Job("closed form with its eigenvalues", eigenvalues_too, None, 20),
    ]


def memory_jobs(model: nn.Module, batches: Batches) -> list[Job]:
    """Both phases together, and what they replace."""
    prior, inside = GaussianPrior(model), named_hyperparameters(model)

    def both_phases() -> None:
        state = accumulate_with(model, batches, _LIKELIHOOD, KfacOptions())
        network_gradient(model, batches, state, prior, _LIKELIHOOD, inside, KfacOptions())

    def full_graph() -> None:
        with torch.enable_grad():
            full_graph_gradient(model, batches, prior, _LIKELIHOOD)

    return [
        Job("two-phase gradient, exact", both_phases, 20.0),
        Job("full graph, exact", full_graph),
    ]
