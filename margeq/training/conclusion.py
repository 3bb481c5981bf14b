"""What all runs of a call come to: the kept one, its diagnostics, and a verdict in words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from margeq.curvature.capture import eval_mode, forward
from margeq.errors import ConvergenceWarning
from margeq.function_share import function_variances
from margeq.laplace import hyper_gradient
from margeq.likelihoods import Categorical, Gaussian, Likelihood
from margeq.training.outcome import Outcome
from margeq.training.problem import Problem
from margeq.training.result import Diagnostics, MargLikResult, Restart

__all__ = ["conclude"]

_SETTLED_SLOPE = 0.01
"""Nats per datum and epoch above which the evidence is still on its way."""
_NO_SPREAD = 0.01
"""Variance of outputs over the data, relative to the noise's, below which they are constants."""
_NOTHING_LEARNED = 0.5
"""Effective parameters of all weights but biases below which the data determine none of them."""


def conclude(problem: Problem, outcomes: Sequence[Outcome]) -> MargLikResult:
    """Put the best state into the model, and say how far it can be believed.

    Returns:
        The result of a call.

    Raises:
        CurvatureError: if every run failed numerically: that of the first.
    """
    kept = max(outcomes, key=lambda outcome: outcome.log_marginal_likelihood)
    if kept.spectrum is None:
        assert kept.error is not None
        raise kept.error
    kept.restore(problem)
    for parameter in problem.model.parameters():
        parameter.grad = None
    batches = problem.batches(problem.marglik_loader)
    diagnostics = _diagnostics(problem, outcomes, kept)
    success, message = _verdict(problem, diagnostics.slope, kept)
    if not success:
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return MargLikResult(
        model=problem.model,
        prior=kept.prior,
        likelihood=kept.likelihood,
        log_marginal_likelihood=kept.log_marginal_likelihood,
        flavour=kept.spectrum.flavour,
        n_data=kept.spectrum.n_data,
        restarts=tuple(
            Restart(
                o.start,
                o.log_marginal_likelihood,
                o is kept,
                "" if o.error is None else f"{type(o.error).__name__}: {o.error}",
                o.history,
            )
            for o in outcomes
        ),
        diagnostics=diagnostics,
        success=success,
        message=message,
        n_iter=len(kept.history.losses),
        spectrum=kept.spectrum,
        variances=function_variances(problem.model, batches, comm=problem.comm),
        hyperparameters=kept.hyperparameters,
        seed=problem.seed,
        options=problem.draws(kept.epoch),
        parameters=problem.parameters,
        batch_fn=problem.batch_fn,
    )


def _verdict(problem: Problem, slope: float, kept: Outcome) -> tuple[bool, str]:
    """Whether to believe the run, and why."""
    settled, message = _settled(slope)
    with eval_mode(problem.model), torch.no_grad():
        outputs = forward(problem.model, problem.first_inputs)
    doubt = _no_weight(kept, outputs) or _no_better_than_guessing(problem, kept, outputs.shape[-1])
    if not doubt:
        return settled, message
    less_noise = "less noise (sigma_noise_init), " * isinstance(problem.likelihood, Gaussian)
    return False, (
        f"{message}, but {doubt}: unless that is the answer, begin with a weaker prior "
        f"(prior_prec_init=1.0), {less_noise}or a smaller learning rate"
    )


def _no_weight(kept: Outcome, outputs: Tensor) -> str:
    """Whether the data determine none of the weights, and the outputs are constants, in words."""
    update = next(u for u in kept.history.updates if u.epoch == kept.epoch)
    # a bias can follow the mean of the targets whatever the inputs are
    weights = [g for name, g in update.effective.items() if not name.endswith("bias")]
    if not weights or sum(weights) >= _NOTHING_LEARNED or _varies(outputs, kept.likelihood):
        return ""
    return (
        f"the data determine none of the weights ({sum(weights):.1g} effective parameters), so the "
        f"outputs hardly depend on the inputs"
    )


def _varies(outputs: Tensor, likelihood: Likelihood) -> bool:
    """Whether outputs follow the inputs, be it by a skip or by weights outside of the evidence."""
    spread = outputs.float().flatten(1).var(0, correction=0)
    if isinstance(likelihood, Gaussian):
        spread = spread / likelihood.sigma_noise.to(spread).square()
    return bool((spread > _NO_SPREAD).any())


def _no_better_than_guessing(problem: Problem, kept: Outcome, n_classes: int) -> str:
    """Whether a model that takes all classes to be equally probable has as much evidence."""
    if not isinstance(problem.likelihood, Categorical):
        return ""
    guessing = -problem.n_data * math.log(n_classes) / problem.likelihood.temperature
    if kept.log_marginal_likelihood > guessing or n_classes < 2:
        return ""
    return (
        f"its {kept.log_marginal_likelihood:.4g} nats are no more than those of guessing among "
        f"{n_classes} classes ({guessing:.4g})"
    )


def _settled(slope: float) -> tuple[bool, str]:
    """Whether the evidence has settled, in one word and in a sentence."""
    if math.isnan(slope):
        return False, (
            "a single update cannot tell whether the evidence has settled; train longer, or "
            "shorten n_epochs_burnin or marglik_frequency"
        )
    if abs(slope) < _SETTLED_SLOPE:
        return True, "the evidence has settled"
    moves = f"by {abs(slope):.2g} nats per datum and epoch"
    if slope > 0:
        return False, f"the evidence still rises {moves}; train longer"
    return False, f"the evidence falls {moves}; lower the learning rate"


def _diagnostics(problem: Problem, outcomes: Sequence[Outcome], kept: Outcome) -> Diagnostics:
    assert kept.spectrum is not None
    finished = [o.log_marginal_likelihood for o in outcomes if o.error is None]
    at_bounds = kept.prior.at_bounds()
    _, grads = hyper_gradient(kept.spectrum, kept.prior, kept.likelihood)
    free = [v for n, g in grads.items() if n not in at_bounds for v in g.flatten().tolist()]
    captured = next(u.captured_trace for u in kept.history.updates if u.epoch == kept.epoch)
    return Diagnostics(
        slope=kept.history.slope(kept.spectrum.n_data),
        gradient_norm=math.hypot(*free),
        at_bounds=tuple(at_bounds),
        clamped_eigenvalues=kept.spectrum.clamped,
        captured_trace=captured,
        restart_spread=max(finished) - min(finished),
        held_norms=kept.held_norms,
        failed_restarts=tuple(o.start for o in outcomes if o.error is not None),
    )
