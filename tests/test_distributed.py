"""Curvature on several ranks against one process that has all data."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from torch import nn

from margeq.accumulation import accumulate_with
from margeq.adjoint import network_gradient
from margeq.comm import TorchComm, current_comm, require_equal, together
from margeq.curvature.options import KfacOptions
from margeq.distributed import accumulate, reduce_state
from margeq.errors import (
    DataError,
    DistributedError,
    DistributedMismatchError,
    NonFiniteError,
)
from margeq.laplace import accumulate as accumulate_alone
from margeq.laplace import eigen_bases, log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from margeq.priors import GaussianPrior
from tests.network_problems import conv, factored, network, problem
from tests.oracles import MeanPool, data_for, net
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
    model = network(conv(), nn.Tanh(), factored(6, learn_anchors=True), nn.Tanh())
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
    batches = [(x, y)]
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
        elif kind == "options":
            options = KfacOptions(curvature="diag")
        elif kind == "late":
            batches = Late(batches)
    if kind == "none":
        batches = []
    found = accumulate(model, batches, options=options)
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


@pytest.mark.parametrize(("kind", "name"), [("weights", "'2.bias'"), ("options", "'options'")])
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
