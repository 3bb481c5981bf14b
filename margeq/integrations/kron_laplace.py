"""A laplace-torch posterior whose curvature is margeq's.

Imports laplace-torch: only :mod:`margeq.integrations.laplace_torch` imports this module, when it
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from margeq.accumulation import CurvatureState, accumulate_with
from margeq.comm import current_comm
from margeq.curvature.capture import eval_mode
from margeq.curvature.options import KfacOptions
from margeq.curvature.spectral import spectral_blocks
from margeq.errors import ConfigError
from margeq.integrations.kron_decomposed import BlockKronDecomposed
from margeq.integrations.neighbours import import_laplace
from margeq.likelihoods import as_likelihood
from margeq.parameters import named_weights, unwrapped

__all__ = ["MargeqKronLaplace"]

_KronLaplace: Any = import_laplace().KronLaplace


class MargeqKronLaplace(_KronLaplace):
    """Laplace posterior with margeq's curvature: its layers, blocks and exact biases.

    laplace-torch constructs it by ``Laplace(model, likelihood, "all", "margeq_kron")``; a key of
    its own keeps ``Laplace(model, likelihood, "all", "kron")`` what it is. Everything of
    laplace-torch works on it; its GLM predictives form no Jacobians.

    Args:
        model: left as it is, flags included; weights are replaced while it is sampled.
        likelihood: ``"classification"`` or ``"regression"``.
        sigma_noise: of regression.
        prior_precision: one number, or one per weight tensor.
        prior_mean: zero, or any that laplace-torch takes.
        temperature: ``T``; it divides the whole log-likelihood, its normaliser included.
        enable_backprop: not available.
        dict_key_x: not used: ``batch_fn`` reads batches.
        dict_key_y: not used.
        options: of the curvature.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        **unused: other arguments of laplace-torch's classes, at their defaults.

    Raises:
        ConfigError: for arguments that have no meaning here.
    """

    _key = ("all", "margeq_kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        options: KfacOptions | None = None,
        parameters: str | Sequence[str] = "all",
        batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        **unused: Any,
    ) -> None:
        for name, value in {"enable_backprop": enable_backprop, **unused}.items():
            if value:
                raise ConfigError(
                    f"{name}={value!r} has no meaning with margeq's curvature; leave it out, or "
                    f"use hessian_structure='kron'"
                )
        as_likelihood(likelihood)
        model = unwrapped(model)
        weights = named_weights(model, parameters)
        # what depends on the weights is set below: these are not all tensors that require gradients
        super().__init__(model, likelihood, sigma_noise, temperature=temperature)
        self.names = list(weights)
        self.params = list(weights.values())
        self.is_subset_params = len(self.params) < len(list(model.parameters()))
        self.n_params = sum(weight.numel() for weight in self.params)
        self.n_layers = len(self.params)
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.log_hyperprior = 0.0
        self._options = KfacOptions() if options is None else options
        self._parameters, self._batch_fn = parameters, batch_fn

    def _init_H(self) -> None:
        self.H: Any = None
        self.H_facs = None

    def _check_H_init(self) -> None:
        if self.H is None:
            raise ConfigError("the posterior is not fitted; call fit(train_loader) first")

    # -- fitting ---------------------------------------------------------------------------------

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """Accumulate margeq's curvature over a loader.

        Args:
            train_loader: re-iterable batches.
            override: always ``True``.
            progress_bar: not used.

        Raises:
            ConfigError: for ``override=False``, or a curvature without blocks per tensor.
        """
        if not override:
            raise ConfigError(
                "override=False: add the states of margeq.laplace.accumulate instead, and hand "
                "over their sum with fit_state(state)"
            )
        temperature, sigma = float(self.temperature), float(self.sigma_noise)
        likelihood = as_likelihood(self.likelihood, sigma_noise=sigma, temperature=temperature)
        state = accumulate_with(
            self.model, train_loader, likelihood, self._options, parameters=self._parameters,
            batch_fn=self._batch_fn, check=True, comm=current_comm(),
        )  # fmt: skip
        self.fit_state(state)

    def fit_state(self, state: CurvatureState) -> None:
        """Take over sums over data that are there already, at the model's current weights.

        Raises:
            ConfigError: for sums of other weights or of another likelihood, or a curvature without
                blocks per tensor.
        """
        if list(state.square_norms) != self.names:
            raise ConfigError(
                f"the state is about {list(state.square_norms)}, the posterior about {self.names}"
            )
        expected = type(as_likelihood(self.likelihood)).__name__
        if state.flavour.likelihood != expected:
            raise ConfigError(
                f"the state is that of a {state.flavour.likelihood} likelihood, not of {expected}"
            )
        self.H = BlockKronDecomposed(spectral_blocks(state.curvature))
        self.mean = parameters_to_vector(self.params).detach()
        is_regression = self.likelihood == "regression"
        # laplace-torch's losses: half the squared residuals, or the negative log-likelihood
        self.loss = 0.5 * state.fit.sum() if is_regression else -state.fit
        self.n_outputs = state.fit.numel() if is_regression else 0
        self.n_data = state.n_data
        self.log_hyperprior = state.log_hyperprior

    # -- evidence: in float64, whatever the model is in ------------------------------------------

    @property
    def log_likelihood(self) -> Tensor:
        """Fit of the data at the MAP; the temperature divides all of it."""
        fit = -self._H_factor * self.loss
        if self.likelihood == "regression":
            count = self.n_data * self.n_outputs
            normaliser = count * (self.sigma_noise.log() + 0.5 * log(2.0 * pi))
            return fit - normaliser / self.temperature
        return fit

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """As laplace-torch's, and with the penalty of hyperparameters inside the network."""
        self._check_H_init()
        own = super().log_marginal_likelihood(prior_precision, sigma_noise)
        return own + self.log_hyperprior

    @property
    def scatter(self) -> Tensor:
        """``sum delta |theta - mu|^2``."""
        delta = (self.mean - self.prior_mean).to(self._prior_precision.dtype)
        return (delta.square() * self.prior_precision_diag).sum()

    @property
    def prior_precision_diag(self) -> Tensor:
        """Precision of each weight, ``[P]``."""
        counts = torch.tensor([p.numel() for p in self.params], device=self._device)
        return self.prior_precision.expand(self.n_layers).repeat_interleave(counts)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """``log det P``."""
        return self.posterior_precision.logdet()

    @_KronLaplace.prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        """One number, or one per weight tensor, kept in float64."""
        super(MargeqKronLaplace, type(self)).prior_precision.fset(self, prior_precision)
        self._prior_precision = self._wide(prior_precision).reshape(-1)

    @_KronLaplace.sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        """Noise of regression, kept in float64."""
        super(MargeqKronLaplace, type(self)).sigma_noise.fset(self, sigma_noise)
        self._sigma_noise = self._wide(sigma_noise).reshape(())

    def _wide(self, value: float | Tensor) -> Tensor:
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        return torch.as_tensor(value, device=self._device).to(dtype)

    # -- predictions -----------------------------------------------------------------------------

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the linearised outputs, without Jacobians."""
        self._check_H_init()
        posterior = self.posterior_precision.posterior()
        inputs = X.to(self._device) if isinstance(X, Tensor) else X
        if joint:
            mean, covariance = posterior.functional_covariance(self.model, inputs)
            return mean.flatten(), covariance
        mean, variance = posterior.functional_variance(self.model, inputs)
        return mean, variance.diagonal(dim1=1, dim2=2) if diagonal_output else variance

    def square_norm(self, value: Tensor) -> Tensor:
        """``(value - mean)^T P (value - mean)``."""
        delta = value - self.mean
        return delta @ self.posterior_precision.bmm(delta, exponent=1)

    def _nn_functional_samples(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._sampling():
            return super()._nn_functional_samples(*args, **kwargs)

    def _nn_predictive_classification(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._sampling(), torch.no_grad():
            return super()._nn_predictive_classification(*args, **kwargs)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Evaluation mode; weights and flags are as before afterwards, whatever happens."""
        kept = [weight.detach().clone() for weight in self.params]
        try:
            with eval_mode(self.model):
                yield
        finally:
            for weight, values in zip(self.params, kept, strict=True):
                weight.data.copy_(values)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, which ``torch.load(weights_only=True)`` reads."""
        self._check_H_init()
        return {
            **super(_KronLaplace, self).state_dict(),
            "H": self.H.state(),
            "log_hyperprior": self.log_hyperprior,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, for a model at the same weights.

        Raises:
            ConfigError: for a state of another class, likelihood, temperature or other weights.
        """
        if state_dict["cls_name"] != type(self).__name__:
            raise ConfigError(
                f"the state is that of a {state_dict['cls_name']}; build that class for it"
            )
        for name in ("likelihood", "temperature"):
            if state_dict[name] != getattr(self, name):
                raise ConfigError(
                    f"the state has {name}={state_dict[name]!r}, this posterior "
                    f"{getattr(self, name)!r}; build it with the same"
                )
        names = [entry["name"] for entry in state_dict["H"]]
        mean, weights = state_dict["mean"].to(self._device), parameters_to_vector(self.params)
        if names != self.names or mean.shape != weights.shape:
            raise ConfigError(f"the state is about {names}, this posterior about {self.names}")
        if not torch.equal(mean, weights.detach().to(mean.dtype)):
            raise ConfigError(
                "the model has other weights than when the posterior was saved; load its own "
                "state_dict first"
            )
        self.H = BlockKronDecomposed.from_state(state_dict["H"], self._device)
        self.mean, self.prior_mean = mean, state_dict["prior_mean"]
        for name in ("prior_precision", "sigma_noise", "n_data", "n_outputs", "log_hyperprior"):
            setattr(self, name, state_dict[name])
        self.loss = state_dict["loss"].to(self._device)
