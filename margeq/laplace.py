"""The Laplace evidence: pure functions of curvature sums, prior and likelihood.

    log p(D | eta) ~ log p(D | theta*) - 1/2 log det(I + kappa Delta^-1/2 H Delta^-1/2)
                                       - 1/2 sum_tensors delta |theta*|^2

with the curvature ``H`` and ``kappa = 1 / (sigma^2 T)`` (Immer et al. 2021). Where ``H`` has one
block per weight tensor, the determinant is a sum of ``log(1 + kappa lambda / delta)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from margeq.accumulation import CurvatureState, accumulate
from margeq.batches import map_tensors
from margeq.curvature.eigen import EigenBases
from margeq.curvature.eigen import eigen_bases as _eigen_bases
from margeq.curvature.forms import BlockEigenvalues, Eigenvalues
from margeq.curvature.full import FullEigenvalues
from margeq.curvature.options import EvidenceFlavour
from margeq.curvature.outputs import OutputEigenvalues, OutputFullEigenvalues
from margeq.errors import ConfigError
from margeq.likelihoods import Likelihood
from margeq.output_scales import of_scaled_outputs
from margeq.parameters import requiring_grad
from margeq.priors import GaussianPrior

__all__ = [
    "CurvatureState",
    "Evidence",
    "Spectrum",
    "accumulate",
    "decompose",
    "effective_parameters",
    "eigen_bases",
    "evidence",
    "hyper_gradient",
    "log_marginal_likelihood",
    "of_scaled_outputs",
]

_KINDS = (BlockEigenvalues, FullEigenvalues, OutputEigenvalues, OutputFullEigenvalues)
_EIGENVALUES = {kind.__name__: kind for kind in _KINDS}


@dataclass(frozen=True)
class Spectrum:
    """All that hyperparameter steps need from one curvature pass: eigenvalues, norms, fit.

    Attributes:
        eigenvalues: of the curvature, without noise and temperature.
        square_norms: squared norm per weight tensor.
        fit: fit term, see :class:`margeq.state.CurvatureState`.
        n_data: number of data.
        flavour: evidence flavour of the pass.
        checksum: order-independent checksum of inputs and targets.
        log_hyperprior: penalty of the hyperparameters inside the network, in nats.
    """

    eigenvalues: Eigenvalues
    square_norms: dict[str, Tensor]
    fit: Tensor
    n_data: int
    flavour: EvidenceFlavour
    checksum: int
    log_hyperprior: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "kind": type(self.eigenvalues).__name__,
            "eigenvalues": self.eigenvalues.state_dict(),
            "square_norms": dict(self.square_norms),
            "fit": self.fit,
            "n_data": self.n_data,
            "flavour": asdict(self.flavour),
            "checksum": self.checksum,
            "log_hyperprior": self.log_hyperprior,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Spectrum:
        """The spectrum of a state, on a device."""
        values = map_tensors(lambda t: t.to(device), state)
        return cls(
            _EIGENVALUES[state["kind"]](**values["eigenvalues"]),
            values["square_norms"],
            values["fit"],
            state["n_data"],
            EvidenceFlavour(**state["flavour"]),
            state["checksum"],
            state["log_hyperprior"],
        )

    @property
    def clamped(self) -> int:
        """Number of clearly negative eigenvalues that were set to zero."""
        return self.eigenvalues.clamped


@dataclass(frozen=True)
class Evidence:
    """Terms of the log marginal likelihood, in nats, each differentiable.

    Attributes:
        log_likelihood: fit of the data at the MAP.
        log_determinant: ``log det(I + kappa Delta^-1/2 H Delta^-1/2)``.
        scatter: ``sum delta |theta|^2``.
        log_hyperprior: penalty of the hyperparameters inside the network.
    """

    log_likelihood: Tensor
    log_determinant: Tensor
    scatter: Tensor
    log_hyperprior: float = 0.0

    @property
    def occam(self) -> Tensor:
        """The price of the weights, never positive."""
        return -0.5 * (self.log_determinant + self.scatter)

    @property
    def total(self) -> Tensor:
        """The log marginal likelihood."""
        return self.log_likelihood + self.occam + self.log_hyperprior


def decompose(state: CurvatureState) -> Spectrum:
    """One eigenvalue decomposition per Kronecker factor, or of the dense matrix.

    Returns:
        Eigenvalues, norms and fit: all that hyperparameter steps need.

    Raises:
        NonFiniteError: if the curvature is NaN or infinite.
        NotPSDError: if a decomposition fails for good.
    """
    return Spectrum(
        state.curvature.decompose(),
        state.square_norms,
        state.fit,
        state.n_data,
        state.flavour,
        state.checksum,
        state.log_hyperprior,
    )


def eigen_bases(state: CurvatureState) -> EigenBases:
    """Eigenvectors of Kronecker factors, for ``accumulate(..., curvature="ekfac", bases=...)``.

    Args:
        state: of ``curvature="kfac"``, with any root, at these or at earlier weights.

    Returns:
        Weight name -> ``U_B [b, o, o]`` and ``U_A [b, i, i]``, for all weights in use.

    Raises:
        ConfigError: if the state is of another flavour.
        NonFiniteError: if a factor is NaN or infinite.
        NotPSDError: if a decomposition fails for good.
    """
    return _eigen_bases(state.kron)


def evidence(spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> Evidence:
    """Log marginal likelihood, term by term.

    Args:
        spectrum: from :func:`decompose`.
        prior: precisions, each finite in value and gradient from 1e-30 to 1e30.
        likelihood: noise and temperature.

    Returns:
        Fit, log-determinant and scatter, each a differentiable scalar in nats.

    Raises:
        ConfigError: if prior, likelihood and spectrum are not about the same model.
    """
    _require_same_subject(spectrum, prior, likelihood)
    spectrum, likelihood = of_scaled_outputs(spectrum, likelihood)
    fit_term = likelihood.log_likelihood(spectrum.fit, spectrum.n_data)
    log_scale = likelihood.curvature_scale.log().to(spectrum.fit.device)
    log_precisions = _log_precisions(spectrum, prior)
    log_determinant = spectrum.eigenvalues.log_determinant(log_precisions, log_scale)
    scatter = fit_term.new_zeros(())
    for name, log_precision in log_precisions.items():
        scatter = scatter + log_precision.exp() * spectrum.square_norms[name]
    return Evidence(fit_term, log_determinant, scatter, spectrum.log_hyperprior)


def log_marginal_likelihood(
    state: CurvatureState | Spectrum, prior: GaussianPrior, likelihood: Likelihood
) -> Tensor:
    """Laplace log marginal likelihood in nats, total over the data; larger is better.

    Differentiable in ``prior.log_prior_precision`` and in the likelihood's noise or noises.

    Args:
        state: from :func:`accumulate`, or its decomposition.
        prior: prior precisions.
        likelihood: noise and temperature.

    Returns:
        A scalar tensor.

    Raises:
        ConfigError: if prior, likelihood and state are not about the same model.
    """
    spectrum = decompose(state) if isinstance(state, CurvatureState) else state
    return evidence(spectrum, prior, likelihood).total


def effective_parameters(
    spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood
) -> dict[str, Tensor]:
    """Trace of each tensor's block of ``kappa H (kappa H + Delta)^-1``, from 0 to ``P`` (MacKay).

    With one curvature block per tensor, ``gamma_t = sum kappa lambda / (kappa lambda + delta)``.

    Returns:
        Weight name -> ``gamma``.
    """
    spectrum, likelihood = of_scaled_outputs(spectrum, likelihood)
    log_scale = likelihood.curvature_scale.log().to(spectrum.fit.device)
    return spectrum.eigenvalues.effective(_log_precisions(spectrum, prior), log_scale)


def hyper_gradient(
    spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood
) -> tuple[float, dict[str, Tensor]]:
    """Evidence and its gradient in every log precision and in ``log_sigma_noise``."""
    leaves = {**prior.log_prior_precision, **likelihood.hyperparameters}
    with requiring_grad(leaves.values()), torch.enable_grad():
        value = evidence(spectrum, prior, likelihood).total
        grads = torch.autograd.grad(value, list(leaves.values()))
    return float(value.detach()), dict(zip(leaves, grads, strict=True))


def _log_precisions(spectrum: Spectrum, prior: GaussianPrior) -> dict[str, Tensor]:
    return {name: prior.log_precision_of(name) for name in spectrum.square_norms}


def _require_same_subject(spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
    if type(likelihood).__name__ != spectrum.flavour.likelihood:
        raise ConfigError(
            f"the curvature is that of a {spectrum.flavour.likelihood} likelihood, not of "
            f"{type(likelihood).__name__}; accumulate again with this likelihood"
        )
    differing = set(spectrum.square_norms) ^ set(prior.groups)
    if differing:
        raise ConfigError(
            f"prior and curvature are about different weights: {sorted(differing)}; build both "
            f"from the same model and with the same parameters=..."
        )
