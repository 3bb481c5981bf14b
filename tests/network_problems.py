"""Small networks with hyperparameters inside, and full double back-propagation as an oracle.

The oracle keeps the graph of the curvature sums over all data and goes back through all of it. It
shares recording and rules with the two-phase pass, and nothing of the pass itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import nn

import margeq
from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit, network_gradient
from margeq.curvature.capture import backpropagate, eval_mode, record
from margeq.curvature.factors import FactorSums
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.options import KfacOptions
from margeq.curvature.sampling import reseeded, sample_keys
from margeq.laplace import log_marginal_likelihood
from margeq.layers import SparseConv2d, SparseFactoredLinear2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import (
    log_hyperprior,
    named_hyperparameters,
    named_weights,
    requiring_grad,
)
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net

EXACT = KfacOptions()


@dataclass
class Problem:
    """A model with data, cut into batches, and everything the evidence depends on."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    likelihood: Categorical | Gaussian
    prior: GaussianPrior
    hyper: dict[str, torch.Tensor]
    options: KfacOptions = EXACT
    batches: list = field(default_factory=list)

    def state(self):
        return accumulate_with(self.model, self.batches, self.likelihood, self.options)

    def value(self):
        return float(log_marginal_likelihood(self.state(), self.prior, self.likelihood))

    def gradient(self, state=None, **how):
        return network_gradient(
            self.model, self.batches, state or self.state(), self.prior, self.likelihood,
            self.hyper, self.options, revisit=Revisit(**how),
        )  # fmt: skip


def problem(model, *shape, likelihood=None, options=EXACT, outside=(), splits=(3, 4)):
    """Declared and further hyperparameters; they do not require gradients, as in training."""
    likelihood = likelihood or Categorical(0.7)
    hyper = {**named_hyperparameters(model), **{f"outside[{i}]": t for i, t in enumerate(outside)}}
    for tensor in hyper.values():
        tensor.requires_grad_(False)
    x, y = data_for(model, likelihood, *shape)
    prior = GaussianPrior(model, "layerwise", 2.0)
    sizes = [*splits, len(x) - sum(splits)]
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    return Problem(model, x, y, likelihood, prior, hyper, options, batches)


def by_double_backward(p: Problem):
    """The gradient through one graph over all data at once."""
    weights = named_weights(p.model)
    state, sums = p.state(), FactorSums(weights, p.options)
    krons = dict(state.kron)
    covs = {name: {"input_cov": 0.0, "grad_cov": 0.0} for name in weights}
    with ExitStack() as stack:
        stack.enter_context(eval_mode(p.model))
        stack.enter_context(requiring_grad(p.hyper.values()))
        with record(p.model, weights, keep_graph=True) as uses:
            outputs = p.model(p.x)
        keys = reseeded(sample_keys(p.x), p.options.seed)
        for term in sums.input_terms(uses, p.x, keys):
            rows = term.expanded_rows()
            product = torch.einsum("ntbi,ntbj->bij", rows, rows)
            covs[term.name]["input_cov"] += term.scale * product
        root, everyone = p.likelihood.root(outputs), torch.arange(len(p.x))
        for v in range(root.n_columns):
            column = root.columns(everyone, torch.full_like(everyone, v))
            grads = backpropagate(outputs, uses, column, create_graph=True)
            for name, rows in sums.grad_terms(uses, grads):
                covs[name]["grad_cov"] += torch.einsum("ntbo,ntbp->bop", rows, rows)
        for name, cov in covs.items():
            if isinstance(cov["input_cov"], torch.Tensor):
                krons[name] = replace(krons[name], **cov)
        fit = p.likelihood.fit(outputs, p.likelihood.check_targets(outputs, p.y))
        state = replace(state, curvature=BlockCurvature(krons), fit=fit)
        value = log_marginal_likelihood(state, p.prior, p.likelihood)
        value = value + log_hyperprior(p.model) - state.log_hyperprior
        leaves = list(p.hyper.values())
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return dict(zip(p.hyper, grads, strict=True))


def central_difference(p: Problem, tensor, step=1e-6):
    """In the last entry of one hyperparameter."""
    flat = tensor.detach().view(-1)
    kept, values = flat[-1].item(), []
    for sign in (1, -1):
        flat[-1] = kept + sign * step
        values.append(p.value())
    flat[-1] = kept
    return (values[0] - values[1]) / (2 * step)


def network(*modules, size=6):
    """The modules under a linear head; ``[n, 2, size, size]`` in."""
    model = nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(4)).double()
    model(torch.zeros(1, 2, size, size, dtype=F64))
    return net(*model)


def conv(*, channels=(2, 3), **options):
    return SparseConv2d(*channels, 3, **{"padding": 1, "lengthscale": 1.3, **options})


def factored(size, **options):
    return SparseFactoredLinear2d(3, 2, (size, size), (2, 2), **{"lengthscale": 1.2, **options})


# --- training

FAST = {
    "n_epochs": 8, "n_epochs_burnin": 2, "marglik_frequency": 2, "n_hypersteps": 3, "seed": 0,
    "optimizer_kwargs": {"lr": 0.02}, "progress": "none",
}  # fmt: skip


def images(n=60, dtype=F64):
    """Classes that a smooth filter tells apart: the mean grey of two corners."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=F64)
    y = (x[:, 0, :3].mean((1, 2)) > 0).long() + 2 * (x[:, 0, 3:].mean((1, 2)) > 0).long()
    return x.to(dtype), y


def loader(n=60, batch=20, dtype=F64):
    x, y = images(n, dtype)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def smooth_net(lengthscale=0.5, **options):
    torch.manual_seed(3)
    layer = SparseConv2d(1, 4, 3, anchors="grid", lengthscale=lengthscale, **options)
    return net(layer, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))


def fit(model, batches=None, **kwargs):
    return margeq.optimize_marglik(
        model, loader() if batches is None else batches, **{**FAST, **kwargs}
    )
