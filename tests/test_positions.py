"""A run that was killed between two steps of an epoch goes on with the very next step."""

from __future__ import annotations

import random
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import margeq
from margeq.batches import read_batches
from margeq.checkpoint import Checkpoints, CheckpointStore, CheckpointWriter, writer
from margeq.data import TensorLoader, random_shift_flip
from margeq.errors import ConfigError, DataError, DeterminismWarning
from margeq.training.bookmark import Bookmark
from margeq.training.interruption import Interruption
from margeq.training.randomness import Randomness
from margeq.training.run import Run
from margeq.training.saving import Saving
from tests.resume_cases import CASES, digest, pictures, train

ignores_convergence = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

SELDOM = 1e-9  # after the first checkpoint none is due by itself
ALWAYS = float("inf")


class Crash(BaseException):
    """Stands for the end of a process: nothing in the library may handle it."""


@contextmanager
def crash_after(step):
    """Save after the step of that number, counted from 1 over all restarts; crash after the next.

    Yields a list, with one entry per step.
    """
    steps = []

    def is_overdue(writer):
        steps.append(step)
        if len(steps) > step:
            raise Crash
        return len(steps) == step

    with patch.object(CheckpointWriter, "is_overdue", is_overdue):
        yield steps


def count_steps(call):
    with crash_after(10**9) as steps:
        call()
    return len(steps)


def position(directory):
    return CheckpointStore(directory).load_latest().state["position"]


# -- every part of the state ---------------------------------------------------------------------


def check_steps(case, tmp_path, choose):
    expected = digest(train(case))
    total = count_steps(lambda: train(case, tmp_path / "counted", overhead=SELDOM))
    for step in choose(total):
        directory = tmp_path / str(step)
        with pytest.raises(Crash), crash_after(step):
            train(case, directory, overhead=SELDOM)
        assert position(directory) is not None
        assert digest(train(case, directory, built=step, overhead=SELDOM)) == expected, step


@pytest.mark.parametrize("case", CASES)
def test_a_crash_between_two_steps_is_resumed_bit_for_bit(case, tmp_path):
    """One step of each case, in the later half: of ``paths`` in restart 2 or 3."""
    check_steps(case, tmp_path, lambda n: [random.Random(case).randrange(n // 2, n - 1)])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["noise", "groups", "augmented", "samples"])
def test_a_crash_after_every_single_step_is_resumed_bit_for_bit(case, tmp_path):
    check_steps(case, tmp_path, lambda n: range(1, n))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["paths", "lengthscales"])
def test_a_crash_after_many_steps_is_resumed_bit_for_bit(case, tmp_path):
    """Every eleventh step: at all places of epochs, which have two or three."""
    check_steps(case, tmp_path, lambda n: range(1, n, 11))


def test_a_run_that_crashes_after_every_few_steps_ends_alike(tmp_path):
    """The position of a resumed epoch is noted like that of any other."""
    expected, crashes, result = digest(train("noise")), 0, None
    while result is None:
        try:
            with crash_after(2):
                result = train("noise", tmp_path, built=crashes, overhead=SELDOM)
        except Crash:
            crashes += 1
    assert crashes >= 10  # 24 steps, two more each time
    assert digest(result) == expected


# -- loaders -------------------------------------------------------------------------------------


class Noisy(TensorDataset):
    """Changes its pictures by all three global random states."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape) + 0.1 * (np.random.rand() + random.random()), y


def loader_of(**options):
    return DataLoader(Noisy(*pictures()), 8, **options)


def weighted():
    return WeightedRandomSampler(torch.arange(1.0, 41.0), 40)


def with_replacement():
    generator = torch.Generator().manual_seed(4)
    return RandomSampler(range(40), True, 40, generator=generator)


def subset():
    return BatchSampler(SubsetRandomSampler(range(40)), 8, drop_last=False)


def own():
    changed = lambda x, draws: random_shift_flip(x, draws, max_shift=1)  # noqa: E731
    return TensorLoader(*pictures(), 8, shuffle=True, augment=changed)


class PassState:
    """Shuffles by a random state of its own, which describes the passes to come.

    In the middle of a pass it is not to be asked.
    """

    inside = False

    def __init__(self):
        self.rng, self.data = np.random.default_rng(int(torch.randint(99, ()))), pictures()

    def __iter__(self):
        self.inside = True
        for rows in np.array_split(self.rng.permutation(40), 5):
            yield self.data[0][rows], self.data[1][rows]
        self.inside = False

    def state_dict(self):
        assert not self.inside
        state = self.rng.bit_generator.state
        return {**state, "state": {k: str(v) for k, v in state["state"].items()}}

    def load_state_dict(self, state):
        numbers = {k: int(v) for k, v in state["state"].items()}
        self.rng.bit_generator.state = {**state, "state": numbers}


class StatefulDataLoader:
    """The protocol of torchdata: a state in the middle of a pass goes on with the next batch.

    Its order is drawn from torch's global state when a pass begins, as is a seed that every
    iterator draws; its data are changed by that state too.
    """

    def __init__(self):
        self.data, self.order, self.done, self.loaded = pictures(), [], 0, False

    def __iter__(self):
        torch.randint(9, ())  # as torch's iterators do
        if not self.loaded:
            self.order, self.done = torch.randperm(40).tolist(), 0
        self.loaded = False
        return self.rest()

    def rest(self):
        while self.done < 5:
            rows = self.order[8 * self.done : 8 * self.done + 8]
            self.done += 1
            yield self.data[0][rows] + 0.1 * torch.randn(8, 1, 4, 4), self.data[1][rows]
        self.order, self.done = [], 0

    def state_dict(self):
        return {"order": list(self.order), "done": self.done}

    def load_state_dict(self, state):
        self.order, self.done = list(state["order"]), state["done"]
        self.loaded = bool(self.order)


class Declared(PassState):
    """Says itself that its state holds its place."""

    resumes_within_pass = True
    done, rows, loaded = 0, None, False

    def __iter__(self):
        if not self.loaded:
            self.rows, self.done = self.rng.permutation(40).tolist(), 0
        self.loaded = False
        for start in range(self.done, 40, 8):
            self.done = start + 8
            rows = self.rows[start : start + 8]
            yield self.data[0][rows], self.data[1][rows]
        self.rows, self.done = None, 0

    def state_dict(self):
        return {**super().state_dict(), "done": self.done, "rows": self.rows}

    def load_state_dict(self, state):
        super().load_state_dict({k: v for k, v in state.items() if k not in ("done", "rows")})
        self.done, self.rows, self.loaded = state["done"], state["rows"], bool(state["rows"])


def batches():
    x, y = pictures()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]


LOADERS = {
    "shuffled": lambda: loader_of(shuffle=True),
    "with a generator": lambda: loader_of(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "in order": lambda: loader_of(),
    "weighted": lambda: loader_of(sampler=weighted()),
    "with replacement": lambda: loader_of(sampler=with_replacement()),
    "batch sampler": lambda: DataLoader(Noisy(*pictures()), batch_sampler=subset()),
    "two workers": lambda: loader_of(shuffle=True, num_workers=2),
    "tensors": own,
    "list": batches,
    "state of passes": PassState,
    "torchdata": StatefulDataLoader,
    "declared": Declared,
}


def small(loader, directory=None, gap=600.0, model=None, overhead=SELDOM, **options):
    """Dropout draws between the batches that loaders draw. The evidence has data of its own."""
    if model is None:
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 2)
        )
    where = None
    if directory is not None:
        where = Checkpoints(directory, max_overhead=overhead, longest_gap=gap)
    given = {"n_epochs": 3, "n_epochs_burnin": 2, "marglik_frequency": 2, **options}
    return margeq.optimize_marglik(
        model, loader, marglik_loader=batches(), seed=0, progress="none", checkpoint_dir=where,
        **given,
    )  # fmt: skip


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@ignores_convergence
@pytest.mark.parametrize("name", LOADERS)
def test_every_known_loader_goes_on_with_the_next_batch(name, tmp_path):
    """Steps 1 and 5 are the first and the last of an epoch of five batches, 8 is in the second."""
    seed(1)
    expected = digest(small(LOADERS[name]()))
    for step in (8,) if "workers" in name else (1, 5, 8):
        seed(1)
        with pytest.raises(Crash), crash_after(step):
            small(LOADERS[name](), tmp_path / str(step))
        seed(2)
        assert digest(small(LOADERS[name](), tmp_path / str(step))) == expected, step


@ignores_convergence
@pytest.mark.parametrize(("made", "fewer"), [(StatefulDataLoader, 3), (PassState, 0)])
def test_only_a_loader_that_says_where_it_stands_reads_no_batch_again(tmp_path, made, fewer):
    """Batches that the second process takes: one pass, the rest of epoch 2, and epoch 3."""
    taken = []

    class Counting(made):
        def __iter__(self):
            for batch in super().__iter__():
                taken.append(1)
                yield batch

    with pytest.raises(Crash), crash_after(8):
        small(Counting(), tmp_path)
    taken.clear()
    small(Counting(), tmp_path)
    assert len(taken) == 15 - fewer


@ignores_convergence
def test_a_loader_that_claims_too_much_is_a_data_error(tmp_path):
    class Boasting(PassState):
        resumes_within_pass = True
        inside = property(lambda self: False, lambda self, value: None)

    with pytest.raises(Crash), crash_after(8):
        small(Boasting(), tmp_path)
    with pytest.raises(DataError, match="yielded 64 samples, 40 in the first pass"):
        small(Boasting(), tmp_path)


def test_which_orders_are_known():
    class Odd(Sampler):
        def __iter__(self):
            return iter(range(40))

    assert all(Randomness.is_known(made()) for made in LOADERS.values())
    for options in (
        {"sampler": Odd()},
        {"batch_sampler": BatchSampler(Odd(), 8, drop_last=False)},
        {"num_workers": 1, "persistent_workers": True},
    ):
        batch = {} if "batch_sampler" in options else {"batch_size": 8}
        assert not Randomness.is_known(DataLoader(Noisy(*pictures()), **batch, **options))
    assert not Randomness.is_known(iter([]))


class Foreign(PassState):
    """Without a state that could be put back."""

    state_dict = load_state_dict = property()


@ignores_convergence
def test_inside_an_epoch_of_unknown_order_nothing_is_saved(tmp_path):
    with pytest.raises(Crash):
        small(Foreign(), tmp_path, gap=0, overhead=ALWAYS, callbacks=[crash_at_epoch(2)])
    assert CheckpointStore(tmp_path).steps() == [0, 1]
    assert position(tmp_path) is None
    with pytest.warns(DeterminismWarning, match="order of batches of Foreign"):
        result = small(Foreign(), tmp_path)
    assert len(result.history.losses) == 3


def crash_at_epoch(number):
    def callback(event):
        if event.kind == "epoch" and event.data["epoch"] == number:
            raise Crash

    return callback


# -- how often -----------------------------------------------------------------------------------


def written(monkeypatch, tmp_path, **options):
    """Whether each checkpoint of a run over 3 epochs of 5 batches was inside an epoch."""
    found, save = [], CheckpointStore.save

    def noted(store, step, state, **rest):
        found.append(state["position"] and state["position"]["batches"])
        assert step == len(found) - 1
        return save(store, step, state, **rest)

    monkeypatch.setattr(CheckpointStore, "save", noted)
    small(batches(), tmp_path, **{"overhead": ALWAYS, **options})
    return found


@ignores_convergence
def test_a_gap_of_zero_saves_after_every_step(monkeypatch, tmp_path):
    inside = [1, 2, 3, 4, 5, None]
    assert written(monkeypatch, tmp_path, gap=0) == [None, *inside * 3, None]


@ignores_convergence
@pytest.mark.parametrize("gap", [600.0, ALWAYS])
def test_short_epochs_are_saved_at_their_ends(monkeypatch, tmp_path, gap):
    assert written(monkeypatch, tmp_path, gap=gap) == [None] * 5


@ignores_convergence
def test_the_share_of_time_counts_inside_an_epoch_too(monkeypatch, tmp_path):
    assert written(monkeypatch, tmp_path, gap=0, overhead=SELDOM) == [None, None]


def test_a_checkpoint_is_overdue_after_the_gap_and_the_pause(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(writer.time, "perf_counter", lambda: clock[0])
    found = CheckpointWriter(CheckpointStore(tmp_path), 0.1, {}, longest_gap=30.0)

    def write():
        clock[0] += 4.0
        return {}

    assert not found.is_overdue()  # a run that was resumed just now has lost nothing
    clock[0] = 130.0
    assert found.is_overdue()
    assert found.write(0, write)
    clock[0] = 134.0 + 35.0
    assert not found.is_due()
    assert not found.is_overdue()  # it took 4 s, a tenth is allowed
    clock[0] = 134.0 + 40.0
    assert found.is_due()
    assert found.is_overdue()


@pytest.mark.parametrize("gap", [-1.0, float("nan"), "600", None])
def test_a_gap_is_a_number_of_seconds(gap, tmp_path):
    with pytest.raises(ConfigError, match="longest_gap"):
        Checkpoints(tmp_path, longest_gap=gap)


@ignores_convergence
def test_without_a_directory_no_state_is_taken(monkeypatch):
    monkeypatch.setattr(Randomness, "numbers", lambda self: pytest.fail("a state was taken"))
    monkeypatch.setattr(Run, "state_dict", lambda self: pytest.fail("a state was taken"))
    small(loader_of(shuffle=True))


# -- details -------------------------------------------------------------------------------------


class Breaks(torch.nn.Module):
    """A layer that fails numerically at one step of a process, as a solver inside might."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.at:
                raise margeq.errors.NonFiniteError("diverged")
        return x


@ignores_convergence
def test_a_restart_that_fails_inside_an_epoch_leaves_no_position_behind(tmp_path):
    def model(at=8):
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Flatten(), Breaks(at), torch.nn.Linear(16, 2))

    options = {"restarts": ["current"] * 2}
    expected = small(batches(), model=model(), **options)
    assert [bool(r.error) for r in expected.restarts] == [True, False]
    with pytest.raises(Crash):
        small(
            batches(), tmp_path, model=model(), overhead=ALWAYS, **options,
            callbacks=[crash_at_start(2)],
        )  # fmt: skip
    assert position(tmp_path) is None
    assert digest(small(batches(), tmp_path, model=model(-1), **options)) == digest(expected)


def crash_at_start(number):
    starts = []

    def callback(event):
        starts.append(event.kind)
        if starts.count("start") == number:
            raise Crash

    return callback


@ignores_convergence
def test_a_checkpoint_without_a_position_is_read(tmp_path):
    """As those of version 0.1.0 are."""
    seed(1)
    expected = digest(small(loader_of(shuffle=True)))
    seed(1)
    with pytest.raises(Crash):
        small(loader_of(shuffle=True), tmp_path, overhead=ALWAYS, callbacks=[crash_at_epoch(2)])
    store = CheckpointStore(tmp_path)
    found = store.load_latest()
    state = {name: part for name, part in found.state.items() if name != "position"}
    store.save(found.step, state, environment=found.environment)
    assert digest(small(loader_of(shuffle=True), tmp_path)) == expected


@ignores_convergence
def test_errors_name_the_batch_by_its_place_in_the_whole_pass(tmp_path):
    with pytest.raises(Crash), crash_after(8):
        small(batches(), tmp_path)
    damaged, passes = batches(), []

    class Late(list):
        """Its last batch is damaged, but not in the first pass."""

        def __iter__(self):
            passes.append(1)
            if len(passes) == 2:
                self[4] = (self[4][0] * float("nan"), self[4][1])
            return super().__iter__()

    data = Late(damaged)
    with patch.object(Randomness, "describe", lambda self: described):
        described = CheckpointStore(tmp_path).load_latest().state["settings"]["loaders"]
        with pytest.raises(DataError, match="batch 4, index 0"):
            small(data, tmp_path)


def test_batches_can_be_counted_from_anywhere():
    found = read_batches(batches()[2:], torch.device("cpu"), first=2)
    assert [batch.index for batch in found] == [2, 3, 4]


def test_a_bookmark_between_passes_has_no_position():
    saving = Saving(None, Interruption())
    randomness = Randomness(torch.nn.Linear(1, 1), [])
    bookmark = Bookmark(batches(), randomness, True, saving, dict)
    assert bookmark.state_dict()["position"] is None
    list(bookmark.rest())
    bookmark.note(5, 40, torch.tensor(1.0))
    assert bookmark.state_dict()["position"]["batches"] == 5
    bookmark.close()
    assert bookmark.state_dict()["position"] is None
    assert float(bookmark.total(torch.device("cpu"))) == bookmark.seen == bookmark.batches == 0
