"""The evidence by dense algebra, and small problems to compare it on."""

from __future__ import annotations

import torch
from torch import nn

from margeq.curvature import exact
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.likelihoods import Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, dense_blocks, net
from tests.random_networks import random_network


def random_prior(model, low=-3.0, high=3.0):
    prior = GaussianPrior(model)
    prior.assign({name: low + (high - low) * torch.rand((), dtype=F64) for name in prior.groups})
    return prior


def random_bases(state):
    """Orthogonal matrices of the shapes of the Kronecker factors."""

    def orthogonal(factor):
        return torch.linalg.qr(torch.randn_like(factor)).Q

    return {n: (orthogonal(k.grad_cov), orthogonal(k.input_cov)) for n, k in state.kron.items()}


def per_weight(model, prior):
    """Precision of each single weight, in the order of the dense matrix."""
    weights = named_weights(model).items()
    return torch.cat([prior.log_precision_of(n).exp().expand(w.numel()) for n, w in weights])


def log_joint(model, batch, likelihood, prior):
    """Log-likelihood and the prior's scatter, by torch's own densities."""
    outputs = model(batch[0]).detach()
    if isinstance(likelihood, Gaussian):
        density = torch.distributions.Normal(outputs, likelihood.sigma_noise)
    else:
        density = torch.distributions.Categorical(logits=outputs)
    weights = torch.cat([w.detach().flatten() for w in named_weights(model).values()])
    scatter = (per_weight(model, prior) * weights.square()).sum()
    return float(density.log_prob(batch[1]).sum() / likelihood.temperature - 0.5 * scatter)


def dense_ratio(model, batch, likelihood, prior):
    """``kappa Delta^-1/2 H Delta^-1/2`` from autograd Jacobians."""
    half = per_weight(model, prior).rsqrt()
    matrix = exact.ggn(model, [batch], likelihood) * likelihood.curvature_scale
    return half[:, None] * matrix * half


def dense_evidence(model, batch, likelihood, prior):
    ratio = dense_ratio(model, batch, likelihood, prior)
    log_determinant = torch.logdet(torch.eye(len(ratio), dtype=F64) + ratio)
    return log_joint(model, batch, likelihood, prior) - 0.5 * float(log_determinant)


def ours(model, batch, likelihood, prior, **options):
    state = accumulate(model, [batch], likelihood, **options)
    return float(log_marginal_likelihood(state, prior, likelihood))


def problem(seed, likelihood, n_data=8):
    model, shape = random_network(seed)
    return model, data_for(model, likelihood, n_data, *shape)


def mlp():
    return net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3)), (5,)


def cnn(padding_mode="zeros"):
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding_mode)
    second = nn.Conv2d(4, 3, 3, padding=1, stride=2)
    return net(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)), (2, 6, 6)


def block_evidence(model, batch, likelihood, prior):
    """Evidence with the exact block of every tensor, and nothing between tensors."""
    total = log_joint(model, batch, likelihood, prior)
    for name, block in dense_blocks(model, batch, likelihood).items():
        ratio = block * likelihood.curvature_scale / prior.log_precision_of(name).exp()
        total -= 0.5 * float(torch.logdet(torch.eye(len(block), dtype=F64) + ratio))
    return total
