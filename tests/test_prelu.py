"""The slopes of PReLU: exact curvature wherever they stand; float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.curvature.options import KfacOptions
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import SparseConv2d, prelu
from margeq.likelihoods import Categorical, Gaussian
from tests.dense_evidence import block_evidence, random_prior
from tests.network_problems import network, problem
from tests.oracles import F64, data_for, dense_blocks, errors, net
from tests.test_network_gradient import assert_exact


class Twice(nn.Module):
    """One PReLU behind two maps."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 5)

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))))


NETWORKS = {
    "one": lambda: net(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)),
    "vectors": lambda: net(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)),
    "positions": lambda: net(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.PReLU(3), nn.Flatten(),
        nn.Linear(27, 3),
    ),
    "first": lambda: net(nn.PReLU(4), nn.Linear(4, 3)),
    "shared": lambda: net(Twice(), nn.Linear(5, 3)),
}  # fmt: skip


def slopes(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.3, 0.6)
    return [n for n, p in model.named_parameters() if any(p is m.weight for m in model.modules()
            if isinstance(m, nn.PReLU))]  # fmt: skip


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["c", "g"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_block_of_slopes_is_exact(kind, likelihood):
    model = NETWORKS[kind]()
    names = slopes(model)
    batch = data_for(model, likelihood, 9, 4)
    found = errors(model, batch, likelihood)
    for approx in ({}, {"kfac_approx": "reduce"}):
        found = errors(model, batch, likelihood, **approx)
        assert names
        assert all(found[name] < 1e-12 for name in names), found


def test_the_evidence_is_that_of_the_exact_blocks():
    model = net(nn.PReLU(4), nn.Linear(4, 3, bias=False), nn.PReLU(3))
    slopes(model)
    likelihood = Gaussian(0.7)
    batch, prior = data_for(model, likelihood, 1, 4), random_prior(model)  # one datum: all exact
    state = accumulate(model, [batch], likelihood)
    assert float(log_marginal_likelihood(state, prior, likelihood)) == pytest.approx(
        block_evidence(model, batch, likelihood, prior), rel=1e-10
    )


def test_very_many_slopes_are_blocks_of_their_own(monkeypatch):
    monkeypatch.setattr(prelu, "_LARGEST_BLOCK", 3)
    model = NETWORKS["positions"]()
    model[2] = nn.PReLU(3).double()
    many = net(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))
    slopes(many)
    batch = data_for(many, Categorical(), 9, 4)
    kron = accumulate(many, [batch]).kron["1.weight"]
    expected = dense_blocks(many, batch, Categorical())["1.weight"].diag()
    assert torch.allclose(kron.to_dense(), torch.diag(expected), rtol=1e-10)


@pytest.mark.parametrize("likelihood", [Categorical(0.7), Gaussian(0.6, 1.3)], ids=["c", "g"])
def test_hyperparameters_move_beside_slopes(likelihood):
    conv = SparseConv2d(2, 3, 3, padding=1, lengthscale=1.3)
    model = network(conv, nn.PReLU(3))
    slopes(model)
    assert_exact(problem(model, 9, 2, 6, 6, likelihood=likelihood))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_summed_in_wide_ones(dtype):
    model = NETWORKS["positions"]()
    slopes(model)
    x, y = data_for(model, Categorical(), 12, 4)
    expected = accumulate(model, [(x, y)]).kron["2.weight"].to_dense()
    found = accumulate(model.to(dtype), [(x.to(dtype), y)]).kron["2.weight"].to_dense()
    assert torch.allclose(found, expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_slopes_are_learned_with_a_prior_of_their_own():
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 80, dtype=F64)[:, None]
    y = torch.where(x > 0, x, 0.7 * x) + 0.05 * torch.randn(80, 1, dtype=F64)
    model = nn.Sequential(nn.PReLU()).double()
    result = margeq.optimize_marglik(
        model, [(x, y)], likelihood="regression", n_epochs=300, optimizer_kwargs={"lr": 0.02},
        curvature=KfacOptions(), seed=0, progress="none",
    )  # fmt: skip
    assert float(model[0].weight.detach()) == pytest.approx(0.7, abs=0.03)
    # the precision of one weight is one over its square, less what the data leave open
    assert float(result.prior.prior_precision["0.weight"]) == pytest.approx(1 / 0.49, rel=0.1)
    assert float(result.likelihood.sigma_noise) == pytest.approx(0.05, rel=0.25)
