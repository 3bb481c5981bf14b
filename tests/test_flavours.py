"""EKFAC, diagonal and full evidence against dense algebra and laplace-torch, in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq import linalg
from margeq.curvature import exact
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    eigen_bases,
    evidence,
    hyper_gradient,
)
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from tests.dense_evidence import (
    block_evidence,
    cnn,
    dense_evidence,
    dense_ratio,
    mlp,
    ours,
    problem,
    random_bases,
    random_prior,
)
from tests.oracles import F64, data_for, dense_blocks, net, relative_error

EXACT = 1e-10
BLOCKS = ("ekfac", "diag")
FLAVOURS = pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
NEW_FLAVOURS = pytest.mark.parametrize("curvature", ["ekfac", "diag", "full"])
SEEDS = pytest.mark.parametrize("seed", range(100))
LIKELIHOODS = pytest.mark.parametrize(
    "likelihood", [Categorical(1.3), Gaussian(0.6, 0.8)], ids=["softmax", "gaussian"]
)


# --- the bound


@SEEDS
@LIKELIHOODS
def test_evidence_never_exceeds_that_of_the_full_ggn(seed, likelihood):
    model, batch = problem(seed, likelihood)
    prior = random_prior(model)
    whole = dense_evidence(model, batch, likelihood, prior)
    sampled = accumulate(model, [batch], likelihood, hessian_root="mc")
    found = {
        "diag": ours(model, batch, likelihood, prior, curvature="diag"),
        "exact": ours(model, batch, likelihood, prior, curvature="ekfac"),
    }
    for name, bases in {"mc": eigen_bases(sampled), "random": random_bases(sampled)}.items():
        found[name] = ours(model, batch, likelihood, prior, curvature="ekfac", bases=bases)
    assert max(found.values()) <= whole + EXACT * abs(whole), (found, whole)
    assert ours(model, batch, likelihood, prior, curvature="full") == pytest.approx(
        whole, rel=EXACT
    )


def test_kfac_is_no_bound():
    likelihood = Categorical()
    above = 0
    for seed in range(40):
        model, batch = problem(seed, likelihood)
        prior = random_prior(model)
        whole = dense_evidence(model, batch, likelihood, prior)
        above += ours(model, batch, likelihood, prior, kfac_approx="reduce") > whole
    assert above


@SEEDS
def test_moments_are_the_diagonal_of_the_ggn_in_the_basis(seed):
    likelihood = Categorical()
    model, batch = problem(seed, likelihood, 5)
    bases = random_bases(accumulate(model, [batch], likelihood))
    dense = dense_blocks(model, batch, likelihood)
    blocks = accumulate(model, [batch], likelihood, curvature="ekfac", bases=bases)
    plain = accumulate(model, [batch], likelihood, curvature="diag")
    whole = accumulate(model, [batch], likelihood, curvature="full").curvature
    assert relative_error(whole.matrix, exact.ggn(model, [batch], likelihood)) <= EXACT
    for name, block in blocks.curvature.blocks.items():
        basis = BlockKron(*bases[name], torch.tensor(1.0, dtype=F64), block.layout).to_dense()
        expected = (basis.mT @ dense[name] @ basis).diagonal()
        moments = block.moments if block.layout == "boi" else block.moments.transpose(0, 1)
        assert relative_error(moments.flatten(), expected) <= EXACT
        in_basis = basis @ moments.flatten().diag() @ basis.mT
        assert relative_error(block.to_dense(), in_basis) <= EXACT
        diagonal = plain.curvature.blocks[name].to_dense()
        assert relative_error(diagonal, dense[name].diagonal().diag()) <= EXACT


# --- where it is exact


@LIKELIHOODS
def test_ekfac_is_the_exact_block_evidence_for_one_datum(likelihood):
    model, shape = mlp()
    batch, prior = data_for(model, likelihood, 1, *shape), random_prior(model)
    found = ours(model, batch, likelihood, prior, curvature="ekfac")
    assert found == pytest.approx(block_evidence(model, batch, likelihood, prior), rel=EXACT)


def test_ekfac_is_the_exact_block_evidence_of_a_deep_linear_net_with_squares():
    likelihood = Gaussian(0.6, 0.8)
    model = net(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    batch, prior = data_for(model, likelihood, 9, 5), random_prior(model)
    found = ours(model, batch, likelihood, prior, curvature="ekfac")
    expected = block_evidence(model, batch, likelihood, prior)
    assert found == pytest.approx(expected, rel=EXACT)
    assert dense_evidence(model, batch, likelihood, prior) > expected + 1e-3


def test_ekfac_is_the_full_evidence_of_a_single_tensor():
    likelihood = Gaussian(0.6, 0.8)
    model = net(nn.Linear(5, 4, bias=False))
    batch, prior = data_for(model, likelihood, 9, 5), random_prior(model)
    whole = dense_evidence(model, batch, likelihood, prior)
    for curvature in ("kfac", "ekfac", "full"):
        assert ours(model, batch, likelihood, prior, curvature=curvature) == pytest.approx(
            whole, rel=EXACT
        )
    assert ours(model, batch, likelihood, prior, curvature="diag") < whole - 1e-3


def test_ekfac_is_closer_to_the_full_evidence_than_diag():
    likelihood = Categorical()
    gaps = []
    for seed in range(40):
        model, batch = problem(seed, likelihood)
        prior = random_prior(model)
        found = [ours(model, batch, likelihood, prior, curvature=c) for c in BLOCKS]
        gaps.append(found[0] - found[1])
    assert sum(gap > 0 for gap in gaps) >= 38
    assert sum(gaps) / len(gaps) > 0.1


# --- the flag


@pytest.mark.parametrize(
    ("options", "is_bound"),
    [
        ({"curvature": "kfac"}, False),
        ({"curvature": "ekfac"}, True),
        ({"curvature": "diag"}, True),
        ({"curvature": "full"}, True),
        *(({"curvature": c, "hessian_root": "adaptive"}, False) for c in (*BLOCKS, "full")),
        *(({"curvature": c, "hessian_root": "mc"}, False) for c in (*BLOCKS, "full")),
        ({"curvature": "ekfac", "position_fraction": 0.5}, False),
        ({"curvature": "ekfac", "kfac_approx": "reduce", "bias_approx": "expand"}, True),
    ],
)
def test_only_exact_roots_and_moments_give_a_bound(options, is_bound):
    model, shape = cnn()
    state = accumulate(model, [data_for(model, Categorical(), 6, *shape)], **options)
    assert state.flavour.curvature == options["curvature"]
    assert state.flavour.is_bound is is_bound


@NEW_FLAVOURS
def test_a_truncated_root_raises_the_evidence(curvature):
    model, shape = cnn()
    batch, likelihood = data_for(model, Categorical(), 20, *shape), Categorical()
    prior, options = GaussianPrior(model), {"curvature": curvature}
    if curvature == "ekfac":
        options["bases"] = eigen_bases(accumulate(model, [batch], likelihood))
    cut = {"hessian_root": "adaptive", "captured_trace": 0.7}
    whole = ours(model, batch, likelihood, prior, **options)
    assert ours(model, batch, likelihood, prior, **options, **cut) > whole + 1e-3


# --- laplace-torch


@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "AsdlGGN"])
@pytest.mark.parametrize("curvature", ["diag", "full"])
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.7)], ids=["softmax", "gaussian"])
@pytest.mark.parametrize("network", [mlp, cnn])
def test_evidence_equals_laplace_torch(laplace_torch, network, likelihood, curvature, backend):
    model, shape = network()
    batch = data_for(model, likelihood, 20, *shape)
    noise = {"sigma_noise": likelihood.sigma_noise} if isinstance(likelihood, Gaussian) else {}
    posterior = laplace_torch.Laplace(
        model,
        likelihood.name,
        subset_of_weights="all",
        hessian_structure=curvature,
        backend=getattr(importlib.import_module("laplace.curvature"), backend),
        prior_precision=torch.tensor(2.0, dtype=F64),
        **noise,
    )
    posterior.fit(DataLoader(TensorDataset(*batch), batch_size=8))
    expected = float(posterior.log_marginal_likelihood())
    found = ours(
        model, batch, likelihood, GaussianPrior(model, "layerwise", 2.0), curvature=curvature
    )
    # its dense matrix from curvlinops is rounded to about 1e-9, all others to 1e-15
    rounded = (curvature, backend) == ("full", "CurvlinopsGGN")
    assert found == pytest.approx(expected, rel=1e-8 if rounded else 1e-13)


# --- hyperparameters


@FLAVOURS
@LIKELIHOODS
def test_hyper_gradients_are_central_differences(curvature, likelihood):
    model, shape = cnn("circular")
    batch = data_for(model, likelihood, 12, *shape)
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature=curvature))
    prior, step = random_prior(model), 1e-5
    value, grads = hyper_gradient(spectrum, prior, likelihood)
    assert value == float(evidence(spectrum, prior, likelihood).total)
    leaves = {**prior.log_prior_precision, **likelihood.hyperparameters}
    assert grads.keys() == leaves.keys()
    for name, leaf in leaves.items():
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step
            around.append(float(evidence(spectrum, prior, likelihood).total))
            with torch.no_grad():
                leaf -= sign * step
        difference = (around[0] - around[1]) / (2 * step)
        assert float(grads[name]) == pytest.approx(difference, rel=1e-6, abs=1e-7)


@LIKELIHOODS
@pytest.mark.parametrize("well_scaled", [True, False], ids=["cholesky", "svd"])
def test_effective_parameters_of_the_full_ggn_are_traces(likelihood, well_scaled, monkeypatch):
    monkeypatch.setattr(linalg, "_is_well_scaled", lambda _: well_scaled)
    model, shape = cnn()
    batch, prior = data_for(model, likelihood, 12, *shape), random_prior(model)
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature="full"))
    ratio = dense_ratio(model, batch, likelihood, prior)
    posterior = torch.linalg.solve(torch.eye(len(ratio), dtype=F64) + ratio, ratio).diagonal()
    sizes = [weight.numel() for weight in named_weights(model).values()]
    found = effective_parameters(spectrum, prior, likelihood)
    assert list(found) == list(named_weights(model))
    for gamma, part in zip(found.values(), posterior.split(sizes), strict=True):
        assert float(gamma) == pytest.approx(float(part.sum()), rel=1e-9)
    _, grads = hyper_gradient(spectrum, prior, likelihood)
    scatter = {n: prior.log_precision_of(n).exp() * spectrum.square_norms[n] for n in found}
    for name, gamma in found.items():
        assert float(grads[name]) == pytest.approx(0.5 * float(gamma - scatter[name]), rel=1e-9)


@pytest.mark.parametrize("curvature", BLOCKS)
def test_effective_parameters_of_blocks_are_traces(curvature):
    likelihood = Gaussian(0.5, temperature=2.0)
    model, shape = cnn()
    batch, prior = data_for(model, likelihood, 12, *shape), random_prior(model)
    state = accumulate(model, [batch], likelihood, curvature=curvature)
    found = effective_parameters(decompose(state), prior, likelihood)
    for name, block in state.curvature.blocks.items():
        dense = block.to_dense() * likelihood.curvature_scale
        eye = prior.log_precision_of(name).exp() * torch.eye(len(dense), dtype=F64)
        ratio = torch.linalg.solve(dense + eye, dense)
        assert float(found[name]) == pytest.approx(float(ratio.trace()), rel=1e-10)


@FLAVOURS
@pytest.mark.parametrize("pattern", [(-69.0,), (69.0,), (-69.0, 69.0), (69.0, -69.0, 0.0)])
def test_evidence_is_finite_for_precisions_from_1e_minus_30_to_1e30(curvature, pattern):
    model, shape = mlp()
    likelihood = Gaussian(0.7)
    batch = data_for(model, likelihood, 4, *shape)  # fewer observations than weights
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature=curvature))
    prior = GaussianPrior(model)
    for number, leaf in enumerate(prior.log_prior_precision.values()):
        leaf.fill_(pattern[number % len(pattern)])
    value, grads = hyper_gradient(spectrum, prior, likelihood)
    assert math.isfinite(value)
    assert all(math.isfinite(float(grad)) for grad in grads.values())
    gammas = effective_parameters(spectrum, prior, likelihood)
    for name, weight in named_weights(model).items():
        assert 0.0 <= float(gammas[name]) <= weight.numel() * (1 + 1e-12)
    if curvature == "full":
        rank = 3 * len(batch[0])  # noise must not count as eigenvalues, however small delta is
        assert sum(map(float, gammas.values())) <= rank * (1 + 1e-12)
    terms = evidence(spectrum, prior, likelihood)
    assert float(terms.log_determinant) >= 0.0


def test_full_log_determinant_is_exact_where_products_would_round():
    """One tensor with a tiny precision and a deficient rank, another with a huge one."""
    rows = torch.cat([1e12 * torch.randn(6, 1, dtype=F64) @ torch.randn(1, 4, dtype=F64),
                      torch.randn(5, 4, dtype=F64)])  # fmt: skip
    top = rows[:6].square().sum()
    # one huge direction; the rest lives in its complement, up to 1e-24
    direction = rows[0] / rows[0].norm()
    rest = rows[6:] - rows[6:] @ direction[:, None] * direction
    ones = torch.eye(4, dtype=F64) + rest.mT @ rest
    expected = float(top.log1p() + torch.logdet(ones))
    assert float(linalg.log_det_one_plus(rows)) == pytest.approx(expected, rel=1e-6)


@LIKELIHOODS
def test_both_ways_to_the_full_log_determinant_agree(likelihood, monkeypatch):
    model, shape = mlp()
    batch, prior = data_for(model, likelihood, 12, *shape), random_prior(model)
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature="full"))
    by_products = hyper_gradient(spectrum, prior, likelihood)
    monkeypatch.setattr(linalg, "_is_well_scaled", lambda _: False)
    by_values = hyper_gradient(spectrum, prior, likelihood)
    assert by_products[0] == pytest.approx(by_values[0], rel=1e-12)
    for name, grad in by_products[1].items():
        assert float(grad) == pytest.approx(float(by_values[1][name]), rel=1e-9)


@NEW_FLAVOURS
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_training_reaches_mackay_s_fixed_point(curvature, likelihood):
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=F64)
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    y = (
        (x[:, 0] > 0).long()
        if likelihood == "classification"
        else x[:, :2].sin() + 0.3 * torch.randn_like(x[:, :2])
    )
    result = margeq.optimize_marglik(
        model,
        [(x, y)],
        likelihood=likelihood,
        curvature=curvature,
        hessian_root="exact",
        n_epochs=150,
        n_epochs_burnin=10,
        optimizer_kwargs={"lr": 0.02},
        seed=0,
    )
    assert (result.flavour.curvature, result.flavour.is_bound) == (curvature, True)
    first = result.history.updates[0].log_marginal_likelihood
    assert first < result.log_marginal_likelihood
    gammas = effective_parameters(result.spectrum, result.prior, result.likelihood)
    free = set(gammas) - set(result.diagnostics.at_bounds)
    assert free
    for name in free:
        scatter = result.prior.log_precision_of(name).exp() * result.spectrum.square_norms[name]
        assert float(scatter) == pytest.approx(float(gammas[name]), rel=1e-4)
    assert result.to_dict()["flavour"]["is_bound"] is True
    assert str(result.effective_dimension())


@NEW_FLAVOURS
def test_options_reach_training(curvature):
    model = net(nn.Linear(4, 2))
    x = torch.randn(20, 4, dtype=F64)
    options = KfacOptions(hessian_root="mc", mc_samples=2, curvature=curvature)
    with pytest.warns(margeq.errors.ConvergenceWarning):
        result = margeq.optimize_marglik(
            model, [(x, x[:, :2])], likelihood="regression", curvature=options, n_epochs=3,
            n_epochs_burnin=1, seed=0,
        )  # fmt: skip
    assert (result.flavour.curvature, result.flavour.hessian_root) == (curvature, "mc(2)")
    assert not result.flavour.is_bound
