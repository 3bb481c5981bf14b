"""Curvature on several ranks against one process that has all data."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit, network_gradient
from margeq.comm import TorchComm, current_comm, require_equal, together
from margeq.curvature import eigen, exact
from margeq.curvature.options import KfacOptions
from margeq.data import TensorLoader
from margeq.distributed import (
    accumulate,
    accumulate_in_order,
    decompose,
    mean_over_ranks,
    reduce_state,
    shard,
    shared_out,
)
from margeq.errors import (
    ConfigError,
    DataError,
    DistributedError,
    DistributedMismatchError,
    MissingRuleError,
    NonFiniteError,
)
from margeq.laplace import accumulate as accumulate_alone
from margeq.laplace import eigen_bases, log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import log_hyperprior, named_weights
from margeq.priors import GaussianPrior
from tests.dense_evidence import cnn
from tests.network_problems import conv, factored, network, problem
from tests.oracles import F64, MeanPool, data_for, net, relative_error
from tests.ranks import on_ranks
from tests.test_curvature_sums import assert_same_state, group_network, parts_of, sums

PRIME = 29


# --- what ranks say to each other


def exchanged(rank):
    comm = current_comm()
    assert isinstance(comm, TorchComm)
    own = [torch.full((2,), float(rank + 1)), torch.tensor(rank, dtype=torch.int64)]
    return (
        comm.rank, comm.size, comm.sum(own), comm.broadcast(own, 1), comm.gather({"é": [rank]}),
        comm.any(rank == 1), comm.any(False), own,
    )  # fmt: skip


def test_ranks_exchange_sums_copies_notes_and_flags():
    for rank, answer in enumerate(on_ranks(2, exchanged)):
        own_rank, size, total, copies, notes, some, none, own = answer
        assert (own_rank, size, some, none) == (rank, 2, True, False)
        assert [t.tolist() for t in total] == [[3.0, 3.0], 1]
        assert [t.tolist() for t in copies] == [[2.0, 2.0], 1]
        assert [t.tolist() for t in own] == [[rank + 1.0] * 2, rank]
        assert notes == [{"é": [0]}, {"é": [1]}]
        assert total[1].dtype == torch.int64


# --- all flavours, uneven and empty shares


def models():
    """Networks that every rank builds alike, with data and likelihood."""
    torch.manual_seed(5)
    convolutional = net(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, groups=1), MeanPool(), nn.Linear(2, 4)
    )
    yield convolutional, data_for(convolutional, Categorical(), PRIME, 2, 5, 5), Categorical()
    group = group_network()
    yield group, data_for(group, Gaussian(), PRIME, 1, 5, 5), Gaussian()


FLAVOURS = [
    KfacOptions(),
    KfacOptions(hessian_root="adaptive", captured_trace=0.7),
    KfacOptions(hessian_root="mc", mc_samples=2, seed=4, position_fraction=0.5),
    KfacOptions(curvature="ekfac"),
    KfacOptions(curvature="ekfac", hessian_root="adaptive", captured_trace=0.8),
    KfacOptions(curvature="diag"),
    KfacOptions(curvature="full"),
]


def share_of(batch, rank, edges):
    x, y = parts_of(batch, *edges)[rank]
    return list(zip(x.split(4), y.split(4), strict=True)) if len(y) else []


def states_of_all_flavours(rank, edges):
    return [
        accumulate(
            model, share_of(batch, rank, edges), likelihood, options,
            bases=bases_of(model, batch, likelihood, options),
        )
        for model, batch, likelihood in models()
        for options in FLAVOURS
    ]  # fmt: skip


def bases_of(model, batch, likelihood, options):
    """Given bases where the factors have equal eigenvalues, whose eigenvectors are any."""
    if options.curvature != "ekfac" or isinstance(likelihood, Categorical):
        return None
    return eigen_bases(accumulate_alone(model, [batch], likelihood))


# one rank has most data; the other ranks have one datum and none
@pytest.mark.parametrize("edges", [(11,), (0,), (1, 1)], ids=["uneven", "empty", "three"])
def test_every_flavour_is_that_of_one_process(edges):
    answers = on_ranks(len(edges) + 1, states_of_all_flavours, edges)
    alone = [
        accumulate_with(
            model, [batch], likelihood, options, bases=bases_of(model, batch, likelihood, options)
        )
        for model, batch, likelihood in models()
        for options in FLAVOURS
    ]
    for states in answers:
        assert not isinstance(states, Exception), states
        for state, expected, first in zip(states, alone, answers[0], strict=True):
            assert_same_state(state, expected)
            assert state.threshold == pytest.approx(expected.threshold, rel=1e-12)
            mine, theirs = sums(state), sums(first)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for model, _, likelihood in models():
        prior = GaussianPrior(model, prior_precision=0.3)
        number = 0 if isinstance(likelihood, Categorical) else len(FLAVOURS)
        values = [
            float(log_marginal_likelihood(states[number], prior, likelihood))
            for states in [alone, *answers]
        ]
        assert values[1:] == pytest.approx([values[0]] * len(answers), rel=1e-12)
        assert len(set(values[1:])) == 1
        assert number == 0 or any(k.symmetry for k in alone[number].kron.values())
        for state in answers:
            symmetries = [k.symmetry for k in state[number].kron.values()]
            assert symmetries == [k.symmetry for k in alone[number].kron.values()]


def without_gradient(rank):
    model, batch = small_problem()
    model[2].weight.detach().zero_()
    share = share_of(batch, rank, (0,))
    return [accumulate(model, share, options=options) for options in ("kfac", "diag", "full")]


def test_weights_without_gradient_have_sums_of_one_shape_on_all_ranks():
    model, batch = small_problem()
    model[2].weight.detach().zero_()
    for states in on_ranks(2, without_gradient):
        assert not isinstance(states, Exception), states
        for state, curvature in zip(states, ("kfac", "diag", "full"), strict=True):
            assert_same_state(state, accumulate_alone(model, [batch], curvature=curvature))


def dyadic_problem():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator) / 2

    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    return model, (draw(PRIME, 2, 3, 3), draw(PRIME, 2))


def dyadic_states(rank, edges):
    model, batch = dyadic_problem()
    share = share_of(batch, rank, edges)
    return [accumulate(model, share, "regression", options) for options in ("kfac", "diag", "full")]


def turned_bases(rank):
    """Each rank finds eigenvectors of its own, as other processors would."""
    model, batch, likelihood = next(iter(models()))
    find = eigen.psd_eigh

    def turned(matrices, name, resolution):
        values, vectors, clamped = find(matrices, name, resolution)
        return values, vectors.flip(-1) if rank else vectors, clamped

    eigen.psd_eigh = turned
    options = KfacOptions(curvature="ekfac")
    return accumulate(model, share_of(batch, rank, (11,)), likelihood, options)


def test_all_ranks_take_the_bases_of_the_first_one():
    model, batch, likelihood = next(iter(models()))
    expected = accumulate_alone(model, [batch], likelihood, curvature="ekfac")
    for state in on_ranks(2, turned_bases):
        assert_same_state(state, expected)


# P1: all sums are exact, so that any mistake at all shows
@pytest.mark.parametrize("edges", [(13,), (5, 9), (3, 3, 20)])
def test_dyadic_networks_are_equal_to_the_last_bit(edges):
    model, batch = dyadic_problem()
    for states in on_ranks(len(edges) + 1, dyadic_states, edges):
        for state, options in zip(states, ("kfac", "diag", "full"), strict=True):
            alone = sums(accumulate_alone(model, [batch], "regression", curvature=options))
            found = sums(state)
            assert all(torch.equal(found[key], alone[key]) for key in alone)


# --- gradients in hyperparameters inside the network


def hyper_problem():
    torch.manual_seed(2)
    first = conv(lengthscale_spread=0.5)  # with a penalty, which counts once
    first.basis.log_lengthscale.detach().add_(0.3)
    model = network(first, nn.Tanh(), factored(6, learn_anchors=True), nn.Tanh())
    assert log_hyperprior(model) != 0
    return problem(model, 11, 2, 6, 6)


def hyper_gradient(rank, edges):
    p = hyper_problem()
    p.batches = share_of((p.x, p.y), rank, edges)
    state = accumulate(p.model, p.batches, p.likelihood)
    found = network_gradient(
        p.model, p.batches, state, p.prior, p.likelihood, p.hyper, p.options, comm=current_comm()
    )
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("edges", [(4,), (11,)], ids=["uneven", "empty"])
def test_hyperparameter_gradients_are_those_of_one_process(edges):
    expected = hyper_problem().gradient()
    scale = max(float(value.abs().max()) for value in expected.values())
    answers = on_ranks(2, hyper_gradient, edges)
    for found in answers:
        assert not isinstance(found, Exception), found
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-12 * scale, name
            assert torch.equal(found[name], answers[0][name])


def sampled_gradients(rank, edges):
    p = hyper_problem()
    x, y = parts_of((p.x, p.y), *edges)[rank]
    p.batches = list(zip(x.split(2), y.split(2), strict=True)) if len(y) else []
    state = accumulate(p.model, p.batches, p.likelihood)
    return [
        network_gradient(
            p.model, p.batches, state, p.prior, p.likelihood, p.hyper, p.options,
            revisit=Revisit(share=0.5, seed=seed), comm=current_comm(),
        )
        for seed in range(2)
    ]  # fmt: skip


# four batches and one, and six and none: ranks leave out every second batch, if they have two
@pytest.mark.parametrize("edges", [(9,), (11,)])
def test_gradients_from_a_share_of_the_batches_are_right_on_average(edges):
    expected = hyper_problem().gradient()
    scale = max(float(value.abs().max()) for value in expected.values())
    for one, other in on_ranks(2, sampled_gradients, edges):
        assert any((one[name] - other[name]).abs().max() > 1e-3 * scale for name in one)
        for name, value in expected.items():
            assert (0.5 * (one[name] + other[name]) - value).abs().max() <= 1e-12 * scale


# --- one failure, all fail


def small_problem():
    torch.manual_seed(1)
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, data_for(model, Categorical(), 8, 3)


class Broken:
    def __iter__(self):
        raise ZeroDivisionError("no disk")


def fail(rank, kind):
    model, (x, y) = small_problem()
    options = KfacOptions(hessian_root="adaptive" if kind == "adaptive" else "exact")
    batches, bases = [(x, y)], None
    if kind == "bases":
        options, bases = KfacOptions(curvature="ekfac"), {}
    if kind == "output":
        model[0].weight.detach().mul_(100.0)
        model[1] = nn.Identity()
    if rank == 1:
        if kind in ("input", "adaptive"):
            x[0, 1] = torch.nan
        elif kind == "output":
            x.fill_(1e308)
        elif kind == "target":
            y[0] = 7
        elif kind == "other":
            batches = Broken()
        elif kind == "weights":
            with torch.no_grad():
                model[2].bias.add_(1e-6)
        elif kind == "bases":
            bases = {"2.weight": (torch.eye(3)[None], torch.eye(4)[None])}
        elif kind == "options":
            options = KfacOptions(curvature="diag")
        elif kind == "late":
            batches = Late(batches)
    if kind == "none":
        batches = []
    found = accumulate(model, batches, options=options, bases=bases)
    return found.n_data


class Late:
    """Fails in the second pass of the adaptive root."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > 1:
            raise DataError("moved away")
        return iter(self.batches)


FAILURES = {
    "input": (DataError, r"feature \(1,\).*nan"),
    "adaptive": (DataError, r"feature \(1,\).*nan"),
    "target": (DataError, "7"),
    "output": (NonFiniteError, "not finite"),
}


# P8
@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_on_one_rank_is_the_same_error_on_all(kind):
    error, message = FAILURES[kind]
    start = time.monotonic()
    here, there = on_ranks(2, fail, kind)
    assert time.monotonic() - start < 30
    assert type(here) is type(there) is error
    assert re.search(message, str(there))
    assert str(here) == f"rank 1 failed: {there}"


def test_an_error_of_another_library_ends_all_ranks():
    here, there = on_ranks(2, fail, "other")
    assert type(there) is ZeroDivisionError
    assert type(here) is DistributedError
    assert str(here) == "rank 1 failed: ZeroDivisionError: no disk"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("weights", "'2.bias'"), ("options", "'options'"), ("bases", "'U_A of 2.weight'")],
)
def test_other_weights_or_options_on_one_rank_are_refused_on_all(kind, name):
    for found in on_ranks(2, fail, kind):
        assert type(found) is DistributedMismatchError
        assert str(found).startswith(f"{name} differs between ranks: on [1]")


def test_no_data_at_all_are_refused_on_all():
    for found in on_ranks(2, fail, "none"):
        assert type(found) is DataError
        assert "2 ranks yielded 0 samples" in str(found)


def die(rank):
    model, batch = small_problem()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return accumulate(model, [batch]).n_data


def hang(rank):
    if rank == 1:
        time.sleep(5.0)
        return None
    model, batch = small_problem()
    return accumulate(model, [batch]).n_data


# P9, without the launcher's restart
def test_a_killed_rank_ends_the_others_with_an_error():
    start = time.monotonic()
    here, there = on_ranks(2, die, seconds=8.0)
    assert time.monotonic() - start < 20
    assert there is None
    assert type(here) is DistributedError
    assert "timeout" in str(here)


def test_a_rank_that_does_not_answer_is_not_waited_for_longer_than_the_timeout():
    start = time.monotonic()
    here, _ = on_ranks(2, hang, seconds=2.0)
    assert time.monotonic() - start < 20
    assert type(here) is DistributedError


# --- states that were accumulated without the others


def reduce_own(rank, change):
    model, batch = small_problem()
    share = share_of(batch, rank, (3,))
    options = {"hessian_root": "adaptive", "captured_trace": 0.6} if change == "threshold" else {}
    if options and rank:
        share = [(10 * x, y) for x, y in share]
    if change == "flavour" and rank:
        options = {"kfac_approx": "reduce"}
    if change == "weights" and rank:
        with torch.no_grad():
            model[0].bias.add_(0.1)
    return reduce_state(accumulate_alone(model, share, **options), current_comm())


def test_own_states_are_reduced():
    model, batch = small_problem()
    expected = accumulate_alone(model, [batch])
    for found in on_ranks(2, reduce_own, ""):
        assert_same_state(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flavour", "flavour differs .*kfac_approx.*expand.*reduce"),
        ("weights", "square_norms differs .*0.bias"),
        ("threshold", "threshold differs .*margeq.distributed.accumulate"),
    ],
)
def test_own_states_of_other_passes_are_refused(change, message):
    for found in on_ranks(2, reduce_own, change):
        assert type(found) is DistributedMismatchError
        assert re.search(message, str(found))


# --- without other ranks


def test_one_process_needs_no_process_group():
    model, batch = small_problem()
    assert_same_state(accumulate(model, [batch]), accumulate_alone(model, [batch]), 0.0)
    with pytest.raises(DataError, match="0 samples"):
        accumulate(model, [])
    with pytest.raises(ZeroDivisionError, match="no disk"):
        accumulate(model, Broken())
    with pytest.raises(DistributedError, match="no process group"):
        TorchComm()
    with pytest.raises(ValueError, match="as it is"), together(current_comm()):
        raise ValueError("as it is")
    require_equal(current_comm(), {"anything": object()})


# --- wrapped models


def wrapped(rank):
    model, batch = small_problem()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    ddp = nn.parallel.DistributedDataParallel(model)
    share = share_of(batch, rank, (1,))  # uneven: a collective in the pass would hang or fail
    with watched_collectives() as calls:
        own = accumulate_alone(ddp, share) if share else None
        silent = len(calls)
    state = accumulate(ddp, share)
    prior = GaussianPrior(ddp)
    value = float(log_marginal_likelihood(state, prior, Categorical()))
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters())
    assert own is None or own.kron.keys() == plain.keys()
    return state, list(prior.groups), value, silent, len(calls), ddp.training


@contextmanager
def watched_collectives():
    calls, names = [], ("all_reduce", "broadcast", "all_gather")
    kept = {name: getattr(torch.distributed, name) for name in names}

    def watch(name):
        def call(*args, **kwargs):
            calls.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in names:
        setattr(torch.distributed, name, watch(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(torch.distributed, name, kept[name])


def test_wrapped_models_have_the_evidence_and_names_of_what_is_inside():
    model, batch = small_problem()
    expected = accumulate_alone(model, [batch])
    prior = GaussianPrior(model)
    for state, groups, value, silent, _, training in on_ranks(2, wrapped):
        assert_same_state(state, expected)
        assert groups == list(prior.groups) == list(expected.kron)
        assert value == pytest.approx(
            float(log_marginal_likelihood(expected, prior, Categorical())), rel=1e-12
        )
        assert silent == 0
        assert training


def test_data_parallel_models_are_read_without_their_wrapper():
    model, shape = cnn()
    batch = data_for(model, Categorical(), 6, *shape)
    parallel = nn.DataParallel(nn.DataParallel(model))
    assert list(named_weights(parallel)) == list(dict(model.named_parameters()))
    options = {"position_fraction": 0.5}  # which positions depends on the names of modules
    assert_same_state(
        accumulate_alone(parallel, [batch], **options),
        accumulate_alone(model, [batch], **options),
        0.0,
    )
    assert torch.equal(
        exact.ggn(parallel, [batch], Categorical()), exact.ggn(model, [batch], Categorical())
    )
    with pytest.raises(MissingRuleError, match=r"'1\.weight_ih_l0' of 1"):
        accumulate_alone(nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 4))), [batch])


def test_gradients_of_wrapped_models_are_those_of_what_is_inside():
    p = hyper_problem()
    p.options = KfacOptions(position_fraction=0.5)  # which ones depends on the names of modules
    expected = p.gradient()
    p.model = nn.DataParallel(p.model)
    found = p.gradient()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def buckets(rank):
    model, batch = small_problem()
    model.insert(1, nn.BatchNorm1d(4, affine=False).double())
    ddp = nn.parallel.DistributedDataParallel(model)
    # two batches on one rank and none on the other: DDP's broadcast of buffers would never end
    share = share_of(batch, rank, (8,))
    return accumulate(ddp, share, options=KfacOptions(hessian_root="adaptive")).n_data


def test_wrapped_models_do_not_synchronise_in_the_pass():
    assert on_ranks(2, buckets) == [8, 8]


# --- shares


class Squares(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((2,), float(i)), i * i


class Rank:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("n", [0, 1, 3, 10, PRIME])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_hold_each_datum_once_and_in_order(n, size):
    tensors = TensorLoader(torch.arange(float(n))[:, None], torch.arange(n), 4)
    seen, lengths = {"set": [], "tensors": []}, []
    for rank in range(size):
        share = shard(Squares(n), 4, comm=Rank(rank, size))
        found = [int(i) for x, _ in share for i in x[:, 0]]
        seen["set"] += found
        lengths.append(len(found))
        part = shard(tensors, comm=Rank(rank, size))
        seen["tensors"] += [int(i) for _, y in part for i in y]
        assert all(len(y) <= 4 for _, y in part)
    assert seen == {"set": list(range(n)), "tensors": list(range(n))}
    assert max(lengths) - min(lengths) <= 1


def test_what_cannot_be_shared_is_refused():
    x, y = torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)
    for loader in (
        TensorLoader(x, y, 2, shuffle=True),
        TensorLoader(x, y, 2, augment=lambda batch, _: batch),
    ):
        with pytest.raises(ConfigError, match="shuffles or augments"):
            shard(loader)
    with pytest.raises(ConfigError, match=r"a DataLoader has .* loader\.dataset"):
        shard(torch.utils.data.DataLoader(Squares(4)))
    with pytest.raises(ConfigError, match="no length or no indices"):
        shard(iter([]))
    with pytest.raises(ConfigError, match="'drop_last', 'sampler'"):
        shard(Squares(4), sampler=None, drop_last=True)
    with pytest.raises(ConfigError, match="batch_size=0"):
        shard(Squares(4), 0)


def distributed_loader(n, drop_last=False):
    data = torch.utils.data.TensorDataset(torch.randn(n, 3), torch.zeros(n, dtype=torch.long))
    sampler = torch.utils.data.DistributedSampler(data, 2, 0, drop_last=drop_last)
    return torch.utils.data.DataLoader(data, 4, sampler=sampler)


def test_samplers_that_repeat_or_drop_data_are_refused():
    model = nn.Linear(3, 2)
    for loader, made in [(distributed_loader(9), 10), (distributed_loader(9, True), 8)]:
        with pytest.raises(ConfigError, match=rf"{made} data of 9.*margeq\.distributed\.shard"):
            accumulate_alone(model, loader)
    assert accumulate_alone(model, distributed_loader(10)).n_data == 5


# --- eigenvalues, each on one rank


def spectra(rank):
    found = []
    for model, batch, likelihood in models():
        for curvature in ("kfac", "diag", "full"):
            state = accumulate_alone(model, [batch], likelihood, curvature=curvature)
            found.append(eigenvalues_of(decompose(state)))
    return found


def eigenvalues_of(spectrum):
    values = spectrum.eigenvalues
    return getattr(values, "logs", None) or {"factor": values.factor}


# P7
@pytest.mark.parametrize("size", [2, 3])
def test_shared_eigenvalues_are_those_of_one_process_to_the_last_bit(size):
    expected = spectra(0)
    for found in on_ranks(size, spectra):
        assert not isinstance(found, Exception), found
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def spoiled(rank):
    model, batch = small_problem()
    state = accumulate_alone(model, [batch])
    name = "0.weight"
    kron = replace(state.kron[name], grad_cov=torch.full((1, 4, 4), torch.nan, dtype=F64))
    blocks = {**state.curvature.blocks, name: kron}
    return decompose(replace(state, curvature=replace(state.curvature, blocks=blocks)))


def test_a_spoiled_factor_is_the_same_error_on_all_ranks():
    for found in on_ranks(2, spoiled):
        assert type(found) is NonFiniteError
        assert "'0.weight'" in str(found)


@given(st.lists(st.floats(0.1, 100.0), max_size=12), st.integers(1, 5))
def test_work_is_shared_out_almost_evenly(costs, size):
    owners = shared_out(costs, size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    lower = max([sum(costs) / size, *costs, 0.0])
    assert max(loads) <= (4 / 3) * lower * (1 + 1e-12) or len(costs) <= size  # Graham 1969
    assert sum(loads) == pytest.approx(sum(costs))


# --- sums that are equal for any number of ranks


def ordered_problem():
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    return model, TensorLoader(torch.randn(PRIME, 1, 5, 5), torch.randint(4, (PRIME,)), 8)


ORDERED = [
    KfacOptions(),
    KfacOptions(hessian_root="mc", seed=2, position_fraction=0.5),
    KfacOptions(curvature="ekfac"),
    KfacOptions(curvature="full"),
]


def ordered(rank, n=PRIME):
    model, loader = ordered_problem()
    return [
        accumulate_in_order(model, loader.part(0, n), options=options, chunk=3)
        for options in ORDERED
    ]


# P3: float32, where plain sums differ in their last bits
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_in_order_are_equal_for_any_number_of_ranks(size):
    expected = ordered(0)
    for states in on_ranks(size, ordered):
        assert not isinstance(states, Exception), states
        for found, state in zip(states, expected, strict=True):
            mine, theirs = sums(found), sums(state)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
            assert (found.n_data, found.checksum) == (PRIME, state.checksum)
            assert eigenvalues_equal(found, state)


def eigenvalues_equal(one, other):
    pairs = zip(
        eigenvalues_of(decompose(one)).values(),
        eigenvalues_of(decompose(other)).values(),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def test_more_ranks_than_chunks():
    expected = ordered(0, 4)
    for states in on_ranks(3, ordered, 4):
        for found, state in zip(states, expected, strict=True):
            mine, theirs = sums(found), sums(state)
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_sums_in_order_are_those_of_a_plain_pass():
    model, loader = ordered_problem()
    model.double()
    loader = TensorLoader(loader.dataset.tensors[0].double(), loader.dataset.tensors[1], 8)
    for options in ORDERED:
        found = accumulate_in_order(model, loader, options=options, chunk=4)
        assert_same_state(found, accumulate_with(model, loader, Categorical(), options))


def test_order_needs_chunks_data_and_a_root_without_threshold():
    model, loader = ordered_problem()
    with pytest.raises(ConfigError, match="adaptive"):
        accumulate_in_order(model, loader, options=KfacOptions(hessian_root="adaptive"))
    with pytest.raises(ConfigError, match="chunk=0"):
        accumulate_in_order(model, loader, chunk=0)
    with pytest.raises(DataError, match="empty"):
        accumulate_in_order(model, loader.part(0, 0))


def one_step(rank, edges):
    model, batch = small_problem()
    x, y = parts_of(batch, *edges)[rank]
    ddp = nn.parallel.DistributedDataParallel(model)
    total = nn.functional.cross_entropy(ddp(x), y, reduction="sum")
    penalty = sum(p.square().sum() for p in model.parameters())
    (mean_over_ranks(total, len(y)) + penalty).backward()
    return [p.grad for p in model.parameters()]


# P5
@pytest.mark.parametrize("edges", [(5,), (7,)])
def test_a_training_step_on_uneven_batches_is_that_of_one_process(edges):
    model, (x, y) = small_problem()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss + sum(p.square().sum() for p in model.parameters())).backward()
    for grads in on_ranks(2, one_step, edges):
        for found, parameter in zip(grads, model.parameters(), strict=True):
            assert relative_error(found, parameter.grad) <= 1e-14
