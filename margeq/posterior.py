"""The Laplace posterior of the weights, and what it says about the outputs.

    p(theta | D) ~ N(theta*, P^-1),   P = kappa H + Delta,   kappa = 1 / (sigma^2 T)

Variances of the linearised outputs are formed per layer in the eigenvectors of the factors; no
Jacobian is ever materialised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from margeq.accumulation import CurvatureState
from margeq.curvature.spectral import SpectralBlock, spectral_blocks
from margeq.errors import ConfigError
from margeq.likelihoods import Likelihood
from margeq.output_scales import of_scaled_outputs
from margeq.parameters import named_weights, unwrapped
from margeq.predictive import LinearisedOutputs
from margeq.priors import GaussianPrior

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior:
    """Precision ``kappa H + Delta`` of independent weight tensors.

    Attributes:
        blocks: weight tensor -> ``kappa H``.
        prior_precisions: weight tensor -> ``delta``, scalars.
    """

    blocks: Mapping[str, SpectralBlock]
    prior_precisions: Mapping[str, Tensor]

    @classmethod
    def of(cls, state: CurvatureState, prior: GaussianPrior, likelihood: Likelihood) -> Posterior:
        """The posterior that goes with an evidence.

        Args:
            state: from :func:`margeq.laplace.accumulate`, of any flavour but ``"full"``.
            prior: of the same weights.
            likelihood: noise and temperature.

        Returns:
            Precisions, decomposed.

        Raises:
            ConfigError: for ``curvature="full"``, or a prior of other weights.
            NonFiniteError: if a factor is NaN or infinite.
            NotPSDError: if a decomposition fails for good.
        """
        state, likelihood = of_scaled_outputs(state, likelihood)
        blocks = spectral_blocks(state.curvature)
        if blocks.keys() != prior.groups.keys():
            differing = sorted(blocks.keys() ^ prior.groups.keys())
            raise ConfigError(f"prior and curvature are about different weights: {differing}")
        scale = likelihood.curvature_scale.detach().to(state.fit.device)
        return cls(
            {name: block.scaled(scale) for name, block in blocks.items()},
            {name: prior.log_precision_of(name).detach().exp() for name in blocks},
        )

    def precisions(self, name: str) -> Tensor:
        """Eigenvalues ``[b, o, i]`` of the precision of one weight tensor."""
        return self.blocks[name].values + self.prior_precisions[name]

    @cached_property
    def variances(self) -> dict[str, Tensor]:
        """Weight tensor -> eigenvalues of its covariance, in the shape of its blocks."""
        return {name: self.precisions(name).reciprocal() for name in self.blocks}

    def functional_variance(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs and their covariance per datum, ``J_n P^-1 J_n^T``, of the linearised model.

        One forward and ``K`` backward passes; memory does not grow with the number of weights.

        Args:
            model: at the weights of the posterior; left as it is, flags included.
            inputs: a tensor, or a sequence or mapping of inputs.

        Returns:
            Outputs ``[n, K]`` and covariances ``[n, K, K]``, without noise.

        Raises:
            ConfigError: for a model with other weights than the posterior.
            UnsupportedLayerError: for a layer that does not map rows of data to rows of data.
        """
        return self._linearised(model).variance(inputs)

    def functional_covariance(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`functional_variance`, of all data together.

        Args:
            model: at the weights of the posterior; left as it is, flags included.
            inputs: a tensor, or a sequence or mapping of inputs.

        Returns:
            Outputs ``[n, K]`` and their covariance ``[n K, n K]``, without noise.

        Raises:
            ConfigError: for a model with other weights than the posterior.
            UnsupportedLayerError: for a layer that does not map rows of data to rows of data.
        """
        return self._linearised(model).covariance(inputs)

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Deviations from the MAP, ``P^-1/2`` times standard normals.

        Args:
            n_samples: how many.
            generator: of the normals, on the device of the curvature.

        Returns:
            Weight tensor -> ``[n_samples, P]``, row-major in its own layout.
        """
        found = {}
        for name, block in self.blocks.items():
            like = block.values
            normals = torch.randn(
                n_samples, block.numel, dtype=like.dtype, device=like.device, generator=generator
            )
            found[name] = block.times(normals, self.variances[name].sqrt())
        return found

    def _linearised(self, model: nn.Module) -> LinearisedOutputs:
        model = unwrapped(model)
        everything = named_weights(model)
        missing = sorted(self.blocks.keys() - everything.keys())
        if missing:
            raise ConfigError(
                f"the model has no trainable weights {missing}, which the posterior is about; use "
                f"the model that it was fitted on"
            )
        weights = {name: everything[name] for name in self.blocks}
        return LinearisedOutputs(model, weights, self.blocks, self.variances)
