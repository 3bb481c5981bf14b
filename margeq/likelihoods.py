"""Likelihoods: the one objective that the MAP loss and the evidence share.

``fit`` terms are un-normalised sums, free of noise and temperature; both enter in
:meth:`Likelihood.log_likelihood` and in ``curvature_scale = 1 / (sigma^2 T)`` and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from margeq.curvature.roots import (
    GaussianRoot,
    MonteCarloGaussianRoot,
    MonteCarloSoftmaxRoot,
    Root,
    SoftmaxRoot,
)
from margeq.errors import ConfigError, DataError

__all__ = ["Categorical", "Gaussian", "Likelihood", "as_likelihood"]


class Likelihood(ABC):
    """Observation model ``p(y | f)^(1/T)``.

    Args:
        temperature: ``T``; larger values weaken the data against the prior.

    Raises:
        ConfigError: if the temperature is not positive and finite.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        _require_positive("temperature", temperature)
        self.temperature = float(temperature)

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, Tensor]:
        """Logarithms of the learnable positive scalars, by name."""

    @property
    @abstractmethod
    def curvature_scale(self) -> Tensor:
        """Factor ``1 / (sigma^2 T)`` between the stored curvature and that of the objective."""

    def state_dict(self) -> dict[str, Tensor]:
        """Values of the hyperparameters, by name."""
        return dict(self.hyperparameters)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the hyperparameters, in place."""
        with torch.no_grad():
            for name, value in self.hyperparameters.items():
                value.copy_(state[name])

    @abstractmethod
    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Un-normalised fit term of a batch, free of noise and temperature, differentiable."""

    @abstractmethod
    def log_likelihood(self, fit: Tensor, n_data: int) -> Tensor:
        """Tempered log-likelihood in nats from a summed fit term and the number of data."""

    @abstractmethod
    def root(self, outputs: Tensor, keys: Tensor | None = None, n_samples: int = 0) -> Root:
        """Root of the output Hessian: exact, or Monte Carlo with ``n_samples`` columns."""

    @abstractmethod
    def hessian(self, outputs: Tensor) -> Tensor:
        """``-d2 log p / df2`` without noise and temperature, ``[n, K, K]``."""

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The targets in the dtype and shape that ``fit`` needs, or a typed error."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean tempered negative log-likelihood of a batch: the MAP loss without its prior."""
        n_data = len(outputs)
        return -self.log_likelihood(self.fit(outputs, targets), n_data) / n_data


class Categorical(Likelihood):
    """Softmax classification, ``log p(y | f) = f_y - logsumexp(f)``.

    Args:
        temperature: ``T``.

    Example:
        >>> import torch
        >>> Categorical().loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    name = "classification"

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """None: a categorical likelihood has no scale."""
        return {}

    @property
    def curvature_scale(self) -> Tensor:
        """``1 / T``."""
        return torch.tensor(1.0 / self.temperature, dtype=torch.float64)

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log-likelihood summed over the batch, a scalar."""
        return -torch.nn.functional.cross_entropy(_promoted(outputs), targets, reduction="sum")

    def log_likelihood(self, fit: Tensor, n_data: int) -> Tensor:
        """``fit / T``."""
        return fit / self.temperature

    def root(self, outputs: Tensor, keys: Tensor | None = None, n_samples: int = 0) -> Root:
        """Exact with C - 1 columns, or Monte Carlo."""
        if keys is None:
            return SoftmaxRoot(outputs)
        return MonteCarloSoftmaxRoot(outputs, keys, n_samples)

    def hessian(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T``."""
        p = torch.softmax(outputs, -1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Labels ``[n]`` as int64; one-hot and integer-valued float labels are accepted.

        Returns:
            Class indices ``[n]``, int64.

        Raises:
            DataError: naming the first label that is no class of the model.
        """
        if outputs.ndim != 2:
            raise DataError(f"classification needs outputs [n, C], got {tuple(outputs.shape)}")
        if targets.shape == outputs.shape and outputs.shape[1] > 1:
            targets = _from_one_hot(targets)
        targets = targets.reshape(len(targets), -1).squeeze(1) if targets.ndim == 2 else targets
        if targets.shape != outputs.shape[:1]:
            raise DataError(
                f"classification needs labels [{len(outputs)}], got {tuple(targets.shape)}"
            )
        labels = targets.long()
        n_classes = outputs.shape[1]
        wrong = (labels < 0) | (labels >= n_classes) | (labels != targets)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise DataError(
                f"label {targets[index].item()} at index {index}, model has {n_classes} outputs; "
                f"labels must be integers from 0 to {n_classes - 1}"
            )
        return labels


class Gaussian(Likelihood):
    """Regression with homoscedastic noise, ``y = f + sigma * N(0, I)`` on every output.

    Args:
        sigma_noise: standard deviation, in the unit of the targets.
        temperature: ``T``.

    Raises:
        ConfigError: if ``sigma_noise`` is not positive and finite.
    """

    name = "regression"

    def __init__(self, sigma_noise: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        _require_positive("sigma_noise", sigma_noise)
        self.log_sigma_noise = torch.tensor(math.log(sigma_noise), dtype=torch.float64)

    @property
    def sigma_noise(self) -> Tensor:
        """Noise standard deviation."""
        return self.log_sigma_noise.exp()

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """``log_sigma_noise``."""
        return {"log_sigma_noise": self.log_sigma_noise}

    @property
    def curvature_scale(self) -> Tensor:
        """``1 / (sigma^2 T)``."""
        return (-2.0 * self.log_sigma_noise).exp() / self.temperature

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of squared residuals per output, ``[K]``."""
        residuals = (_promoted(targets) - _promoted(outputs)).reshape(len(outputs), -1)
        return residuals.square().sum(0)

    def log_likelihood(self, fit: Tensor, n_data: int) -> Tensor:
        """``-SSE / (2 sigma^2 T) - N K / T * log(sigma sqrt(2 pi))``."""
        log_sigma = self.log_sigma_noise.to(fit.device)
        squares = 0.5 * fit.sum() * (-2.0 * log_sigma).exp()
        constant = n_data * fit.numel() * (log_sigma + 0.5 * math.log(2.0 * math.pi))
        return -(squares + constant) / self.temperature

    def root(self, outputs: Tensor, keys: Tensor | None = None, n_samples: int = 0) -> Root:
        """Unit vectors, or Monte Carlo."""
        flat = outputs.reshape(len(outputs), -1)
        if keys is None:
            return GaussianRoot(flat)
        return MonteCarloGaussianRoot(flat, keys, n_samples)

    def hessian(self, outputs: Tensor) -> Tensor:
        """The identity."""
        flat = outputs.reshape(len(outputs), -1)
        eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        return eye.expand(len(flat), -1, -1)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets of exactly the shape of the outputs, as floats.

        Returns:
            Targets in the dtype of the outputs.

        Raises:
            DataError: if the shapes differ, which would broadcast silently, or on NaN.
        """
        if targets.shape != outputs.shape:
            raise DataError(
                f"regression targets have shape {tuple(targets.shape)}, the model returns "
                f"{tuple(outputs.shape)}; they must be equal (unsqueeze 1-D targets to [n, 1])"
            )
        if not torch.isfinite(targets).all():
            index = (~torch.isfinite(targets)).nonzero()[0].tolist()
            raise DataError(f"target at index {index} is {targets[tuple(index)].item()}")
        return targets.to(outputs.dtype)


def as_likelihood(
    likelihood: str | Likelihood, *, sigma_noise: float = 1.0, temperature: float = 1.0
) -> Likelihood:
    """The likelihood object for a name, or the object itself.

    Returns:
        A likelihood.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood == "classification":
        return Categorical(temperature)
    if likelihood == "regression":
        return Gaussian(sigma_noise, temperature)
    raise ConfigError(
        f"likelihood={likelihood!r}: use 'classification', 'regression', or a Likelihood object"
    )


def _promoted(values: Tensor) -> Tensor:
    """Half precision as float32: sums over a batch overflow otherwise."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _from_one_hot(targets: Tensor) -> Tensor:
    is_one_hot = ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) == 1)
    if not is_one_hot.all():
        index = int((~is_one_hot).nonzero()[0])
        raise DataError(f"target row {index} is no one-hot label: {targets[index].tolist()}")
    return targets.argmax(1)


def _require_positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be a positive, finite number")
