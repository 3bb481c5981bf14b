"""The evidence equals laplace-torch's where both are right: zero padding, expand.

Both of its back-ends take expand for the biases of convolutions too (measured: to 1e-15), so
parity needs ``bias_approx="expand"``; the default, exact bias blocks, differs. BackPACK is left
out for convolutions, whose curvature it over-scales. All in float64.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net

BACKENDS = pytest.mark.parametrize("backend", ["CurvlinopsGGN", "AsdlGGN"])
LIKELIHOODS = pytest.mark.parametrize(
    "likelihood", [Categorical(), Gaussian(0.7)], ids=["classification", "regression"]
)
PRECISION = 2.0


def mlp():
    return net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3)), (5,)


def cnn(padding_mode="zeros"):
    first = nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding_mode)
    second = nn.Conv2d(4, 3, 3, padding=1, stride=2, padding_mode=padding_mode)
    head = nn.Linear(27, 3)
    return net(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), head), (2, 6, 6)


def theirs(laplace_torch, backend, model, batch, likelihood):
    noise = {"sigma_noise": likelihood.sigma_noise} if isinstance(likelihood, Gaussian) else {}
    posterior = laplace_torch.Laplace(
        model,
        likelihood.name,
        subset_of_weights="all",
        hessian_structure="kron",
        backend=getattr(importlib.import_module("laplace.curvature"), backend),
        prior_precision=torch.tensor(PRECISION, dtype=F64),
        **noise,
    )
    posterior.fit(DataLoader(TensorDataset(*batch), batch_size=8))
    return float(posterior.log_marginal_likelihood())


def ours(model, batch, likelihood, **options):
    state = accumulate(model, [batch], likelihood, **options)
    prior = GaussianPrior(model, prior_precision=PRECISION)
    return float(log_marginal_likelihood(state, prior, likelihood))


@BACKENDS
@LIKELIHOODS
@pytest.mark.parametrize("network", [mlp, cnn])
def test_evidence_equals_laplace_torch(laplace_torch, network, likelihood, backend):
    model, shape = network()
    batch = data_for(model, likelihood, 20, *shape)
    expected = theirs(laplace_torch, backend, model, batch, likelihood)
    found = ours(model, batch, likelihood, hessian_root="exact", bias_approx="expand")
    assert found == pytest.approx(expected, rel=1e-6)


@BACKENDS
def test_exact_bias_blocks_make_a_difference_for_convolutions_only(laplace_torch, backend):
    for network, differs in ((mlp, False), (cnn, True)):
        model, shape = network()
        batch = data_for(model, Categorical(), 20, *shape)
        expected = theirs(laplace_torch, backend, model, batch, Categorical())
        assert (ours(model, batch, Categorical()) == pytest.approx(expected, rel=1e-6)) != differs


@BACKENDS
def test_laplace_torch_is_wrong_for_circular_padding(laplace_torch, backend):
    """Its patches are zero-padded; tests/test_exactness.py shows that ours are not."""
    model, shape = cnn("circular")
    batch = data_for(model, Categorical(), 20, *shape)
    expected = theirs(laplace_torch, backend, model, batch, Categorical())
    found = ours(model, batch, Categorical(), bias_approx="expand")
    assert abs(found - expected) > 1e-3 * abs(found)
