"""Training on several ranks against one process that has all data."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import margeq
from margeq.batches import Batch
from margeq.comm import NullComm, current_comm
from margeq.distributed import shard
from margeq.errors import (
    ConfigError,
    DataError,
    DistributedError,
    DistributedMismatchError,
    NonFiniteError,
    UnsupportedLayerError,
)
from margeq.layers import GroupSampler, MonteCarloLiftingConv2d, PlanarSubset, SamplePool
from margeq.training.reduced_step import OwnGradients, SharedGradients
from tests.oracles import F64, relative_error
from tests.rank_trainings import (
    GLOBAL_BATCH,
    N_DATA,
    call,
    numbers,
    ordered_share,
    paths_net,
    pictures,
    shuffled_share,
    smooth_net,
)
from tests.ranks import on_ranks
from tests.resume_cases import digest

# --- one step


def dyadic():
    """Weights, inputs and targets in quarters: all sums of a step are exact."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=generator) / 4

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    return model, draw(16, 3), draw(16, 2)


def dyadic_step(rank, edges):
    model, x, y = dyadic()
    share = [(x.tensor_split(edges)[rank], y.tensor_split(edges)[rank])]
    result = call(
        model, share, likelihood="regression", n_epochs=1, n_epochs_burnin=0, seed=0,
        optimizer_cls=SGD, optimizer_kwargs={"lr": 0.25}, hyper_solver="fixed",
        prior_prec_init=0.5, curvature="diag",
    )  # fmt: skip
    return [t.clone() for t in result.model.state_dict().values()], result.history.losses


@pytest.mark.parametrize("edges", [(5,), (3, 3), (1, 9, 12)], ids=["2", "3", "4"])
def test_a_dyadic_step_is_that_of_one_process_to_the_last_bit(edges):
    before = dyadic()[0].state_dict().values()
    weights, losses = dyadic_step(0, ())
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for found, found_losses in on_ranks(len(edges) + 1, dyadic_step, edges):
        assert all(map(torch.equal, found, weights))
        assert found_losses == pytest.approx(losses, rel=1e-6)  # has log(2 pi) in it


def two_layers():
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 1)).double()


def gradients(rank, edges, make=SharedGradients):
    """Those of each step, with a layer that no loss reaches, and of a part only some data reach."""
    model, unused = two_layers(), nn.Linear(2, 2).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(10, 3, generator=generator, dtype=F64)
    batches = [
        Batch(number, part, part[:, :1])
        for number, whole in enumerate((x[:7], x[7:9], x[9:]))
        if len(part := whole.tensor_split(edges)[rank])
    ]
    parameters = [*model.parameters(), *unused.parameters()]
    if make is OwnGradients:
        steps = OwnGradients(model, parameters)
    else:
        steps = make(model, parameters, current_comm(), flag=lambda: rank == 1)
    found = []
    for step in steps.steps(batches, lambda b: (model(b.inputs) - b.targets).square().mean(), ""):
        found.append((float(step.loss), step.n_data, step.is_flagged, [p.grad for p in parameters]))
    return found


# P5: uneven batches, and ranks without any
@pytest.mark.parametrize("edges", [(2,), (7,), (0, 6)], ids=["uneven", "empty", "three"])
def test_gradients_of_a_step_are_those_of_the_joined_batch(edges):
    expected = gradients(0, (), OwnGradients)
    assert [n for _, n, _, _ in expected] == [7, 2, 1]
    answers = on_ranks(len(edges) + 1, gradients, edges)
    for found in answers:
        assert not isinstance(found, Exception), found
        for mine, first, one in zip(found, answers[0], expected, strict=True):
            assert mine[0] == pytest.approx(one[0], rel=1e-14)
            assert mine[1:3] == (one[1], True)
            assert [g is None for g in mine[3]] == [g is None for g in one[3]]
            for a, b, c in zip(mine[3], first[3], one[3], strict=True):
                if c is not None:
                    assert relative_error(a, c) <= 1e-14
                    assert torch.equal(a, b)
        assert found[0][3][-1] is None


def rare_part(rank):
    """Rank 1 has no batch in the second step, where the gradient of the first is still about."""
    model = nn.Linear(1, 1, bias=False).double()
    batches = [Batch(i, torch.ones(1, 1, dtype=F64), torch.zeros(1, 1)) for i in range(2 - rank)]
    steps = SharedGradients(model, list(model.parameters()), current_comm())
    return [
        (s.n_data, float(model.weight.grad))
        for s in steps.steps(batches, lambda b: model(b.inputs).sum(), "")
    ]


def test_gradients_of_the_step_before_are_not_added_again():
    for found in on_ranks(2, rare_part):
        assert found == [(2, 1.0), (1, 1.0)]


def half(rank):
    model = nn.Linear(1, 1, bias=False).bfloat16()
    batches = [Batch(0, torch.full((301, 1), 1.0 + rank).bfloat16(), torch.zeros(301, 1))]
    steps = SharedGradients(model, list(model.parameters()), current_comm())
    for step in steps.steps(batches, lambda b: model(b.inputs).float().mean(), ""):
        return step.n_data, model.weight.grad


def test_half_precision_is_summed_in_single():
    for n_data, grad in on_ranks(2, half):
        assert n_data == 602  # no number of half precision
        assert (float(grad), grad.dtype) == (pytest.approx(1.5, rel=0.01), torch.bfloat16)


# --- short trainings


def trainings(rank, size):
    """Some calls, all about the same data in the same batches."""
    edges = {1: (), 2: (7,), 3: (5, 5), 4: (0, 3, 3)}[size]
    network, share = smooth_net(), ordered_share(rank, edges)
    if size == 2:
        network = nn.parallel.DistributedDataParallel(network)
    short = {"n_epochs": 3, "n_epochs_burnin": 1, "marglik_frequency": 1}
    scheduler = {
        "scheduler_cls": LambdaLR, "scheduler_kwargs": {"lr_lambda": lambda n: 1 / (1 + 0.1 * n)}
    }  # fmt: skip
    calls = [
        lambda: call(network, shuffled_share(), network_gradient="exact", lr_hyp=0.05, **short),
        lambda: call(paths_net(), share, restarts=["symmetric", "free"], **short, **scheduler),
        lambda: call(paths_net(), share, restarts="auto", **short),
        lambda: call(
            paths_net(), share, marglik_loader=shuffled_share(5), curvature="ekfac",
            hyper_solver="adam", n_epochs=2, restarts=["symmetric"],
        ),
    ]  # fmt: skip
    found = [call() for call in (calls if size < 3 else calls[:2])]
    seconds = [[u.seconds for x in r.restarts for u in x.history.updates] for r in found]
    return [
        (numbers(r), digest(r), r.selected, r.n_data, taken)
        for r, taken in zip(found, seconds, strict=True)
    ]


@pytest.fixture(scope="module")
def alone():
    return trainings(0, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_training_is_that_of_one_process_and_the_same_on_all_ranks(size, alone):
    """float64; uneven shares and ranks without data; the first one wrapped."""
    answers = on_ranks(size, trainings, size)
    for results in answers:
        assert not isinstance(results, Exception), results
        for number, (found, expected) in enumerate(zip(results, alone, strict=False)):
            assert found[0].shape == expected[0].shape
            scale = expected[0].abs().clamp_min(1.0)
            assert float(((found[0] - expected[0]).abs() / scale).max()) <= 1e-10, number
            assert found[1] == answers[0][number][1]
            assert found[2:4] == expected[2:4] == (found[2], N_DATA)
            assert found[4] == answers[0][number][4]  # results are alike in all they say


def test_the_trainings_are_about_something(alone):
    assert alone[0][0].isfinite().all()
    losses = [call(smooth_net(), shuffled_share(), n_epochs=6).history.losses for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


# --- random numbers


class Draws(nn.Module):
    """Notes a random number of each training forward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(float(torch.rand(())))
        return x


def random_numbers(rank):
    torch.manual_seed(7)  # the same on all ranks
    draws, elements = Draws(), GroupSampler(PlanarSubset(True, False, width=0.7), 3)
    lift = MonteCarloLiftingConv2d(1, 2, 3, outputs=elements, padding=1, hidden=3)
    model = nn.Sequential(
        draws, lift, SamplePool(elements, "mean"), nn.Flatten(), nn.Linear(32, 2)
    ).double()
    # the second rank has no data in every second step
    edges = (6,) if current_comm().size > 1 else ()
    x, y = pictures(24)
    batches = [(x[:8], y[:8]), (x[8:12], y[8:12]), (x[12:], y[12:])]
    share = [tuple(t.tensor_split(edges)[rank] for t in batch) for batch in batches]
    share = [(px, py) for px, py in share if len(py)]
    draws.seen.clear()
    seeds, redraw = [], GroupSampler.redraw

    def noted(self, generator=None):
        redraw(self, generator)
        seeds.append(int(self._seed))

    GroupSampler.redraw = noted
    torch.manual_seed(rank)
    try:
        result = call(model, share, seed=None, n_epochs=2, restarts=["current"])
    finally:
        GroupSampler.redraw = redraw
    return draws.seen, seeds, result.history.losses, digest(result), float(torch.rand(()))


def test_ranks_draw_other_numbers_but_the_same_group_elements():
    here, there = on_ranks(2, random_numbers)
    assert not set(here[0][-6:]) & set(there[0][-4:])
    assert len(here[1]) > len(here[0][-6:]) >= 6
    assert here[1:4] == there[1:4]
    assert here[2:4] == there[2:4]  # with one seed, that of rank 0
    for rank, found in enumerate((here, there)):
        torch.manual_seed(rank)
        torch.randint(2**31, ())
        assert found[4] == float(torch.rand(()))  # the caller's stream is put back


# --- what is refused, and what fails


class Spoiled:
    """Batches whose input is NaN from the pass of a number on."""

    def __init__(self, batches, at):
        self.batches, self.at, self.passes = batches, at, 0

    def __iter__(self):
        self.passes += 1
        for x, y in self.batches:
            yield (x * torch.nan if self.passes >= self.at else x), y


class Diverging(nn.Module):
    """Gives outputs that are not finite on one rank, in a pass of training or of evidence."""

    def __init__(self, rank, training, at):
        super().__init__()
        self.rank, self.when, self.left = rank, training, at

    def forward(self, x):
        if current_comm().rank == self.rank and self.training == self.when:
            self.left -= 1
            return x * torch.inf if self.left < 0 else x
        return x


def flat(*modules):
    torch.manual_seed(0)
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(16, 2)).double()


def failing_calls(rank):
    """One call after the other in one process group: a failure leaves all ranks in step."""
    x, y = pictures(16)
    share = [(x.chunk(2)[rank], y.chunk(2)[rank])]
    only = [share, []][rank]
    other = flat()
    if rank == 1:
        with torch.no_grad():
            other[1].bias[0] += 1e-9
    frozen = nn.BatchNorm2d(1, dtype=F64).eval()
    calls = {
        "input": lambda: call(flat(), Spoiled(share, 1 if rank else 99)),
        "later": lambda: call(flat(), Spoiled(share, 4 if rank else 99)),
        "target": lambda: call(flat(), [(share[0][0], share[0][1] + 5 * rank)]),
        "batch": lambda: call(flat(nn.BatchNorm2d(1)), share),
        "sync": lambda: call(flat(nn.SyncBatchNorm(1)), share),
        "instance": lambda: call(flat(nn.InstanceNorm2d(1, track_running_stats=True)), share),
        "frozen": lambda: call(flat(frozen), share).n_data,
        "thawed": lambda: call(flat(nn.BatchNorm2d(1)).eval(), share),
        "weights": lambda: call(other, share),
        "seed": lambda: call(flat(), share, seed=rank),
        "epochs": lambda: call(flat(), share, n_epochs=6 + rank),
        "argument": lambda: call(flat(), share, lr_hyp=-float(rank) + 0.5),
        "padded": lambda: call(flat(), padded(rank), marglik_loader=share),
        "nothing": lambda: call(flat(), []),
        "callback": lambda: call(flat(), share, callbacks=[lambda event: 1 / 0]),
        "loader": lambda: call(flat(), only if rank == 0 else 3),
        "order": lambda: call(flat(), shuffled_share(rank)),
        "restart": lambda: {
            r.start: r.error
            for r in call(flat(Diverging(1, False, 10)), share, restarts=["current"] * 2).restarts
        },
        "diverged": lambda: call(flat(Diverging(1, False, 3)), share),
        "both": lambda: call(
            flat(), [(x.chunk(2)[0] * torch.nan, y[:8]), 3][rank] and Broken(rank)
        ),
        "after": lambda: call(flat(), share).n_data,
    }
    found = {}
    for name, function in calls.items():
        model_state = {k: v.clone() for k, v in other.state_dict().items()}
        try:
            found[name] = function()
        except Exception as error:
            found[name] = error
        assert all(torch.equal(v, model_state[k]) for k, v in other.state_dict().items())
    return found


def padded(rank):
    data = torch.utils.data.TensorDataset(*pictures(15))
    sampler = torch.utils.data.DistributedSampler(data, 2, rank)
    return torch.utils.data.DataLoader(data, 4, sampler=sampler)


class Broken:
    """A loader that fails otherwise on each rank."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        raise (ZeroDivisionError, DataError)[self.rank]("no disk")


REFUSED = {
    "input": (DataError, "input is nan"),
    "later": (DataError, "input is nan"),
    "target": (DataError, "model has 2 outputs"),
    "batch": (UnsupportedLayerError, r"0 \(BatchNorm2d\).*eval\(\).*GroupNorm"),
    "sync": (UnsupportedLayerError, "SyncBatchNorm"),
    "instance": (UnsupportedLayerError, "InstanceNorm2d.*running statistics"),
    "thawed": (UnsupportedLayerError, "BatchNorm2d"),
    "weights": (DistributedMismatchError, r"'1\.bias' differs between ranks: on \[1\]"),
    "seed": (DistributedMismatchError, "'seed' differs"),
    "epochs": (DistributedMismatchError, r"'schedule\.n_epochs' differs"),
    "argument": (ConfigError, "lr_hyp=-0.5"),
    "padded": (ConfigError, "16 data of 15"),
    "nothing": (DataError, "all 2 ranks yielded 0 samples"),
    "order": (DistributedMismatchError, "order of loader 0"),
    "diverged": (NonFiniteError, "not finite"),
}


def test_failures_are_the_same_on_all_ranks_and_leave_them_in_step():
    began = time.monotonic()
    answers = on_ranks(2, failing_calls)
    assert time.monotonic() - began < 30
    for found in answers:
        assert not isinstance(found, Exception), found
    for name, (error, message) in REFUSED.items():
        assert [type(found[name]) for found in answers] == [error, error], (name, answers)
        assert all(re.search(message, str(found[name])) for found in answers), (name, answers)
    here, there = answers
    assert [found["frozen"] for found in answers] == [16, 16]
    assert [found["after"] for found in answers] == [16, 16]
    assert type(here["callback"]) is ZeroDivisionError
    assert str(there["callback"]) == "rank 0 failed: ZeroDivisionError: division by zero"
    assert type(there["loader"]) is type(here["loader"]) is DataError
    assert here["restart"] == there["restart"]
    assert "not finite" in here["restart"]["current"]
    # errors of other types: that of the first rank counts
    assert type(here["both"]) is ZeroDivisionError
    assert type(there["both"]) is DistributedError


def drifting(rank):
    """A rank whose weights, or precisions, move on their own is found at the next update."""
    found = []
    for what in ("weight", "order"):
        model, loader = flat(), shuffled_share()

        def disturb(event, model=model, loader=loader, what=what):
            if event.kind == "epoch" and event.data["epoch"] == 3:
                if what == "weight":
                    with torch.no_grad():
                        model[1].weight[0, 0] += 1e-12
                else:
                    list(loader)  # on rank 0 only, where callbacks are

        try:
            found.append(call(model, loader, callbacks=[disturb]))
        except Exception as error:
            found.append(error)
    events = []
    call(flat(), shuffled_share(), callbacks=[lambda event: events.append(event.kind)])
    return found, len(events)


def test_ranks_that_drift_apart_are_found_and_callbacks_are_those_of_rank_0():
    (here, n_events), (there, n_none) = on_ranks(2, drifting)
    for found in (here, there):
        assert [type(error) for error in found] == [DistributedMismatchError] * 2
        assert "'1.weight'" in str(found[0])
        assert "order of loader 0" in str(found[1])
    assert n_events > 6
    assert n_none == 0


def die(rank, at):
    class Fatal(nn.Module):
        def forward(self, x):
            nonlocal at
            at -= self.training
            if rank == 1 and at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return x

    model = flat(Fatal())
    before = [p.detach().clone() for p in model.parameters()]
    try:
        call(model, shuffled_share())
    except DistributedError as error:
        same = all(map(torch.equal, before, model.parameters()))
        return type(error).__name__, str(error), same
    return None


# P9, without the launcher
def test_a_killed_rank_ends_the_training_of_the_others():
    began = time.monotonic()
    here, there = on_ranks(2, die, 20, seconds=8.0)
    assert time.monotonic() - began < 25
    assert there is None
    name, message, same = here
    assert name == "DistributedError"
    assert "lost the others" in message
    assert same  # the model is put back


# --- shuffled shares


class Rank(NullComm):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("n", [0, 1, 5, N_DATA])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["tensors", "set"])
def test_shuffled_shares_are_parts_of_the_batches_of_one_process(n, size, kind):
    x, y = torch.arange(float(n))[:, None], torch.arange(n)
    data = margeq.data.TensorLoader(x, y, GLOBAL_BATCH // size)
    if kind == "set":
        data = torch.utils.data.TensorDataset(x, y)
    options = {"num_workers": 0} if kind == "set" else {}
    whole = shard(data, GLOBAL_BATCH, shuffle=True, seed=4, comm=Rank(0, 1), **options)
    shares = [
        shard(data, GLOBAL_BATCH // size, shuffle=True, seed=4, comm=Rank(r, size), **options)
        for r in range(size)
    ]
    orders = []
    for _ in range(2):
        passes = [[labels.tolist() for _, labels in share] for share in shares]
        assert [len(p) for p in passes] == [len(share) for share in shares]
        expected = [labels.tolist() for _, labels in whole]
        for k, batch in enumerate(expected):
            assert batch == [label for p in passes if k < len(p) for label in p[k]]
        sizes = [sum(map(len, p)) for p in passes]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1
        orders.append([label for batch in expected for label in batch])
    assert n < 5 or orders[0] != orders[1]
    assert all(sorted(order) == list(range(n)) for order in orders)


def test_shuffled_shares_go_on_from_their_state():
    data = torch.utils.data.TensorDataset(torch.arange(9.0), torch.arange(9))
    first, other = (shard(data, 2, shuffle=True, seed=s, comm=Rank(1, 3)) for s in (0, 5))
    list(first)
    other.batch_sampler.load_state_dict(first.batch_sampler.state_dict())
    a, b = ([labels.tolist() for _, labels in share] for share in (first, other))
    assert a == b
    with pytest.raises(ConfigError, match="shuffles or augments"):
        shard(margeq.data.TensorLoader(torch.zeros(2, 1), torch.zeros(2), 1, True), shuffle=True)


def test_a_share_that_leaves_data_out_is_reported():
    here, there = on_ranks(2, unseen)
    assert here[0] == ""
    assert "2 of 8 samples unseen" in there[0]
    assert here[1:] == there[1:] == (29, 12)


def unseen(rank):
    """Rank 1 drops its last batch; before that nobody drops any."""
    x, y = pictures(6 + 8)
    own = torch.utils.data.TensorDataset(*(t.split([6, 8])[rank] for t in (x, y)))
    loader = torch.utils.data.DataLoader(own, 3, drop_last=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # its data set is that of all ranks, of which nothing is left out
        found = call(flat(), shuffled_share(), n_epochs=2).n_data
        result = call(flat(), loader, n_epochs=2)
    text = [str(w.message) for w in caught if w.category is margeq.errors.DataWarning]
    return "".join(text), found, result.n_data
