"""Hand-over to laplace-torch: a fitted posterior of its own kind, with margeq's curvature.

laplace-torch is imported by the call, never by the import of margeq.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import isclose
from typing import Any

import torch
from torch import nn

from margeq.accumulation import accumulate_with
from margeq.comm import current_comm
from margeq.curvature.final_layer import chosen_parameters
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, DataWarning
from margeq.laplace import CurvatureState, Spectrum
from margeq.likelihoods import Categorical, Gaussian, Likelihood
from margeq.priors import GaussianPrior

__all__ = ["to_laplace"]


def to_laplace(
    model: nn.Module,
    train_loader: Iterable[Any] | CurvatureState,
    prior: GaussianPrior,
    likelihood: Likelihood,
    options: KfacOptions | None = None,
    *,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    expected: Spectrum | None = None,
) -> Any:
    """A fitted laplace-torch posterior of a trained model.

    Its class derives from laplace-torch's ``KronLaplace`` and has a key of its own, so that
    ``laplace.Laplace(...)`` stays what it is.

    Args:
        model: at its MAP; left as it is.
        train_loader: the data of the evidence, or a finished curvature pass over them.
        prior: precisions; each tensor gets its own.
        likelihood: noise and temperature.
        options: of the curvature.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        expected: what the data and the weights should be.

    Returns:
        A ``laplace.KronLaplace``, whose ``log_marginal_likelihood()`` is margeq's.

    Raises:
        ConfigError: for ``curvature="full"``, a likelihood that laplace-torch does not have (a
            noise per output among them), or weights that changed since ``expected``.
        DataError: for data that cannot be used.
    """
    options = KfacOptions() if options is None else options
    if options.curvature == "full":
        raise ConfigError(
            "curvature='full' has no Kronecker form; give to_laplace a result of 'kfac', 'ekfac' "
            "or 'diag', or fit laplace.Laplace(model, ..., hessian_structure='full')"
        )
    if not isinstance(likelihood, (Categorical, Gaussian)):
        raise ConfigError(
            f"laplace-torch has no {type(likelihood).__name__}; it has classification and "
            f"regression with one noise for all outputs"
        )
    if likelihood.weighs_outputs:
        raise ConfigError(
            "laplace-torch has one noise for all outputs, not one per output; use "
            "margeq.posterior.Posterior.of(state, prior, likelihood), which has them, or train "
            "with noise='shared' on targets in units of their noise"
        )
    if not isinstance(train_loader, CurvatureState):
        parameters = chosen_parameters(model, parameters, train_loader, batch_fn, current_comm())
    if isinstance(train_loader, CurvatureState):
        state = train_loader
    else:
        state = accumulate_with(
            model, train_loader, likelihood, options, parameters=parameters, batch_fn=batch_fn,
            check=True, comm=current_comm(),
        )  # fmt: skip
    if expected is not None:
        _require_expected(state, expected)
    module = importlib.import_module("margeq.integrations.kron_laplace")
    noise = likelihood.sigma_noise.detach() if isinstance(likelihood, Gaussian) else 1.0
    precisions = torch.stack([prior.log_precision_of(n).detach().exp() for n in state.square_norms])
    posterior = module.MargeqKronLaplace(
        model, likelihood.name, noise, precisions, temperature=likelihood.temperature,
        options=options, parameters=parameters, batch_fn=batch_fn,
    )  # fmt: skip
    posterior.fit_state(state)
    return posterior


def _require_expected(state: CurvatureState, expected: Spectrum) -> None:
    for name, square_norm in expected.square_norms.items():
        now = state.square_norms.get(name)
        if now is None or not isclose(float(now), float(square_norm), rel_tol=1e-6, abs_tol=1e-30):
            raise ConfigError(
                f"weight {name!r} is not the one that the result is about (squared norm "
                f"{float(square_norm):.6g} then, {'gone' if now is None else f'{float(now):.6g}'} "
                f"now); call to_laplace before the model is changed or trained on"
            )
    if state.checksum != expected.checksum:
        warnings.warn(
            f"the posterior is that of {state.n_data} other data than the {expected.n_data} of the "
            f"result, so its evidence differs; pass the loader that trained the model",
            DataWarning,
            stacklevel=3,
        )
