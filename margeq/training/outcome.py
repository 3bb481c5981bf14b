"""What one run leaves behind: its best state by evidence, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from margeq.errors import CurvatureError, NonFiniteError, NotPSDError
from margeq.laplace import Spectrum
from margeq.likelihoods import Likelihood
from margeq.priors import GaussianPrior
from margeq.training.history import History
from margeq.training.problem import Problem

__all__ = ["Outcome"]

_FAILURES = {kind.__name__: kind for kind in (CurvatureError, NonFiniteError, NotPSDError)}


@dataclass(frozen=True)
class Outcome:
    """The best state that a run saw, by evidence.

    Attributes:
        start: name of the start.
        log_marginal_likelihood: nats; ``-inf`` if the run failed.
        epoch: epoch of the best update.
        model_state: its state dict, off paths included.
        prior: precisions, converged on the last curvature of the best state.
        likelihood: noise and temperature.
        spectrum: eigenvalues at the best state.
        history: of the whole run.
        hyperparameters: values of the hyperparameters inside the network.
        held_norms: scale-invariant tensors whose norm was held.
        error: why the run failed, or ``None``.
    """

    start: str
    log_marginal_likelihood: float
    epoch: int
    model_state: dict[str, Any]
    prior: GaussianPrior
    likelihood: Likelihood
    spectrum: Spectrum | None
    history: History
    hyperparameters: dict[str, Tensor]
    held_norms: tuple[tuple[str, ...], ...]
    error: Exception | None = None

    def restore(self, problem: Problem) -> None:
        """Put weights and hyperparameters into the model."""
        problem.model.load_state_dict(self.model_state)
        with torch.no_grad():
            for name, tensor in problem.hyperparameters.items():
                tensor.copy_(self.hyperparameters[name])

    def without_tensors(self) -> Outcome:
        """What the report needs of a run that was not kept."""
        return replace(self, model_state={}, spectrum=None, hyperparameters={})

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, without the history."""
        failure = None if self.error is None else (type(self.error).__name__, str(self.error))
        return {
            "start": self.start,
            "log_marginal_likelihood": self.log_marginal_likelihood,
            "epoch": self.epoch,
            "model_state": self.model_state,
            "prior": self.prior.state_dict(),
            "likelihood": self.likelihood.state_dict(),
            "spectrum": None if self.spectrum is None else self.spectrum.state_dict(),
            "hyperparameters": self.hyperparameters,
            "held_norms": self.held_norms,
            "error": failure,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], problem: Problem, history: History) -> Outcome:
        """The outcome of a state, on the device of the problem."""
        prior, likelihood = problem.prior.copy(), deepcopy(problem.likelihood)
        prior.load_state_dict(state["prior"])
        likelihood.load_state_dict(state["likelihood"])
        spectrum, failure = state["spectrum"], state["error"]
        error = None if failure is None else _FAILURES.get(failure[0], CurvatureError)(failure[1])
        return cls(
            start=state["start"],
            log_marginal_likelihood=state["log_marginal_likelihood"],
            epoch=state["epoch"],
            model_state=state["model_state"],
            prior=prior,
            likelihood=likelihood,
            spectrum=None if spectrum is None else Spectrum.from_state(spectrum, problem.device),
            history=history,
            hyperparameters={n: t.to(problem.device) for n, t in state["hyperparameters"].items()},
            held_norms=state["held_norms"],
            error=error,
        )
