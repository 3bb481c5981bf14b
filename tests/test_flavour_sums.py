"""Sums of the EKFAC, diagonal and full curvature over the data, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import margeq
from margeq.accumulation import InputCovCache, accumulate_with
from margeq.curvature import exact, full, per_datum
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, NonFiniteError
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    eigen_bases,
    evidence,
    hyper_gradient,
    log_marginal_likelihood,
)
from margeq.layers import ResidualPathways, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.priors import GaussianPrior
from tests.dense_evidence import cnn, dense_evidence, mlp, ours, problem, random_prior
from tests.oracles import F64, data_for, net, relative_error

EXACT = 1e-10
BLOCKS = ("ekfac", "diag")
NEW_FLAVOURS = pytest.mark.parametrize("curvature", ["ekfac", "diag", "full"])


# --- sums over the data


def numbers(state):
    """All sums of a state, as one vector."""
    if hasattr(state.curvature, "matrix"):
        return state.curvature.matrix.flatten()
    return torch.cat([block.moments.flatten() for block in state.curvature.blocks.values()])


@NEW_FLAVOURS
@pytest.mark.parametrize("root", ["exact", "adaptive", "mc"])
def test_batch_splits_and_order_make_no_difference(curvature, root):
    model, shape = cnn("circular")
    x, y = data_for(model, Categorical(), 12, *shape)
    options = {"curvature": curvature, "hessian_root": root}
    if curvature == "ekfac":
        options["bases"] = eigen_bases(accumulate(model, [(x, y)]))
    whole = numbers(accumulate(model, [(x, y)], **options))
    order = torch.randperm(12)
    split = [(x[part], y[part]) for part in order.split([5, 1, 6])]
    assert relative_error(numbers(accumulate(model, split, **options)), whole) <= 1e-12


@NEW_FLAVOURS
def test_states_of_disjoint_data_add_up(curvature):
    model, shape = cnn()
    x, y = data_for(model, Categorical(), 12, *shape)
    bases = eigen_bases(accumulate(model, [(x, y)])) if curvature == "ekfac" else None
    whole, first, second = (
        accumulate(model, [(x[part], y[part])], curvature=curvature, bases=bases).curvature
        for part in (slice(None), slice(5), slice(5, None))
    )
    if curvature == "full":
        assert relative_error((first + second).matrix, whole.matrix) <= 1e-12
        return
    for name, block in whole.blocks.items():
        both = first.blocks[name] + second.blocks[name]
        assert relative_error(both.to_dense(), block.to_dense()) <= 1e-12


@pytest.mark.parametrize("numbers_at_once", [1, 300])
@pytest.mark.parametrize("curvature", BLOCKS)
def test_chunks_of_data_change_nothing(curvature, numbers_at_once, monkeypatch):
    model, shape = cnn()
    batch = data_for(model, Categorical(), 7, *shape)
    whole = numbers(accumulate(model, [batch], curvature=curvature))
    monkeypatch.setattr(per_datum, "_CHUNK_NUMBERS", numbers_at_once)
    assert relative_error(numbers(accumulate(model, [batch], curvature=curvature)), whole) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NEW_FLAVOURS
def test_lower_precision_stays_close_and_sums_in_double(curvature, dtype):
    model, shape = cnn()
    x, y = data_for(model, Categorical(), 12, *shape)
    bases = eigen_bases(accumulate(model, [(x, y)])) if curvature == "ekfac" else None
    double = numbers(accumulate(model, [(x, y)], curvature=curvature, bases=bases))
    model.to(dtype)
    found = numbers(accumulate(model, [(x.to(dtype), y)], curvature=curvature, bases=bases))
    assert found.dtype == F64
    assert relative_error(found, double) <= (1e-5 if dtype is torch.float32 else 0.1)


def test_own_bases_of_single_precision_give_the_same_evidence():
    model, shape = cnn()
    x, y = data_for(model, Categorical(), 12, *shape)
    prior = GaussianPrior(model)
    double = ours(model, (x, y), Categorical(), prior, curvature="ekfac")
    single = ours(model.float(), (x.float(), y), Categorical(), prior, curvature="ekfac")
    assert single == pytest.approx(double, rel=1e-5)


class Detour(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@NEW_FLAVOURS
def test_weights_out_of_use_have_no_curvature(curvature):
    model = Detour().double()
    likelihood, prior = Categorical(), GaussianPrior(model)
    batch = data_for(model, likelihood, 6, 4)
    state = accumulate(model, [batch], curvature=curvature)
    gammas = effective_parameters(decompose(state), prior, likelihood)
    assert float(gammas["unused.weight"]) == float(gammas["unused.bias"]) == 0.0
    assert float(gammas["used.weight"]) > 0.0
    whole = dense_evidence(model, batch, likelihood, prior)
    assert float(log_marginal_likelihood(state, prior, likelihood)) <= whole + EXACT * abs(whole)


def test_one_parameter_in_two_modules_has_one_gradient_per_datum():
    model = net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    batch = data_for(model, Categorical(), 6, 4)
    dense = exact.ggn(model, [batch], Categorical())
    whole = accumulate(model, [batch], curvature="full").curvature
    assert relative_error(whole.matrix, dense) <= EXACT
    moments = numbers(accumulate(model, [batch], curvature="diag"))
    assert relative_error(moments, dense.diagonal()) <= EXACT


def sparse_net():
    """A network whose basis has a hyperparameter, which is no weight."""
    sparse = SparseConv2d(2, 3, 3, padding=1)
    return net(sparse, nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)), (2, 4, 4)


def test_hyperparameters_in_the_network_are_no_weights():
    model, shape = sparse_net()
    batch = data_for(model, Categorical(), 6, *shape)
    dense = exact.ggn(model, [batch], Categorical())
    state = accumulate(model, [batch], curvature="full")
    assert relative_error(state.curvature.matrix, dense) <= EXACT
    assert not state.curvature.matrix.requires_grad
    moments = accumulate(model, [batch], curvature="ekfac").curvature.blocks
    assert sum(float(b.moments.sum()) for b in moments.values()) == pytest.approx(
        float(dense.trace()), rel=EXACT
    )
    assert not any(block.moments.requires_grad for block in moments.values())


@NEW_FLAVOURS
def test_training_hyperparameters_in_the_network_needs_kfac(curvature):
    model, shape = sparse_net()
    batch, events = data_for(model, Categorical(), 6, *shape), []
    with pytest.raises(ConfigError, match=f"curvature='{curvature}' cannot move .*lengthscale"):
        margeq.optimize_marglik(model, [batch], curvature=curvature, callbacks=[events.append])
    assert not events


@NEW_FLAVOURS
def test_no_curvature_at_all_is_fine(curvature):
    model, likelihood = net(nn.Linear(3, 1, bias=False)), Gaussian()
    batch = (torch.zeros(5, 3, dtype=F64), torch.zeros(5, 1, dtype=F64))
    spectrum = decompose(accumulate(model, [batch], likelihood, curvature=curvature))
    value, grads = hyper_gradient(spectrum, GaussianPrior(model), likelihood)
    assert math.isfinite(value)
    assert all(math.isfinite(float(grad)) for grad in grads.values())
    assert float(evidence(spectrum, GaussianPrior(model), likelihood).log_determinant) == 0.0


@NEW_FLAVOURS
def test_some_weights_only(curvature):
    model, shape = mlp()
    batch = data_for(model, Categorical(), 6, *shape)
    state = accumulate(model, [batch], curvature=curvature, parameters=["2"])
    assert list(decompose(state).square_norms) == ["2.weight", "2.bias"]
    prior = GaussianPrior(model, parameters=["2"])
    assert math.isfinite(float(log_marginal_likelihood(state, prior, Categorical())))


# --- errors


def test_a_dense_matrix_of_many_weights_is_refused(monkeypatch):
    model, batch = problem(0, Categorical())
    monkeypatch.setattr(full, "LARGEST_FULL", 10)
    with pytest.raises(ConfigError, match=r"more than 10; use curvature='ekfac'.*parameters="):
        accumulate(model, [batch], curvature="full")
    events = []
    with pytest.raises(ConfigError, match="more than 10"):
        margeq.optimize_marglik(model, [batch], curvature="full", callbacks=[events.append])
    assert not events  # before the first step


@pytest.mark.parametrize("curvature", ["diag", "full"])
@pytest.mark.parametrize(
    "options", [{"kfac_approx": "reduce"}, {"bias_approx": "expand"}, {"position_fraction": 0.5}]
)
def test_options_without_effect_are_refused(curvature, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        KfacOptions(curvature=curvature, **options)


def test_unknown_curvature_is_refused():
    with pytest.raises(ConfigError, match=r"curvature='hessian': use one of .*'full'"):
        KfacOptions(curvature="hessian")


def _unknown(bases):
    bases["3.weight"] = bases["0.weight"]


def _skew(bases):
    bases["0.weight"] = (bases["0.weight"][0], bases["0.weight"][1] + 1e-3)


def _swapped(bases):
    bases["0.weight"] = bases["0.weight"][::-1]


def _flat(bases):
    bases["0.weight"] = (bases["0.weight"][0][0], bases["0.weight"][1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unknown, r"no weight is called \['3.weight'\]"),
        (_skew, "'0.weight' is not orthogonal"),
        (_swapped, "'0.weight' has 1 blocks of size 7, its weight has 1 of size 5"),
        (_flat, r"'0.weight' has shape \(7, 7\); expected"),
    ],
)
def test_wrong_bases_are_refused(spoil, message):
    model, shape = mlp()
    batch = data_for(model, Categorical(), 6, *shape)
    bases = eigen_bases(accumulate(model, [batch]))
    spoil(bases)
    with pytest.raises(ConfigError, match=message):
        accumulate(model, [batch], curvature="ekfac", bases=bases)


def test_bases_without_a_weight_serve_when_it_comes_into_use():
    paths = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
    model = net(ResidualPathways(paths), nn.Tanh(), nn.Linear(3, 3))
    batch, likelihood = data_for(model, Categorical(), 6, 4), Categorical()
    model[0].switch_off("b")
    bases = eigen_bases(accumulate(model, [batch]))
    assert "0.paths.a.weight" in bases
    assert "0.paths.b.weight" not in bases
    model[0].switch_on("b")
    prior = GaussianPrior(model)
    found = ours(model, batch, likelihood, prior, curvature="ekfac", bases=bases)
    assert found <= dense_evidence(model, batch, likelihood, prior)


class Jitter:
    """Other data in each pass, as with random augmentation."""

    def __init__(self, batch):
        self.batch, self.passes = batch, 0

    def __iter__(self):
        self.passes += 1
        yield self.batch[0] + 0.01 * self.passes, self.batch[1]


def test_data_that_change_between_the_passes_cost_no_third_one():
    model, shape = mlp()
    loader = Jitter(data_for(model, Categorical(), 6, *shape))
    options, cache = KfacOptions(curvature="ekfac"), InputCovCache()
    accumulate_with(model, loader, Categorical(), options, cache=cache)
    assert loader.passes == 2


def test_bases_belong_to_ekfac():
    model, batch = problem(0, Categorical())
    with pytest.raises(ConfigError, match="bases belong to curvature='ekfac', not to 'diag'"):
        accumulate(model, [batch], curvature="diag", bases={})


@NEW_FLAVOURS
def test_other_flavours_have_no_kronecker_factors(curvature):
    model, batch = problem(0, Categorical())
    state = accumulate(model, [batch], curvature=curvature)
    with pytest.raises(ConfigError, match=f"curvature='{curvature}' has no Kronecker factors"):
        _ = state.kron


@pytest.mark.parametrize("curvature", ["diag", "full"])
def test_curvature_that_overflows_is_an_error(curvature):
    model, likelihood = net(nn.Linear(3, 1)), Gaussian()
    batch = (torch.full((5, 3), 1e200, dtype=F64), torch.zeros(5, 1, dtype=F64))
    with pytest.raises(NonFiniteError):
        decompose(accumulate(model, [batch], likelihood, curvature=curvature))


def test_stale_bases_still_give_a_bound():
    likelihood = Categorical()
    model, shape = cnn()
    batch, prior = data_for(model, likelihood, 12, *shape), random_prior(model)
    bases = eigen_bases(accumulate(model, [batch], likelihood))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    stale, fresh, diag = (
        ours(model, batch, likelihood, prior, **options)
        for options in (
            {"curvature": "ekfac", "bases": bases}, {"curvature": "ekfac"}, {"curvature": "diag"}
        )
    )  # fmt: skip
    assert diag < stale < fresh < dense_evidence(model, batch, likelihood, prior)
