"""A noise per output: curvature, evidence and gradients against closed forms; float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from margeq import laplace
from margeq.accumulation import accumulate_with
from margeq.curvature import exact, outputs
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    hyper_gradient,
    log_marginal_likelihood,
    of_scaled_outputs,
)
from margeq.layers import FactoredLinear2d
from margeq.likelihoods import Categorical, Gaussian, as_likelihood
from margeq.posterior import Posterior
from margeq.priors import GaussianPrior
from tests.dense_evidence import block_evidence, dense_evidence, log_joint, mlp, random_prior
from tests.network_problems import central_difference as network_difference
from tests.network_problems import conv, factored, network, problem
from tests.oracles import F64, data_for, net

SIGMAS = [0.3, 1.1, 2.5]
CURVATURES = ["kfac", "ekfac", "diag", "full"]


def own(sigma=SIGMAS, temperature=1.0):
    return Gaussian(sigma, temperature, noise="per-output")


def networks():
    first = nn.Conv2d(1, 2, 3, padding=1)
    return {
        "mlp": net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        "cnn": net(nn.Unflatten(1, (1, 2, 2)), first, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        "f_fc": net(nn.Unflatten(1, (2, 2)), FactoredLinear2d(2, 3, 2, 1), nn.Flatten()),
    }


# --- closed forms


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_evidence_of_bayesian_linear_regression_is_exact(curvature, temperature):
    x = torch.randn(9, 4, dtype=F64)
    y = x @ torch.randn(4, 3, dtype=F64) + torch.tensor(SIGMAS) * torch.randn(9, 3, dtype=F64)
    model, delta = nn.Linear(4, 3, bias=False).double(), 0.7
    expected = 0.0
    for c, sigma in enumerate(SIGMAS):
        noise = sigma**2 * temperature
        matrix = x.mT @ x / noise + delta * torch.eye(4, dtype=F64)
        with torch.no_grad():
            model.weight[c] = torch.linalg.solve(matrix, x.mT @ y[:, c] / noise)
        covariance = noise * np.eye(9) + x.numpy() @ x.numpy().T / delta
        expected += multivariate_normal.logpdf(y[:, c].numpy(), cov=covariance)
        # N(y; f, s)^(1/T) is N(y; f, T s) up to this constant, which is 0 for T = 1
        constant = math.log(2 * math.pi * noise)
        expected += 4.5 * (constant - math.log(2 * math.pi * sigma**2) / temperature)
    likelihood, prior = own(temperature=temperature), GaussianPrior(model, prior_precision=delta)
    state = accumulate(model, [(x, y)], likelihood, curvature=curvature)
    found = float(log_marginal_likelihood(state, prior, likelihood))
    if curvature == "diag":  # not exact where inputs are correlated, but a bound
        assert found < expected
    else:
        assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "f_fc"])
def test_full_evidence_is_that_of_the_dense_curvature(kind, temperature):
    model, likelihood = networks()[kind], own(temperature=temperature)
    batch = data_for(model, likelihood, 10, 4)
    prior = random_prior(model)
    expected = dense_evidence(model, batch, likelihood, prior)
    state = accumulate(model, [batch], likelihood, curvature="full")
    assert float(log_marginal_likelihood(state, prior, likelihood)) == pytest.approx(
        expected, rel=1e-10
    )
    bound = accumulate(model, [batch], likelihood, curvature="ekfac")
    assert float(log_marginal_likelihood(bound, prior, likelihood)) <= expected + 1e-9


def test_kronecker_evidence_is_exact_for_deep_linear_networks():
    model, likelihood = net(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)), own()
    batch, prior = data_for(model, likelihood, 11, 4), GaussianPrior(model, prior_precision=0.3)
    state = accumulate(model, [batch], likelihood)
    assert float(log_marginal_likelihood(state, prior, likelihood)) == pytest.approx(
        block_evidence(model, batch, likelihood, prior), rel=1e-10
    )


@pytest.mark.parametrize("curvature", CURVATURES)
def test_equal_noises_are_one_noise(curvature):
    model, shape = mlp()
    batch, prior = data_for(model, Gaussian(), 12, *shape), random_prior(model)
    shared = accumulate(model, [batch], Gaussian(0.6), curvature=curvature)
    expected = float(log_marginal_likelihood(shared, prior, Gaussian(0.6)))
    for likelihood in (own(0.6), own([0.6] * 3)):
        state = accumulate(model, [batch], likelihood, curvature=curvature)
        value = float(log_marginal_likelihood(state, prior, likelihood))
        assert value == pytest.approx(expected, rel=1e-12)
        # sums that are kept per output serve one noise too, and the converse if noises are equal
        assert float(log_marginal_likelihood(state, prior, Gaussian(0.6))) == pytest.approx(
            expected, rel=1e-12
        )
        assert float(log_marginal_likelihood(shared, prior, likelihood)) == pytest.approx(
            expected, rel=1e-12
        )
    gammas = effective_parameters(decompose(state), prior, likelihood)
    theirs = effective_parameters(decompose(shared), prior, Gaussian(0.6))
    for name, gamma in theirs.items():
        assert float(gammas[name]) == pytest.approx(float(gamma), rel=1e-10)
    # so do the eigenvalues by themselves
    logs = {name: torch.tensor(0.4, dtype=F64) for name in theirs}
    scale = torch.tensor(0.7, dtype=F64)
    kept, plain = decompose(state).eigenvalues, decompose(shared).eigenvalues
    value, other = (float(e.log_determinant(logs, scale)) for e in (kept, plain))
    assert value == pytest.approx(other, rel=1e-10)
    found, expected = (e.effective(logs, scale) for e in (kept, plain))
    for name, gamma in expected.items():
        assert float(found[name]) == pytest.approx(float(gamma), rel=1e-10)
    # the sum over outputs of the gradient in their noises is that in one noise
    _, mine = hyper_gradient(decompose(state), prior, likelihood)
    _, one = hyper_gradient(decompose(shared), prior, Gaussian(0.6))
    assert float(mine["log_sigma_noise"].sum()) == pytest.approx(
        float(one["log_sigma_noise"]), rel=1e-10
    )


def test_outputs_in_other_units_have_the_same_evidence_but_for_the_units():
    model, likelihood = nn.Linear(4, 3).double(), own()
    x, y = data_for(model, likelihood, 12, 4)
    units = torch.tensor([1e-3, 1.0, 1e4], dtype=F64)
    # one bias and one weight row per output keep their prior in the units of the output
    heads = nn.ModuleList([nn.Linear(4, 1).double() for _ in range(3)])

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = heads

        def forward(self, x):
            return torch.cat([head(x) for head in self.heads], 1)

    values = []
    for scale in (torch.ones(3, dtype=F64), units):
        wide = Heads()
        for c, head in enumerate(heads):
            with torch.no_grad():
                head.weight.copy_(model.weight[c : c + 1] * scale[c])
                head.bias.copy_(model.bias[c : c + 1] * scale[c])
        precisions = {
            n: float(scale[int(n.split(".")[1])]) ** -2 for n, _ in wide.named_parameters()
        }
        prior = GaussianPrior(wide, prior_precision=precisions)
        noisy = own([s * float(u) for s, u in zip(SIGMAS, scale, strict=True)])
        state = accumulate(wide, [(x, y * scale)], noisy)
        values.append(float(log_marginal_likelihood(state, prior, noisy)))
    assert values[1] == pytest.approx(values[0] - 12 * float(units.log().sum()), rel=1e-10)


# --- gradients


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "f_fc"])
def test_gradients_in_the_noises_are_central_differences(kind, curvature, temperature):
    model, likelihood = networks()[kind], own(temperature=temperature)
    batch, prior = data_for(model, likelihood, 12, 4), random_prior(model)
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature=curvature))
    _, gradient = hyper_gradient(spectrum, prior, likelihood)
    leaves = [*prior.log_prior_precision.items(), *likelihood.hyperparameters.items()]
    for name, leaf in leaves:
        flat = leaf.view(-1)
        for place in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[place] += sign * 1e-5
                values.append(float(log_marginal_likelihood(spectrum, prior, likelihood)))
                flat[place] -= sign * 1e-5
            expected = (values[0] - values[1]) / 2e-5
            found = float(gradient[name].flatten()[place])
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), (name, place)


@pytest.mark.parametrize("kind", ["conv", "s-fc"])
def test_gradients_inside_the_network_weigh_the_outputs(kind):
    layers = {
        "conv": lambda: network(conv(), nn.Tanh()),
        "s-fc": lambda: network(conv(), nn.Tanh(), factored(6)),
    }
    likelihood = Gaussian([0.3, 1.0, 2.0, 0.5], 1.3, noise="per-output")
    p = problem(layers[kind](), 9, 2, 6, 6, likelihood=likelihood)
    found = p.gradient()
    for name, tensor in p.hyper.items():
        assert found[name].flatten()[-1].item() == pytest.approx(
            network_difference(p, tensor), rel=1e-6, abs=1e-6
        )


def test_sketched_gradients_are_right_on_average():
    likelihood = Gaussian([0.5, 1.0, 2.0, 0.7], noise="per-output")
    p = problem(network(conv(), nn.Tanh()), 9, 2, 6, 6, likelihood=likelihood)
    (name,) = p.hyper
    exactly = float(p.gradient()[name])
    draws = [float(p.gradient(sketched=True, seed=seed)[name]) for seed in range(60)]
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws) - exactly) < 4 * error
    assert error < 0.2 * abs(exactly)


# --- sums


@pytest.mark.parametrize("root", ["exact", "adaptive", "mc"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_any_batch_split_and_sums_of_states_give_the_same(curvature, root):
    model, shape = mlp()
    x, y = data_for(model, own(), 13, *shape)
    prior, options = random_prior(model), {"curvature": curvature, "hessian_root": root}
    if curvature == "ekfac":  # both passes in one basis
        options["bases"] = laplace.eigen_bases(accumulate(model, [(x, y)], "regression"))
    whole = accumulate(model, [(x, y)], own(), **options)
    split = [*zip(x.split([1, 5, 7]), y.split([1, 5, 7]), strict=True)]
    parts = [accumulate(model, [batch], own(), **options) for batch in split]
    states = [accumulate(model, split[::-1], own(), **options), parts[0] + parts[1] + parts[2]]
    expected = float(log_marginal_likelihood(whole, prior, own()))
    for state in states if root != "adaptive" else states[:1]:
        assert float(log_marginal_likelihood(state, prior, own())) == pytest.approx(
            expected, rel=1e-11
        )


def test_adaptive_keeps_everything():
    model, shape = mlp()
    batch, prior = data_for(model, own(), 13, *shape), random_prior(model)
    values = [
        float(log_marginal_likelihood(accumulate(model, [batch], own(), **o), prior, own()))
        for o in ({}, {"hessian_root": "adaptive", "captured_trace": 0.5})
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize(("kind", "curvature"), [("mlp", "full"), ("cnn", "kfac"), ("cnn", "diag")])
def test_drawn_outputs_are_unbiased(kind, curvature):
    model = networks()[kind]
    batch = data_for(model, own(), 6, 4)
    exactly = accumulate(model, [batch], own(), curvature=curvature).curvature
    options = [KfacOptions("mc", 2, curvature=curvature, seed=seed) for seed in range(200)]
    draws = [accumulate_with(model, [batch], own(), o).curvature.parts for o in options]
    for name, expected in exactly.parts.items():
        sample = torch.stack([draw[name] for draw in draws])
        error = sample.std(0) / len(sample) ** 0.5
        assert ((sample.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("sizes", [(3, 3), (3, 20, 3)], ids=["head", "deep"])
def test_outputs_in_other_units_are_told_from_rounding_noise(sizes):
    # in the deep one each output has a curvature of rank one; noise of the first is 1e8 times as
    # large as that of the others
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    narrow, wide = (
        nn.Sequential(*layers),
        net(*[nn.Linear(m.in_features, m.out_features) for m in layers]),
    )
    wide.load_state_dict(narrow.state_dict())
    likelihood = own([1e-4, 1.0, 1.0])
    x, y = torch.randn(15, 3), torch.randn(15, 3)
    prior = GaussianPrior(wide, prior_precision=0.01)
    batch = x.double(), y.double()
    expected = 2 * (
        log_joint(wide, batch, likelihood, prior) - block_evidence(wide, batch, likelihood, prior)
    )
    for model, data in ((narrow, (x, y)), (wide, batch)):
        spectrum = decompose(accumulate(model, [data], likelihood))
        found = laplace.evidence(spectrum, prior, likelihood).log_determinant
        assert float(found) == pytest.approx(expected, rel=1e-5)


# --- posterior, hand-over, refusals


def test_posterior_and_predictive_covariance_are_those_of_the_dense_curvature():
    model, likelihood = net(nn.Linear(4, 3), nn.Linear(3, 3)), own(temperature=1.4)
    x, y = data_for(model, likelihood, 11, 4)
    for parameter in (model[0].bias, model[1].bias, model[1].weight):
        parameter.requires_grad_(False)
    prior = GaussianPrior(model, prior_precision=0.4)
    posterior = Posterior.of(accumulate(model, [(x, y)], likelihood), prior, likelihood)
    precision = exact.ggn(model, [(x, y)], likelihood) * likelihood.curvature_scale
    precision = precision + 0.4 * torch.eye(len(precision), dtype=F64)
    jacobian = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, {"0.weight": w}, (x,))
    )(model[0].weight.detach())
    jacobian = jacobian.reshape(11, 3, -1)
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    _, found = posterior.functional_variance(model, x)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_factors_need_the_noise_that_weighs_them():
    model, shape = mlp()
    state = accumulate(model, [data_for(model, own(), 8, *shape)], own())
    with pytest.raises(ConfigError, match="of_scaled_outputs"):
        _ = state.kron
    weighted, shared = of_scaled_outputs(state, own())
    assert set(weighted.kron) == set(state.square_norms)
    assert float(shared.sigma_noise) == pytest.approx(math.prod(SIGMAS) ** (1 / 3), rel=1e-12)


def test_sums_of_all_outputs_cannot_be_weighed():
    model, shape = mlp()
    batch = data_for(model, own(), 8, *shape)
    state = accumulate(model, [batch], Gaussian())
    with pytest.raises(ConfigError, match="accumulate with this likelihood"):
        log_marginal_likelihood(state, GaussianPrior(model), own())
    kept = accumulate(model, [batch], own())
    with pytest.raises(ConfigError, match="sigma_noise has 2 values, the model has 3 outputs"):
        log_marginal_likelihood(kept, GaussianPrior(model), own([1.0, 2.0]))
    with pytest.raises(ConfigError, match="backend='margeq'"):
        accumulate(model, [batch], own(), backend="backpack")


def test_too_many_outputs_are_refused_with_the_ways_out(monkeypatch):
    monkeypatch.setattr(outputs, "LARGEST_PER_OUTPUT", 100)
    model, shape = mlp()
    with pytest.raises(ConfigError, match=r"each of 3 outputs.*noise='shared'.*parameters"):
        accumulate(model, [data_for(model, own(), 8, *shape)], own())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(noise="own"), "noise='own'.*'per-output'"),
        (lambda: Gaussian([1.0, 2.0]), "pass noise='per-output'"),
        (lambda: Gaussian([1.0, -2.0], noise="per-output"), r"sigma_noise\[1\]=-2.0"),
        (lambda: Gaussian(torch.tensor([1.0, math.nan]), noise="per-output"), r"\[1\]=nan"),
        (lambda: Gaussian([], noise="per-output"), "empty"),
        (lambda: Gaussian("1", noise="per-output"), "positive, finite"),
        (lambda: Gaussian(0.0, noise="per-output"), "positive, finite"),
    ],
)
def test_noises_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_noises_are_shown():
    assert repr(own(temperature=2.0)) == (
        "Gaussian(sigma_noise=[0.3, 1.1, 2.5], temperature=2.0, noise='per-output')"
    )
    assert repr(Gaussian(0.5)) == "Gaussian(sigma_noise=0.5, temperature=1.0)"
    assert as_likelihood("regression-per-output", sigma_noise=0.2).weighs_outputs
    assert not Categorical().weighs_outputs
    assert torch.allclose(own().sigma_noise, torch.tensor(SIGMAS, dtype=F64))


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_loss_is_the_tempered_density_of_torch(temperature):
    outputs_, targets = torch.randn(2, 5, 3, dtype=F64)
    sigmas = torch.tensor(SIGMAS, dtype=F64)
    density = torch.distributions.Normal(outputs_, sigmas).log_prob(targets).sum()
    assert float(own(temperature=temperature).loss(outputs_, targets)) == pytest.approx(
        -float(density) / temperature / 5, rel=1e-12
    )
