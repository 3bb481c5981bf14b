"""Likelihoods: the one objective that the MAP loss and the evidence share.

``fit`` terms are un-normalised sums, free of noise and temperature; both enter in
:meth:`Likelihood.log_likelihood` and in ``curvature_scale = 1 / (sigma^2 T)`` and nowhere else.
"""

from __future__ import annotations

from margeq.errors import ConfigError
from margeq.likelihoods.base import Likelihood
from margeq.likelihoods.categorical import Categorical
from margeq.likelihoods.gaussian import Gaussian

__all__ = ["Categorical", "Gaussian", "Likelihood", "as_likelihood"]


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
    if likelihood == "regression-per-output":
        return Gaussian(sigma_noise, temperature, noise="per-output")
    raise ConfigError(
        f"likelihood={likelihood!r}: use 'classification', 'regression', 'regression-per-output', "
        f"or a Likelihood object"
    )
