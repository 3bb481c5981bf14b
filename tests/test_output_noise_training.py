"""Training with a noise per output: what is learned, resumed, shared by ranks and reported."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import margeq
from margeq.checkpoint import Checkpoints
from margeq.curvature import outputs
from margeq.curvature.options import KfacOptions
from margeq.distributed import accumulate
from margeq.errors import CheckpointMismatch, ConfigError, ConvergenceWarning, DataError
from margeq.laplace import accumulate as accumulate_alone
from margeq.laplace import decompose, hyper_gradient, log_marginal_likelihood
from margeq.layers import SparseConv2d
from margeq.likelihoods import Gaussian
from margeq.posterior import Posterior
from margeq.priors import GaussianPrior
from margeq.report.words import evidence_sentence, noise_line
from margeq.training.solvers import Lbfgs, MacKay
from tests.dense_evidence import mlp, random_prior
from tests.oracles import F64, data_for, net
from tests.ranks import on_ranks

TRUE = torch.tensor([0.1, 0.5, 2.0], dtype=F64)


def data(n=600, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 4.0 * torch.rand(n, 1, generator=generator, dtype=F64) - 2.0
    f = torch.cat([torch.sin(2 * x), torch.cos(x), 0.5 * x.square()], 1)
    y = f + TRUE * torch.randn(n, 3, generator=generator, dtype=F64)
    return x.to(dtype), y.to(dtype)


def network(dtype=F64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)


def fit(model=None, batches=None, **options):
    """One call that does not mind that it is short."""
    quick = {
        "likelihood": "regression-per-output", "n_epochs": 200, "marglik_frequency": 20,
        "optimizer_kwargs": {"lr": 0.02}, "seed": 0, "progress": "none",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return margeq.optimize_marglik(
            network() if model is None else model,
            [data()] if batches is None else batches,
            **{**quick, **options},
        )


# --- what is learned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["mackay", "adam", "lbfgs"])
def test_the_noise_of_each_output_is_found(solver, dtype):
    result = fit(network(dtype), [data(dtype=dtype)], hyper_solver=solver)
    # the standard error of a standard deviation from 600 data is 3 %
    assert torch.allclose(result.likelihood.sigma_noise, TRUE, rtol=0.1)
    assert result.diagnostics.gradient_norm < 1e-2
    single = fit(network(dtype), [data(dtype=dtype)], likelihood="regression", hyper_solver=solver)
    assert result.log_bayes_factor(single) > 500.0
    assert single.likelihood.sigma_noise.ndim == 0


def test_the_fixed_point_is_the_optimum():
    model, shape = mlp()
    x, y = data_for(model, Gaussian(), 40, *shape)
    y = y * torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    likelihood, prior = Gaussian([1.0] * 3, 1.3, noise="per-output"), random_prior(model)
    spectrum = decompose(accumulate_alone(model, [(x, y)], likelihood))
    MacKay().converge(spectrum, prior, likelihood)
    value, gradient = hyper_gradient(spectrum, prior, likelihood)
    assert gradient["log_sigma_noise"].abs().max() < 1e-4
    Lbfgs().converge(spectrum, prior, likelihood)
    assert hyper_gradient(spectrum, prior, likelihood)[0] == pytest.approx(value, abs=1e-5)


def test_one_output_has_the_noise_of_one():
    x, y = data()
    model = [nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Linear(9, 1)).double() for _ in range(2)]
    model[1].load_state_dict(model[0].state_dict())
    own = fit(model[0], [(x, y[:, 1:2])])
    one = fit(model[1], [(x, y[:, 1:2])], likelihood="regression")
    assert own.likelihood.sigma_noise.shape == (1,)
    assert own.log_marginal_likelihood == pytest.approx(one.log_marginal_likelihood, rel=1e-9)


def test_more_weights_than_data_keep_the_noises_finite():
    result = fit(network(), [data(n=5)], hyper_solver="mackay", n_epochs=60)
    assert torch.isfinite(result.likelihood.sigma_noise).all()
    assert result.log_marginal_likelihood > -1e4


def test_noises_begin_where_they_are_given():
    given = Gaussian([0.2, 0.4, 3.0], noise="per-output")
    result = fit(likelihood=given, hyper_solver="fixed", n_epochs=10)
    assert result.likelihood.sigma_noise.tolist() == pytest.approx([0.2, 0.4, 3.0])
    assert result.likelihood is not given
    one = fit(sigma_noise_init=0.3, hyper_solver="fixed", n_epochs=10)
    assert one.likelihood.sigma_noise.tolist() == pytest.approx([0.3] * 3)


def test_another_number_of_noises_than_outputs_is_refused_before_the_first_step():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="2 values, the model has 3 outputs"):
        fit(model, likelihood=Gaussian([1.0, 2.0], noise="per-output"))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "full"])
def test_too_many_outputs_are_refused_before_the_first_step(curvature, monkeypatch):
    monkeypatch.setattr(outputs, "LARGEST_PER_OUTPUT", 100)
    with pytest.raises(ConfigError, match=r"each of 3 outputs.*noise='shared'"):
        fit(callbacks=[stop_at(1)], curvature=curvature, hessian_root="exact")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"backend='margeq'"):
        fit(callbacks=[stop_at(1)], backend="backpack", hessian_root="exact")


@pytest.mark.parametrize("curvature", ["ekfac", "diag", "full"])
def test_other_curvatures_learn_them_too(curvature):
    result = fit(curvature=curvature, hessian_root="exact", n_epochs=100)
    assert torch.allclose(result.likelihood.sigma_noise, TRUE, rtol=0.15)


def test_hyperparameters_inside_the_network_move_beside_them():
    torch.manual_seed(0)
    layer = SparseConv2d(1, 3, 3, padding=1, lengthscale=1.0, anchors="grid")
    model = net(layer, nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(40, 1, 4, 4, dtype=F64)
    y = torch.cat([x.mean((1, 2, 3))[:, None], x[:, 0, 0, :1]], 1)
    y = y + torch.tensor([0.05, 0.5]) * torch.randn(40, 2, dtype=F64)
    for method in ("exact", "sketched", "closed-form"):
        result = fit(model, [(x, y)], network_gradient=method, n_epochs=60)
        assert result.likelihood.sigma_noise[0] < result.likelihood.sigma_noise[1]
        assert (
            result.history.updates[0].hyperparameters != result.history.updates[-1].hyperparameters
        )


def test_fifty_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator, dtype=F64)
    sigmas = torch.linspace(0.05, 2.0, 50, dtype=F64)
    weight = torch.randn(5, 50, generator=generator, dtype=F64)
    y = x @ weight + sigmas * torch.randn(300, 50, generator=generator, dtype=F64)
    model = nn.Linear(5, 50).double()
    for root in ("adaptive", "mc"):
        found = fit(model, [(x, y)], hessian_root=root, n_epochs=300).likelihood.sigma_noise
        assert torch.allclose(found, sigmas, rtol=0.2)


# --- hand-over and words


def test_reports_name_them(tmp_path):
    result = fit(n_epochs=60)
    plain = json.loads(json.dumps(result.to_dict()))
    sigmas = result.likelihood.sigma_noise.tolist()
    assert plain["likelihood"]["sigma_noise"] == sigmas
    assert plain["restarts"][0]["history"]["updates"][-1]["sigma_noise"] == pytest.approx(
        sigmas, rel=0.1
    )
    assert noise_line(plain) == f"{', '.join(f'{s:.3g}' for s in sigmas)} (one per output)"
    assert noise_line(plain) in evidence_sentence(plain)
    assert noise_line(plain) in Path(result.report(tmp_path)).read_text()


def test_many_noises_are_summed_up():
    many = {"likelihood": {"sigma_noise": [0.1 * i for i in range(1, 10)]}}
    assert noise_line(many) == "0.1 to 0.9, median 0.5 (one for each of 9 outputs)"
    assert noise_line({"likelihood": {"sigma_noise": 0.25}}) == "0.25"
    assert noise_line({"likelihood": {"name": "Categorical"}}) == ""


def test_laplace_torch_has_no_such_noise_and_the_posterior_does():
    result = fit(n_epochs=60)
    with pytest.raises(ConfigError, match=r"Posterior\.of"):
        result.to_laplace([data()])
    state = accumulate_alone(result.model, [data()], result.likelihood)
    posterior = Posterior.of(state, result.prior, result.likelihood)
    _, covariance = posterior.functional_variance(result.model, data()[0][:7])
    spread = covariance.diagonal(dim1=1, dim2=2).mean(0)
    assert spread[0] < spread[1] < spread[2]


# --- checkpoints


def stop_at(epoch):
    def callback(event):
        if event.kind == "epoch" and event.data["epoch"] == epoch:
            raise RuntimeError("stop")

    return callback


@pytest.mark.parametrize("solver", ["mackay", "adam"])
def test_a_resumed_run_ends_in_the_same_state(solver, tmp_path):
    options = {"n_epochs": 30, "marglik_frequency": 5, "n_epochs_burnin": 5, "hyper_solver": solver}
    straight_model, model = network(), network()
    straight = fit(straight_model, **options)
    checkpoints = Checkpoints(tmp_path, max_overhead=float("inf"))
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, **options, checkpoint_dir=checkpoints, callbacks=[stop_at(17)])
    resumed = fit(model, **options, checkpoint_dir=checkpoints)
    assert resumed.log_marginal_likelihood == straight.log_marginal_likelihood
    assert torch.equal(resumed.likelihood.sigma_noise, straight.likelihood.sigma_noise)
    for name, tensor in straight_model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(CheckpointMismatch, match="noise"):
        fit(network(), **options, likelihood="regression", checkpoint_dir=checkpoints)


# --- ranks


FLAVOURS = [
    KfacOptions(),
    KfacOptions("mc", 2, seed=3),
    KfacOptions(curvature="ekfac"),
    KfacOptions(curvature="diag"),
    KfacOptions(curvature="full"),
]


def rank_problem():
    torch.manual_seed(3)
    model = net(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return model, data_for(model, Gaussian(), 11, 1, 3, 3)


def own():
    return Gaussian([0.3, 1.0, 2.0], noise="per-output")


def values_on_rank(rank, edges):
    model, (x, y) = rank_problem()
    bounds = [0, *edges, len(x)]
    part = slice(bounds[rank], bounds[rank + 1])
    batches = [(x[part], y[part])] if len(x[part]) else []
    values = []
    for options in FLAVOURS:
        state = accumulate(model, batches, own(), options)
        prior = GaussianPrior(model, prior_precision=0.3)
        values.append(float(log_marginal_likelihood(state, prior, own())))
    return values


@pytest.mark.parametrize("edges", [(4,), (0,), (11,)], ids=["uneven", "first-empty", "last-empty"])
def test_ranks_have_the_evidence_of_all_data(edges):
    answers = on_ranks(2, values_on_rank, edges)
    model, batch = rank_problem()
    prior = GaussianPrior(model, prior_precision=0.3)
    alone = []
    for o in FLAVOURS:
        state = accumulate_alone(
            model, [batch], own(), curvature=o.curvature, hessian_root=o.hessian_root,
            mc_samples=o.mc_samples, seed=o.seed,
        )  # fmt: skip
        alone.append(float(log_marginal_likelihood(state, prior, own())))
    for values in answers:
        assert not isinstance(values, Exception), values
        assert values == pytest.approx(alone, rel=1e-11)
    assert answers[0] == answers[1]


def train_on_rank(rank):
    x, y = data(n=60)
    result = fit(network(), [(x[rank::2], y[rank::2])], n_epochs=30, marglik_frequency=5)
    return result.log_marginal_likelihood, result.likelihood.sigma_noise.tolist()


def test_ranks_learn_the_same_noises():
    first, second = on_ranks(2, train_on_rank)
    assert not isinstance(first, Exception), first
    assert first == second
    assert len(first[1]) == 3
    assert first[1][0] < first[1][2]


# --- targets that do not fit


def test_targets_that_do_not_fit_are_refused_before_the_first_step():
    x, y = data(n=20)
    for targets, message in [
        (y[:, 0], r"shape \(20,\), the model returns \(20, 3\).*unsqueeze"),
        (y[:, :2], r"\(20, 2\)"),
        (torch.full_like(y, float("nan")), "is nan"),
        (y.to(torch.complex128), "complex"),
    ]:
        model = network()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for likelihood in ("regression", "regression-per-output"):
            with pytest.raises(DataError, match=message):
                fit(model, [(x, targets)], likelihood=likelihood)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_integer_targets_are_numbers(dtype):
    x, y = data(n=20)
    counts = (y > 0).to(dtype)
    values = [
        fit(batches=[(x, targets)], n_epochs=20).log_marginal_likelihood
        for targets in (counts, counts.double())
    ]
    assert values[0] == values[1]
