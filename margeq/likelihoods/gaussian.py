"""Regression with Gaussian noise, one for all outputs or one for each.

Noises of their own are weights of outputs, ``sigma^2 / sigma_c^2``, in the curvature and in the fit
term, next to a common ``sigma``: the geometric mean, so that the units of all outputs together stay
what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from margeq.curvature.roots import GaussianRoot, MonteCarloGaussianRoot, Root, ScaledRoot
from margeq.errors import ConfigError, DataError
from margeq.likelihoods.base import Likelihood, promoted, require_positive

__all__ = ["Gaussian"]


class Gaussian(Likelihood):
    """Regression with Gaussian noise, ``y_c = f_c + sigma_c * N(0, 1)``.

    Args:
        sigma_noise: standard deviation, in the unit of the targets; with ``noise="per-output"``
            also one per output.
        temperature: ``T``.
        noise: ``"shared"``, one noise for all outputs, or ``"per-output"``, one for each. Axes of
            outputs beyond the first count as outputs.

    Raises:
        ConfigError: if ``sigma_noise`` is not positive and finite, for several of them where one
            is shared, or for another ``noise``.

    Example:
        >>> Gaussian([0.1, 2.0], noise="per-output")
        Gaussian(sigma_noise=[0.1, 2], temperature=1.0, noise='per-output')
    """

    name = "regression"

    def __init__(
        self,
        sigma_noise: float | Sequence[float] | Tensor = 1.0,
        temperature: float = 1.0,
        *,
        noise: str = "shared",
    ) -> None:
        super().__init__(temperature)
        if noise not in ("shared", "per-output"):
            raise ConfigError(f"noise={noise!r}: use 'shared' or 'per-output'")
        self.noise = noise
        self.output_scales: Tensor | None = None
        self.log_sigma_noise = _log_noise(sigma_noise, noise)

    def __repr__(self) -> str:
        """The arguments."""
        values = [f"{value:.4g}" for value in self.sigma_noise.detach().flatten().tolist()]
        sigma = f"[{', '.join(values)}]" if self.log_sigma_noise.ndim else values[0]
        more = f", noise={self.noise!r}" if self.weighs_outputs else ""
        return f"Gaussian(sigma_noise={sigma}, temperature={self.temperature}{more})"

    @property
    def sigma_noise(self) -> Tensor:
        """Noise standard deviation: a scalar, or ``[K]`` with one per output."""
        return self.log_sigma_noise.exp()

    @property
    def weighs_outputs(self) -> bool:
        """Whether each output has a noise of its own."""
        return self.noise == "per-output"

    def settle(self, outputs: Tensor) -> None:
        """Give each output its own noise, beginning at the common one.

        Args:
            outputs: of any data, ``[n, ...]``.

        Raises:
            ConfigError: for another number of outputs than of given noises.
        """
        if self.weighs_outputs:
            self.log_sigma_noise = self._log_sigmas(outputs[0].numel()).detach().clone()

    def _log_sigmas(self, n_outputs: int) -> Tensor:
        """``log sigma``, ``[K]``."""
        log_sigma = self.log_sigma_noise
        if log_sigma.ndim and len(log_sigma) != n_outputs:
            raise ConfigError(
                f"sigma_noise has {len(log_sigma)} values, the model has {n_outputs} outputs; "
                f"give one per output, or a single number to begin from"
            )
        return log_sigma.expand(n_outputs)

    def output_weights(self, n_outputs: int) -> Tensor:
        """``sigma^2 / sigma_c^2`` with the geometric mean ``sigma`` of all noises, ``[K]``."""
        log_sigma = self._log_sigmas(n_outputs)
        return (2.0 * (log_sigma.mean() - log_sigma)).exp()

    def of_scaled_outputs(self, n_outputs: int) -> Gaussian:
        """The same with one noise, of outputs and targets in units of their own noise.

        The density is that of the targets as they are: the noise is the geometric mean, so the
        units of all outputs together are unchanged.

        Returns:
            A likelihood, differentiable in ``log_sigma_noise``.
        """
        shared = Gaussian(temperature=self.temperature)
        shared.log_sigma_noise = self._log_sigmas(n_outputs).mean()
        shared.output_scales = self.output_weights(n_outputs).sqrt()
        return shared

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """``log_sigma_noise``."""
        return {"log_sigma_noise": self.log_sigma_noise}

    @property
    def curvature_scale(self) -> Tensor:
        """``1 / (sigma^2 T)``, with the geometric mean of several noises."""
        return (-2.0 * self.log_sigma_noise.mean()).exp() / self.temperature

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of squared residuals per output, ``[K]``."""
        residuals = (promoted(targets) - promoted(outputs)).reshape(len(outputs), -1)
        if self.output_scales is not None:
            residuals = residuals * self.output_scales.to(residuals)
        return residuals.square().sum(0)

    def log_likelihood(self, fit: Tensor, n_data: int) -> Tensor:
        """``-sum_c [ SSE_c / (2 sigma_c^2 T) + N / T * log(sigma_c sqrt(2 pi)) ]``."""
        half_log = 0.5 * math.log(2.0 * math.pi)
        if self.log_sigma_noise.ndim == 0:
            log_sigma = self.log_sigma_noise.to(fit.device)
            squares = 0.5 * fit.sum() * (-2.0 * log_sigma).exp()
            constant = n_data * fit.numel() * (log_sigma + half_log)
        else:
            log_sigma = self._log_sigmas(fit.numel()).to(fit.device)
            squares = 0.5 * (fit * (-2.0 * log_sigma).exp()).sum()
            constant = n_data * (log_sigma + half_log).sum()
        return -(squares + constant) / self.temperature

    def root(self, outputs: Tensor, keys: Tensor | None = None, n_samples: int = 0) -> Root:
        """Unit vectors, or Monte Carlo."""
        flat = outputs.reshape(len(outputs), -1)
        root = GaussianRoot(flat) if keys is None else MonteCarloGaussianRoot(flat, keys, n_samples)
        return root if self.output_scales is None else ScaledRoot(root, self.output_scales)

    def hessian(self, outputs: Tensor) -> Tensor:
        """The identity; with a noise per output their weights in its place."""
        flat = outputs.reshape(len(outputs), -1)
        weights = torch.ones_like(flat[0])
        if self.weighs_outputs:
            weights = self.output_weights(flat.shape[1]).to(flat)
        elif self.output_scales is not None:
            weights = self.output_scales.square().to(flat)
        return torch.diag(weights).expand(len(flat), -1, -1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets of exactly the shape of the outputs, as floats.

        Returns:
            Targets in the dtype of the outputs.

        Raises:
            DataError: if the shapes differ, which would broadcast silently, on NaN, or for complex
                numbers.
        """
        if targets.shape != outputs.shape:
            raise DataError(
                f"regression targets have shape {tuple(targets.shape)}, the model returns "
                f"{tuple(outputs.shape)}; they must be equal (unsqueeze 1-D targets to [n, 1])"
            )
        if targets.is_complex():
            raise DataError(
                f"regression targets are complex ({targets.dtype}); give real and imaginary parts "
                f"as outputs of their own"
            )
        if not torch.isfinite(targets).all():
            index = (~torch.isfinite(targets)).nonzero()[0].tolist()
            raise DataError(f"target at index {index} is {targets[tuple(index)].item()}")
        return targets.to(outputs.dtype)


def _log_noise(sigma_noise: float | Sequence[float] | Tensor, noise: str) -> Tensor:
    """``log sigma``: a scalar, or one per output where that is asked for."""
    if isinstance(sigma_noise, Tensor):
        sigma_noise = sigma_noise.detach().tolist()
    if isinstance(sigma_noise, Sequence):
        if noise == "shared":
            raise ConfigError(
                f"sigma_noise={sigma_noise!r} has one value per output; pass noise='per-output' "
                f"with it, or a single number"
            )
        for index, value in enumerate(sigma_noise):
            require_positive(f"sigma_noise[{index}]", value)
        if not sigma_noise:
            raise ConfigError("sigma_noise is empty; give one value per output, or a number")
        return torch.tensor(sigma_noise, dtype=torch.float64).log()
    require_positive("sigma_noise", sigma_noise)
    return torch.tensor(math.log(sigma_noise), dtype=torch.float64)
