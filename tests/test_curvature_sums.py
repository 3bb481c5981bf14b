"""States of disjoint data add up to that of all data, whatever the split; others are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from margeq.accumulation import accumulate_with, empty_state
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, FlavourMismatchError
from margeq.groups import P4
from margeq.laplace import accumulate, decompose, eigen_bases, log_marginal_likelihood
from margeq.layers import GroupConv2d, GroupPool, LiftingConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.priors import GaussianPrior
from tests.dense_evidence import cnn
from tests.oracles import F64, MeanPool, data_for, net, relative_error
from tests.random_networks import random_network

CURVATURES = pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])


def sums(state):
    """Everything that is summed over data, by name."""
    curvature = state.curvature
    found = {"fit": state.fit, "n": torch.tensor(float(state.n_data))}
    if not hasattr(curvature, "blocks"):
        return {**found, "matrix": curvature.matrix}
    for name, block in curvature.blocks.items():
        found.update({f"{name}/{key}": value for key, value in block.tensors().items()})
    return found


def differences(found, expected):
    """Relative difference of each sum; zero sums have to agree exactly."""
    one, other = sums(found), sums(expected)
    assert one.keys() == other.keys()
    return {
        key: relative_error(one[key], other[key]) if other[key].any() else float(one[key].norm())
        for key in one
    }


def assert_same_state(found, expected, tolerance=1e-12):
    assert max(differences(found, expected).values()) <= tolerance
    assert (found.n_data, found.checksum) == (expected.n_data, expected.checksum)
    assert found.flavour == expected.flavour
    assert layouts(found) == layouts(expected)
    assert found.captured_trace == pytest.approx(expected.captured_trace, rel=1e-12)
    assert found.trace == pytest.approx(expected.trace, rel=1e-12)


def layouts(state):
    return {name: b.layout for name, b in getattr(state.curvature, "blocks", {}).items()}


def parts_of(batch, *ends):
    """The batch cut at the given places; parts may be empty."""
    x, y = batch
    edges = [0, *sorted(ends), len(y)]
    return [(x[a:b], y[a:b]) for a, b in pairwise(edges)]


def state_of(model, part, likelihood, options, bases=None):
    """As on a rank, whose share may be empty."""
    if len(part[1]):
        return accumulate_with(model, [part], likelihood, options, bases=bases)
    return empty_state(model, likelihood, options, bases=bases)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), first=st.integers(0, 9), second=st.integers(0, 9))
@CURVATURES
@pytest.mark.parametrize("root", ["exact", "mc"])
def test_any_parts_of_random_networks_add_up(curvature, root, seed, first, second):
    model, shape = random_network(seed)
    likelihood = Gaussian() if seed % 3 else Categorical()
    batch = data_for(model, likelihood, 9, *shape)
    options = KfacOptions(curvature=curvature, hessian_root=root, seed=seed)
    bases = eigen_bases(accumulate(model, [batch], likelihood)) if curvature == "ekfac" else None
    whole = accumulate_with(model, [batch], likelihood, options, bases=bases)
    states = [
        state_of(model, part, likelihood, options, bases) for part in parts_of(batch, first, second)
    ]
    assert_same_state(states[0] + states[1] + states[2], whole)
    assert_same_state(states[2] + (states[0] + states[1]), whole)


OPTIONS = {
    "reduce": KfacOptions(kfac_approx="reduce"),
    "bias": KfacOptions(bias_approx="expand"),
    "positions": KfacOptions(position_fraction=0.4, seed=3),
    "mc-3": KfacOptions(hessian_root="mc", mc_samples=3),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_factors_add_up(name):
    model, shape = cnn("circular")
    batch = data_for(model, Categorical(), 11, *shape)
    first, second = (
        accumulate_with(model, [p], Categorical(), OPTIONS[name]) for p in parts_of(batch, 4)
    )
    assert_same_state(first + second, accumulate_with(model, [batch], Categorical(), OPTIONS[name]))


def group_network():
    return net(
        LiftingConv2d(1, 2, 2, group=P4), nn.ReLU(), GroupConv2d(2, 3, 2, group=P4), GroupPool(P4),
        MeanPool(),
    )  # fmt: skip


def test_symmetric_factors_stay_symmetric():
    model = group_network()
    batch = data_for(model, Categorical(), 9, 1, 5, 5)
    whole = accumulate(model, [batch])
    empty = state_of(model, parts_of(batch, 0)[0], Categorical(), KfacOptions())
    first, second = (accumulate(model, [part]) for part in parts_of(batch, 4))
    both = empty + first + second
    assert_same_state(both, whole)
    symmetries = {name: kron.symmetry for name, kron in whole.kron.items()}
    assert any(symmetry is not None for symmetry in symmetries.values())
    assert symmetries == {name: kron.symmetry for name, kron in both.kron.items()}
    prior = GaussianPrior(model)
    values = [float(log_marginal_likelihood(s, prior, Categorical())) for s in (both, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_symmetry_of_one_part_alone_is_lost():
    kron = next(k for k in group_state().kron.values() if k.symmetry is not None)
    assert (kron + replace(kron, symmetry=None)).symmetry is None
    assert (kron + kron).symmetry == kron.symmetry


def group_state():
    model = group_network()
    return accumulate(model, [data_for(model, Categorical(), 5, 1, 5, 5)])


def dyadic(*shape):
    """Few halves: sums of their products are exact."""
    return torch.randint(-1, 2, shape) / 2


@CURVATURES
def test_dyadic_networks_add_up_to_the_last_bit(curvature):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(dyadic(*parameter.shape))
    x, y = dyadic(13, 2, 3, 3), dyadic(13, 2)
    bases = None
    if curvature == "ekfac":  # signed permutations are orthogonal and dyadic
        krons = accumulate(model, [(x, y)], "regression").kron
        bases = {
            name: tuple(-torch.eye(c.shape[-1], dtype=F64).flip(0).expand_as(c) for c in covs)
            for name, kron in krons.items()
            for covs in [(kron.grad_cov, kron.input_cov)]
        }
    whole, *states = (
        accumulate(model, [part], "regression", curvature=curvature, bases=bases)
        for part in [(x, y), *parts_of((x, y), 1, 6)]
    )
    found, expected = sums(states[2] + states[0] + states[1]), sums(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Sometimes(nn.Module):
    """The second layer works only on batches with a positive first entry."""

    def __init__(self):
        super().__init__()
        self.always, self.now_and_then = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        y = self.always(x)
        return self.now_and_then(y.tanh()) if x.flatten()[0] > 0 else y


@CURVATURES
def test_a_layer_that_only_one_part_uses_keeps_its_curvature(curvature):
    model = Sometimes().double()
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(2, (8,))
    x[0, 0], x[4, 0] = 1.0, -1.0
    bases = {} if curvature == "ekfac" else None
    first, second = (
        accumulate(model, [part], curvature=curvature, bases=bases) for part in parts_of((x, y), 4)
    )
    whole = accumulate(model, parts_of((x, y), 4), curvature=curvature, bases=bases)  # two batches
    for both in (first + second, second + first):
        assert_same_state(both, whole)


# --- adaptive roots


def test_data_that_keep_no_column_bring_their_inputs_all_the_same():
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = data_for(model, Categorical(), 6, 3)
    options = KfacOptions(hessian_root="adaptive", captured_trace=1.0)
    state = accumulate_with(model, [(x, y)], Categorical(), options)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # certain: the Hessian is zero
    state = accumulate_with(model, [(x, y)], Categorical(), options)
    kron = state.kron["0.weight"]
    assert not kron.grad_cov.any()
    assert kron.grad_cov.shape == (1, 4, 4)
    assert relative_error(kron.input_cov[0], x.mT @ x) <= 1e-12
    assert float(kron.n_shared) == 6
    value = log_marginal_likelihood(state, GaussianPrior(model), Categorical())
    assert value.isfinite()


def test_parts_with_the_same_threshold_weigh_their_captured_shares():
    model, shape = cnn()
    batch = data_for(model, Categorical(), 8, *shape)
    state = accumulate(model, [batch], hessian_root="adaptive", captured_trace=0.8)
    other = replace(state, captured_trace=0.5, trace=3 * state.trace)
    both = state + other
    assert both.captured_trace == pytest.approx((state.captured_trace + 1.5) / 4)
    assert both.trace == pytest.approx(4 * state.trace)
    assert both.threshold == state.threshold > 0


def test_thresholds_of_their_own_are_refused():
    model, shape = cnn()
    first, second = (
        accumulate(model, [data_for(model, Categorical(), 8, *shape)], hessian_root="adaptive",
                   captured_trace=0.7)
        for _ in range(2)
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"thresholds .* margeq\.distributed\.accumulate"):
        first + replace(second, threshold=2 * second.threshold)


# --- what is refused


def two_states(**options):
    model, shape = cnn()
    batch = data_for(model, Categorical(), 6, *shape)
    return model, batch, accumulate(model, [batch], **options)


def test_other_flavours_are_refused():
    model, batch, state = two_states()
    with pytest.raises(FlavourMismatchError, match="hessian_root"):
        state + accumulate(model, [batch], hessian_root="mc")
    with pytest.raises(FlavourMismatchError, match="curvature"):
        state + accumulate(model, [batch], curvature="diag")
    with pytest.raises(ConfigError, match="kind is 'BlockCurvature' in one"):
        state.curvature + accumulate(model, [batch], curvature="full").curvature


def test_other_weights_are_refused():
    model, batch, state = two_states()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(ConfigError, match=r"squared norm of '0\.weight'"):
        state + accumulate(model, [batch])


def test_other_names_and_shapes_are_refused():
    _, _, state = two_states()
    blocks = dict(state.curvature.blocks)
    name = next(iter(blocks))
    kron = blocks[name]
    fewer = replace(state.curvature, blocks={n: b for n, b in blocks.items() if n != name})
    with pytest.raises(ConfigError, match="list of weights"):
        state.curvature + fewer
    small = replace(kron, grad_cov=kron.grad_cov[:, :1, :1])
    wrong = replace(state.curvature, blocks={**blocks, name: small})
    with pytest.raises(ConfigError, match=f"weight '{name}'.*shape of grad_cov"):
        state.curvature + wrong
    with pytest.raises(ConfigError, match="layout"):
        kron + replace(kron, layout="obi" if kron.layout == "boi" else "boi")
    with pytest.raises(ConfigError, match="number of weights"):
        kron + BlockKron(*(torch.zeros(2, 1, 1),) * 2, torch.zeros(()))


def test_other_bases_are_refused():
    model, batch, state = two_states(curvature="ekfac")
    with pytest.raises(ConfigError, match="bases differ"):
        state + accumulate(model, [batch], curvature="ekfac", bases={})


def test_the_shape_of_the_fit_has_to_agree():
    _, _, state = two_states()
    with pytest.raises(ConfigError, match="shape of fit"):
        state + replace(state, fit=torch.zeros(3, dtype=F64))


def test_evidence_of_the_sum_is_not_the_sum_of_evidences():
    model, batch, whole = two_states()
    parts = [accumulate(model, [part]) for part in parts_of(batch, 2)]
    prior, likelihood = GaussianPrior(model), Categorical()

    def value(state):
        return float(log_marginal_likelihood(decompose(state), prior, likelihood))

    assert value(parts[0] + parts[1]) == pytest.approx(value(whole), rel=1e-12)
    assert abs(value(parts[0]) + value(parts[1]) - value(whole)) > 0.1
