"""The gradient inside the network as others form it: one graph through the whole curvature pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from margeq.curvature.capture import backpropagate, eval_mode, record
from margeq.curvature.factors import FactorSums
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.curvature.sampling import sample_keys
from margeq.likelihoods import Likelihood
from margeq.linalg import gram, log1p_ratio
from margeq.parameters import named_hyperparameters, named_weights
from margeq.priors import GaussianPrior

__all__ = ["full_graph_gradient"]


def full_graph_gradient(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    prior: GaussianPrior,
    likelihood: Likelihood,
) -> dict[str, Tensor]:
    """Double back-propagation through a pass whose factors keep their graph over all data."""
    weights, hyperparameters = named_weights(model), named_hyperparameters(model)
    sums = FactorSums(weights, KfacOptions())
    covs: dict[str, dict[str, Tensor]] = {"input": {}, "grad": {}}
    shared = dict.fromkeys(weights, 0.0)
    fit = torch.zeros(())
    with eval_mode(model):
        for images, labels in batches:
            with record(model, weights, keep_graph=True) as uses:
                outputs = model(images)
            fit = fit + likelihood.fit(outputs, labels)
            for term in sums.input_terms(uses, images, sample_keys(images)):
                _add(covs["input"], term.name, gram(term.rows))
                shared[term.name] += term.n_shared
            root, data = likelihood.root(outputs), torch.arange(len(images))
            for v in range(root.n_columns):
                column = root.columns(data, torch.full_like(data, v))
                grads = backpropagate(outputs, uses, column, create_graph=True)
                for name, rows in sums.grad_terms(uses, grads):
                    _add(covs["grad"], name, gram(rows))
    value = likelihood.log_likelihood(fit, 1)
    for name in weights:
        count = torch.tensor(shared[name])
        kron = BlockKron(covs["grad"][name], covs["input"][name], count)
        logs, _ = kron.log_eigenvalues(name)
        value = value - 0.5 * log1p_ratio(logs, prior.log_precision_of(name)).sum()
    leaves = list(hyperparameters.values())
    return dict(zip(hyperparameters, torch.autograd.grad(value, leaves), strict=True))


def _add(covs: dict[str, Tensor], name: str, cov: Tensor) -> None:
    covs[name] = covs[name] + cov.double() if name in covs else cov.double()
