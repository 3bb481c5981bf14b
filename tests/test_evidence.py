"""The evidence against closed forms and finite differences; float64."""

from __future__ import annotations

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import multivariate_normal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from margeq.curvature.forms import BlockEigenvalues, without_zeros
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    evidence,
    hyper_gradient,
    log_marginal_likelihood,
)
from margeq.layers import FactoredLinear2d
from margeq.likelihoods import Categorical, Gaussian, as_likelihood
from margeq.linalg import log1p_ratio
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net

TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])


# --- a linear model with Gaussian noise: Laplace is exact


def linear_data(n_data=7, n_in=3, n_out=2):
    x = torch.randn(n_data, n_in, dtype=F64)
    return x, x @ torch.randn(n_in, n_out, dtype=F64) + torch.randn(n_data, n_out, dtype=F64)


def set_to_map(model, x, y, likelihood, precision):
    """The MAP in closed form, for a linear model whose weight and bias do not interact."""
    scale = likelihood.curvature_scale
    with torch.no_grad():
        if model.weight.requires_grad:
            matrix = scale * x.mT @ x + precision["weight"] * torch.eye(x.shape[1], dtype=F64)
            model.weight.copy_(torch.linalg.solve(matrix, scale * x.mT @ y).mT)
        if model.bias is not None:
            total = scale * len(x) + precision["bias"]
            model.bias.copy_(scale * y.sum(0) / total)


def log_normal(x, y, likelihood, precision, features):
    """log N(y_k; 0, sigma^2 T I + sum_features phi phi^T / delta), plus the tempering constant."""
    noise = float(likelihood.sigma_noise) ** 2
    temperature = likelihood.temperature
    covariance = noise * temperature * np.eye(len(x))
    for name in features:
        phi = x.numpy() if name == "weight" else np.ones((len(x), 1))
        covariance += phi @ phi.T / precision[name]
    total = sum(multivariate_normal.logpdf(column, cov=covariance) for column in y.numpy().T)
    # N(y; f, s)^(1/T) is N(y; f, T s) up to this constant, which is 0 for T = 1
    constant = math.log(2 * math.pi * noise * temperature)
    return total + 0.5 * y.numel() * (constant - math.log(2 * math.pi * noise) / temperature)


def bias_alone():
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    model.weight.requires_grad_(False)
    return model


@TEMPERATURES
@pytest.mark.parametrize("kind", ["weight", "bias", "both"])
def test_evidence_of_a_linear_gaussian_model_is_exact(kind, temperature):
    x, y = linear_data()
    if kind == "both":
        x = x - x.mean(0)  # centred inputs decouple the weight from the bias
    precision = {"weight": 0.4, "bias": 2.3}
    model = bias_alone() if kind == "bias" else nn.Linear(3, 2, bias=kind == "both").double()
    features = ["weight", "bias"] if kind == "both" else [kind]
    likelihood = Gaussian(0.7, temperature)
    set_to_map(model, x, y, likelihood, precision)
    prior = GaussianPrior(model, prior_precision={name: precision[name] for name in features})
    found = log_marginal_likelihood(accumulate(model, [(x, y)], likelihood), prior, likelihood)
    assert float(found) == pytest.approx(
        log_normal(x, y, likelihood, precision, features), rel=1e-10
    )


@TEMPERATURES
@pytest.mark.parametrize("kind", ["mlp", "cnn", "f_fc"])
@pytest.mark.parametrize("name", ["classification", "regression"])
def test_evidence_is_the_textbook_formula_on_dense_blocks(name, kind, temperature):
    sigma = 0.6
    likelihood = as_likelihood(name, sigma_noise=sigma, temperature=temperature)
    model = networks()[kind]
    x, y = data_for(model, likelihood, 12, 4)
    prior = staggered(GaussianPrior(model))
    state = accumulate(model, [(x, y)], likelihood)
    density = torch.distributions.Categorical(logits=model(x))
    scale = 1 / temperature
    if name == "regression":
        density = torch.distributions.Normal(model(x), sigma)
        scale /= sigma**2
    expected = density.log_prob(y).sum() / temperature
    for tensor, weight in model.named_parameters():
        precision = prior.prior_precision[tensor]
        dense = state.kron[tensor].to_dense() * scale / precision
        expected -= 0.5 * torch.logdet(torch.eye(len(dense), dtype=F64) + dense)
        expected -= 0.5 * precision * weight.square().sum()
    found = log_marginal_likelihood(state, prior, likelihood)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-10)


# --- gradients in the hyperparameters


def networks():
    mlp = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    cnn = net(nn.Unflatten(1, (1, 2, 2)), conv, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    factored = net(nn.Unflatten(1, (2, 2)), FactoredLinear2d(2, 3, 2, 1), nn.Flatten())
    return {"mlp": mlp, "cnn": cnn, "f_fc": factored}


def staggered(prior):
    """The prior with another precision for each group."""
    for number, name in enumerate(prior.log_prior_precision):
        prior.log_prior_precision[name] += 0.7 * number - 1.0
    return prior


def objective(kind, likelihood, structure="layerwise"):
    model = networks()[kind]
    batch = data_for(model, likelihood, 12, 4)
    spectrum = decompose(accumulate(model, [batch], likelihood))
    return spectrum, staggered(GaussianPrior(model, structure)), likelihood


def central_difference(spectrum, prior, likelihood, leaf, step=1e-5):
    values = []
    for sign in (1, -1):
        leaf += sign * step
        values.append(float(log_marginal_likelihood(spectrum, prior, likelihood)))
        leaf -= sign * step
    return (values[0] - values[1]) / (2 * step)


@TEMPERATURES
@pytest.mark.parametrize("kind", ["mlp", "cnn", "f_fc"])
@pytest.mark.parametrize("likelihood_type", [Categorical, Gaussian])
def test_hyper_gradient_is_the_central_difference(kind, likelihood_type, temperature):
    likelihood = likelihood_type(temperature=temperature)
    spectrum, prior, likelihood = objective(kind, likelihood)
    value, gradient = hyper_gradient(spectrum, prior, likelihood)
    assert value == float(log_marginal_likelihood(spectrum, prior, likelihood))
    leaves = {**prior.log_prior_precision, **likelihood.hyperparameters}
    assert set(gradient) == set(leaves)
    for name, leaf in leaves.items():
        expected = central_difference(spectrum, prior, likelihood, leaf)
        assert float(gradient[name]) == pytest.approx(expected, rel=1e-6), name


def test_hyper_gradient_sums_over_the_tensors_of_a_group():
    spectrum, prior, likelihood = objective("mlp", Gaussian(0.5), structure="scalar")
    _, gradient = hyper_gradient(spectrum, prior, likelihood)
    leaf = prior.log_prior_precision["all"]
    expected = central_difference(spectrum, prior, likelihood, leaf)
    assert float(gradient["all"]) == pytest.approx(expected, rel=1e-6)


def test_noise_gradient_is_right_where_laplace_torch_is_wrong(laplace_torch):
    curvature = importlib.import_module("laplace.curvature")
    model, likelihood = networks()["mlp"], Gaussian(0.7)
    x, y = data_for(model, likelihood, 12, 4)
    spectrum = decompose(accumulate(model, [(x, y)], likelihood))
    _, gradient = hyper_gradient(spectrum, GaussianPrior(model), likelihood)
    ours = float(gradient["log_sigma_noise"])

    posterior = laplace_torch.Laplace(
        model,
        "regression",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=curvature.CurvlinopsGGN,
    )
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=12))

    def value(log_sigma):
        return posterior.log_marginal_likelihood(torch.ones(1, dtype=F64), log_sigma.exp())

    at = torch.tensor(math.log(0.7), dtype=F64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notices the tensor that laplace-torch detaches
        (autograd,) = torch.autograd.grad(value(at), at)
    with torch.no_grad():
        difference = (value(at + 1e-5) - value(at - 1e-5)) / 2e-5
    assert ours == pytest.approx(float(difference), rel=1e-6)
    assert abs(float(autograd / difference) - 1) > 0.05


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.3)], ids=["softmax", "squares"])
@pytest.mark.parametrize("exponent", [-30, -15, 0, 15, 30])
def test_value_and_gradient_are_finite_for_extreme_precisions(likelihood, exponent):
    spectrum, prior, likelihood = objective("cnn", likelihood)
    for leaf in prior.log_prior_precision.values():
        leaf.fill_(exponent * math.log(10.0))
    value, gradient = hyper_gradient(spectrum, prior, likelihood)
    assert math.isfinite(value)
    assert all(math.isfinite(float(slope)) for slope in gradient.values())


def test_extreme_noise_is_finite():
    for sigma in (1e-15, 1e15):
        value, gradient = hyper_gradient(*objective("mlp", Gaussian(sigma)))
        assert math.isfinite(value)
        assert all(math.isfinite(float(slope)) for slope in gradient.values())


@pytest.mark.parametrize("difference", [-math.inf, -1400.0, -30.0, 0.0, 30.0, 41.0, 1400.0])
def test_log_ratio_is_exact_and_finite_over_the_whole_range(difference):
    denominator = torch.tensor(-300.0, dtype=F64, requires_grad=True)
    value = log1p_ratio(torch.tensor(difference - 300.0, dtype=F64), denominator)
    value.backward()
    assert float(value.detach()) == pytest.approx(np.logaddexp(0.0, difference), rel=1e-14)
    assert float(denominator.grad) == pytest.approx(-expit(difference), rel=1e-14)


# --- effective parameters


@given(st.lists(st.floats(-40, 40), min_size=2, max_size=6))
def test_effective_parameters_fall_from_all_to_none(log_precisions):
    spectrum, prior, likelihood = objective("cnn", Categorical())
    before = {name: float(len(logs)) for name, logs in spectrum.eigenvalues.logs.items()}
    for log_precision in sorted(log_precisions):
        for leaf in prior.log_prior_precision.values():
            leaf.fill_(log_precision)
        now = effective_parameters(spectrum, prior, likelihood)
        for name, value in now.items():
            assert 0.0 <= float(value) <= before[name] * (1 + 1e-12)
            before[name] = float(value)


def test_effective_parameters_are_the_trace_of_the_dense_ratio():
    likelihood = Gaussian(0.5, temperature=2.0)
    model = networks()["f_fc"]
    state = accumulate(model, [data_for(model, likelihood, 12, 4)], likelihood)
    prior = GaussianPrior(model, prior_precision=3.0)
    found = effective_parameters(decompose(state), prior, likelihood)
    for name, kron in state.kron.items():
        dense = kron.to_dense() * likelihood.curvature_scale
        ratio = torch.linalg.solve(dense + 3.0 * torch.eye(len(dense), dtype=F64), dense)
        assert float(found[name]) == pytest.approx(float(ratio.trace()), rel=1e-10)


# --- the MAP loss is the evidence's log joint


def log_joint(model, batch, prior, likelihood):
    terms = evidence(decompose(accumulate(model, [batch], likelihood)), prior, likelihood)
    return float(terms.log_likelihood - 0.5 * terms.scatter)


@TEMPERATURES
@pytest.mark.parametrize("likelihood_type", [Categorical, Gaussian])
def test_map_loss_has_the_gradient_of_the_log_joint(likelihood_type, temperature):
    likelihood = likelihood_type(temperature=temperature)
    model = networks()["mlp"]
    x, y = data_for(model, likelihood, 12, 4)
    prior = GaussianPrior(model, prior_precision=3.0)
    weights = dict(model.named_parameters())
    scatter = sum(prior.log_precision_of(n).exp() * w.square().sum() for n, w in weights.items())
    loss = likelihood.loss(model(x), y) + 0.5 * scatter / len(x)
    gradient = torch.autograd.grad(loss, list(weights.values()))

    direction = [torch.randn_like(weight) for weight in weights.values()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    values, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2):
            for weight, d in zip(weights.values(), direction, strict=True):
                weight += sign * step * d
            values.append(log_joint(model, (x, y), prior, likelihood))
    assert -len(x) * slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@TEMPERATURES
def test_loss_is_the_tempered_density_of_torch(temperature):
    outputs, targets = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    density = torch.distributions.Normal(outputs, 0.7).log_prob(targets).sum() / temperature / 5
    assert float(Gaussian(0.7, temperature).loss(outputs, targets)) == pytest.approx(
        -float(density), rel=1e-12
    )
    labels = torch.tensor([0, 2, 1, 1, 0])
    density = torch.distributions.Categorical(logits=outputs).log_prob(labels).mean() / temperature
    assert float(Categorical(temperature).loss(outputs, labels)) == pytest.approx(
        -float(density), rel=1e-12
    )


def test_eigenvalues_that_are_zero_are_left_out():
    """Five data know a part of 36 directions; the others add nothing at any precision."""
    likelihood = Categorical()
    model = nn.Sequential(nn.Linear(12, 3)).double()
    state = accumulate(model, [data_for(model, likelihood, 5, 12)], likelihood)
    spectrum, prior = decompose(state), GaussianPrior(model, prior_precision=2.0)
    logs, _ = state.curvature.blocks["0.weight"].log_eigenvalues()
    kept = spectrum.eigenvalues.logs["0.weight"]
    assert logs.numel() == 36
    assert kept.numel() == int((logs > -math.inf).sum()) <= 10
    dense = state.curvature.blocks["0.weight"].to_dense() / 2.0
    precision = {"0.weight": torch.tensor(2.0, dtype=F64).log()}
    only = BlockEigenvalues({"0.weight": kept}, 0)
    zero = torch.zeros((), dtype=F64)
    eye = torch.eye(36, dtype=F64)
    assert float(only.log_determinant(precision, zero)) == pytest.approx(
        float(torch.logdet(eye + dense)), rel=1e-10
    )
    assert float(effective_parameters(spectrum, prior, likelihood)["0.weight"]) == pytest.approx(
        float((dense @ torch.linalg.inv(eye + dense)).trace()), rel=1e-10
    )
    odd = torch.tensor([0.0, -math.inf, math.nan])
    assert without_zeros(odd).isnan().tolist() == [False, True]  # a mistake is not swept away
