"""What every likelihood offers to the MAP loss and to the evidence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from margeq.curvature.roots import Root
from margeq.errors import ConfigError

__all__ = ["Likelihood", "promoted", "require_positive"]


class Likelihood(ABC):
    """Observation model ``p(y | f)^(1/T)``.

    Args:
        temperature: ``T``; larger values weaken the data against the prior.

    Raises:
        ConfigError: if the temperature is not positive and finite.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        require_positive("temperature", temperature)
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

    @property
    def weighs_outputs(self) -> bool:
        """Whether outputs count differently, by hyperparameters, so that sums are kept for each."""
        return False

    def settle(self, outputs: Tensor) -> None:
        """Take the number of hyperparameters from the outputs of a batch, if it depends on it."""
        return

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean tempered negative log-likelihood of a batch: the MAP loss without its prior."""
        n_data = len(outputs)
        return -self.log_likelihood(self.fit(outputs, targets), n_data) / n_data


def promoted(values: Tensor) -> Tensor:
    """Half precision as float32: sums over a batch overflow otherwise."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def require_positive(name: str, value: float) -> None:
    """Refuse what is not a positive, finite number.

    Raises:
        ConfigError: with name and value.
    """
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be a positive, finite number")
