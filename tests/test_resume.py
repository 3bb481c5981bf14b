"""A run that was interrupted anywhere ends in the very state of one that was not."""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import margeq
from margeq.checkpoint import Checkpoints, CheckpointStore, disk
from margeq.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointLocked,
    CheckpointMismatch,
    CheckpointWarning,
    DeterminismWarning,
)
from tests.checkpoint_files import adopt
from tests.resume_cases import CASES, digest, pictures, shuffled, train

ROOT = Path(__file__).parent.parent


class Crash(BaseException):
    """Stands for the end of a process: nothing in the library may handle it."""


@functools.cache
def uninterrupted(case):
    """Digest without checkpoints, which must not change anything."""
    return digest(train(case))


def crash_at(number):
    """A callback that crashes at the event of a number; events are counted in a list."""
    events = []

    def callback(event):
        events.append(event.kind)
        if len(events) == number:
            raise Crash

    return callback


def count_events(case):
    events = []
    train(case, callbacks=[events.append])
    return events


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_do_not_change_a_run(case, tmp_path):
    assert digest(train(case, tmp_path)) == uninterrupted(case)


def test_the_cases_use_what_they_are_about():
    assert {"off", "probe"} == {e.data["to"] for e in count_events("paths") if e.kind == "switch"}
    assert train("lengthscales").hyperparameters
    assert train("groups").diagnostics.held_norms


@pytest.mark.parametrize("case", [case for case in CASES if case != "paths"])
def test_crashes_at_some_events_are_resumed_bit_for_bit(case, tmp_path):
    events = [e.kind for e in count_events(case)]
    rng = random.Random(0)
    # the second event of "epoch": something has been saved
    where = rng.sample(range(2, len(events)), 2)
    for number in sorted(where):
        directory = tmp_path / str(number)
        with pytest.raises(Crash):
            train(case, directory, callbacks=[crash_at(number)])
        # another process: other weights, other random numbers
        assert digest(train(case, directory, built=number)) == uninterrupted(case), (
            number,
            events[number - 1],
        )


def test_crash_after_crash_is_resumed_bit_for_bit(tmp_path):
    crashes, result = 0, None
    while result is None and crashes < 30:
        try:
            result = train("paths", tmp_path, built=crashes, callbacks=[crash_at(8)])
        except Crash:
            crashes += 1
    assert crashes > 6  # in every one of three restarts
    assert digest(result) == uninterrupted("paths")


def test_restarts_to_come_begin_where_the_first_process_began(tmp_path):
    """Weights, lengthscales, and the function scale that follows from them."""
    with pytest.raises(Crash):
        train("lengthscales", tmp_path, callbacks=[crash_at(6)])
    assert digest(train("lengthscales", tmp_path, built=7)) == uninterrupted("lengthscales")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_crash_at_every_single_event_is_resumed_bit_for_bit(case, tmp_path):
    for number in range(1, len(count_events(case)) + 1):
        with pytest.raises(Crash):
            train(case, tmp_path / str(number), callbacks=[crash_at(number)])
        again = train(case, tmp_path / str(number), built=number)
        assert digest(again) == uninterrupted(case), number


OPERATIONS = ("make_directory", "write_file", "sync_directory", "rename")


def interrupt(patch, at, error):
    """Make the file operation of number ``at`` fail, half-way if it writes."""
    done = []

    def wrapped(name, real):
        def step(*arguments):
            done.append(name)
            if len(done) == at + 1:
                if name == "write_file":
                    arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
                raise error
            return real(*arguments)

        return step

    for name in OPERATIONS:
        patch.setattr(disk, name, wrapped(name, getattr(disk, name)))
    return done


@pytest.mark.parametrize("at", range(26, 26 + 13))
def test_a_crash_at_each_step_of_a_checkpoint_is_resumed_bit_for_bit(tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        # what a killed process leaves is not tidied up
        patch.setattr(disk, "remove_tree", lambda path: None)
        interrupt(patch, at, Crash())
        with pytest.raises(Crash):
            train("noise", tmp_path)
    assert digest(train("noise", tmp_path)) == uninterrupted("noise")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    interrupt(monkeypatch, 30, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.warns(CheckpointWarning, match="No space left"):
        result = train("noise", tmp_path)
    assert digest(result) == uninterrupted("noise")


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_stays_full_ends_it_with_an_intact_checkpoint(tmp_path, monkeypatch):
    events = []

    def fill(event):
        events.append(event.kind)
        if events.count("epoch") == 4:
            monkeypatch.setattr(disk, "write_file", full)

    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="3 checkpoints in a row"),
    ):
        train("noise", tmp_path, callbacks=[fill])
    monkeypatch.undo()
    assert events.count("epoch") == 6
    assert digest(train("noise", tmp_path)) == uninterrupted("noise")


def test_a_finished_run_is_returned_without_its_last_checkpoint(tmp_path, monkeypatch):
    def fill(event):
        if event.kind == "epoch" and event.data["epoch"] >= 7:
            monkeypatch.setattr(disk, "write_file", full)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train("noise", tmp_path, callbacks=[fill])
    assert digest(result) == uninterrupted("noise")
    assert "the run is finished, but its last checkpoint" in str(caught[-1].message)


# -- killed processes ----------------------------------------------------------------------------


def killed_until_done(case, directory, rng, longest, **options):
    """Fork, kill after a random time, and again; returns the digest and the number of kills."""
    kills, answer = 0, directory.with_suffix(".digest")
    while True:
        # killed before anything was saved: the next one begins as the first one did
        built = kills if CheckpointStore(directory).steps() else 0
        child = os.fork()
        if not child:
            code = 1
            try:
                result = train(case, directory, built=built, **{"overhead": 0.3, **options})
                answer.write_text(digest(result))
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + rng.uniform(0.02, longest)
        done = 0
        while not done and time.monotonic() < deadline:
            time.sleep(0.005)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return answer.read_text(), kills
        kills += 1
        longest *= 1.1  # in the end it gets through


def seconds(case):
    began = time.monotonic()
    uninterrupted(case)
    train(case)
    return time.monotonic() - began


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_processes_are_resumed_bit_for_bit(tmp_path):
    longest = 0.3 * seconds("paths")
    found, kills = killed_until_done("paths", tmp_path / "run", random.Random(0), longest)
    assert found == uninterrupted("paths")
    assert kills >= 2


@needs_fork
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_two_hundred_kills_all_runs_end_alike(tmp_path):
    """At least 200 kills over at least 30 runs, at 0.02 s to half of a run's time."""
    rng, kills, runs = random.Random(2), 0, 0
    cases = list(CASES)
    while kills < 200 or runs < 30:
        case = cases[runs % len(cases)]
        longest = 0.25 * seconds(case)
        found, more = killed_until_done(case, tmp_path / str(runs), rng, longest)
        assert found == uninterrupted(case), case
        kills, runs = kills + more, runs + 1


@needs_fork
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_processes_killed_inside_epochs_end_alike(case, tmp_path):
    """A checkpoint after every step, and at least 8 kills of each case."""
    rng, kills, runs = random.Random(case), 0, 0
    longest = 0.5 * seconds(case)
    while kills < 8:
        where, always = tmp_path / str(runs), {"overhead": float("inf"), "gap": 0.0}
        found, more = killed_until_done(case, where, rng, longest, **always)
        assert found == uninterrupted(case)
        kills, runs = kills + more, runs + 1


def test_a_killed_process_is_resumed_by_a_fresh_one(tmp_path):
    """Of its own interpreter, in which hashes and addresses are others."""

    def started(hash_seed, built):
        command = [sys.executable, "-m", "tests.resume_cases", "noise", str(tmp_path), built]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hash_seed}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    first = started("1", "0")
    store = CheckpointStore(tmp_path)
    deadline = time.monotonic() + 60
    while len(store.steps()) < 2 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.002)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    out, _ = started("2", "9").communicate(timeout=120)
    assert out == uninterrupted("noise")


# -- what a resumed call is ----------------------------------------------------------------------


def test_a_finished_run_gives_its_result_again(tmp_path):
    first = train("paths", tmp_path)
    steps, events = CheckpointStore(tmp_path).steps(), []
    again = train("paths", tmp_path, built=99, callbacks=[events.append])
    assert digest(again) == digest(first) == uninterrupted("paths")
    assert [e.kind for e in events] == ["result"]
    assert CheckpointStore(tmp_path).steps() == steps


def test_the_seed_of_a_run_without_one_is_resumed(tmp_path):
    with pytest.raises(Crash):
        train("noise", tmp_path, seed=None, callbacks=[crash_at(12)])
    resumed = train("noise", tmp_path, built=3, seed=None)
    seed = CheckpointStore(tmp_path).load_latest().state["place"]["seed"]
    assert digest(resumed) == digest(train("noise", seed=seed))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_epochs": 10}, "schedule.n_epochs: 8 in the checkpoint, 10 here"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 here"),
        ({"lr_hyp": 0.2, "temperature": 2.0}, r"likelihood.temperature: 1.0.*; schedule.lr_hyp"),
        ({"optimizer_kwargs": {"lr": 0.06}}, "schedule.optimizer_kwargs.lr: 0.05 .* 0.06 here"),
        ({"hyper_solver": "mackay"}, "hyper_solver"),
        ({"prior": "scalar"}, "prior: 'tied' in the checkpoint, 'scalar' here"),
        ({"curvature": "diag"}, "curvature.curvature"),
        ({"parameters": ["2.weight"]}, "parameters"),
    ],
)
def test_other_arguments_are_refused_by_name(tmp_path, overrides, message):
    with pytest.raises(Crash):
        train("noise", tmp_path, callbacks=[crash_at(8)])
    with pytest.raises(CheckpointMismatch, match=message):
        train("noise", tmp_path, **overrides)
    assert digest(train("noise", tmp_path)) == uninterrupted("noise")


def linear(n_inputs, directory, n=20, loader=None, **options):
    x = torch.linspace(-1, 1, n * n_inputs).reshape(n, n_inputs)
    given = {"n_epochs": 4, "n_epochs_burnin": 1, "progress": "none", "seed": 0, **options}
    model = torch.nn.Linear(n_inputs, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    where = Checkpoints(directory, max_overhead=float("inf"))
    data = [(x, x[:, :1])] if loader is None else loader
    try:
        return margeq.optimize_marglik(
            model, data, likelihood="regression", checkpoint_dir=where, **given
        )
    except CheckpointError:
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        raise


ignores_convergence = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


@ignores_convergence
def test_another_model_or_other_data_are_refused_and_nothing_changes(tmp_path):
    linear(2, tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"'weight' is float32\[1, 2\].*\[1, 3\] here"):
        linear(3, tmp_path)
    with pytest.raises(CheckpointMismatch, match="20 data, the training loader yields 30"):
        linear(2, tmp_path, n=30)


@ignores_convergence
def test_resume_false_starts_anew(tmp_path):
    first = linear(2, tmp_path)
    steps = CheckpointStore(tmp_path).steps()
    other = linear(2, tmp_path, resume=False, seed=5, n_epochs=3)
    assert len(other.history.losses) == 3 != len(first.history.losses)
    assert max(CheckpointStore(tmp_path).steps()) < max(steps)
    assert CheckpointStore(tmp_path).load_latest().state["place"]["seed"] == 5


@ignores_convergence
def test_a_damaged_checkpoint_is_left_out(tmp_path):
    with pytest.raises(Crash):
        train("noise", tmp_path, callbacks=[crash_at(14)])
    newest = CheckpointStore(tmp_path).steps()[-1]
    path = tmp_path / f"step-{newest:06d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(CheckpointWarning, match="going back to the checkpoint before"):
        result = train("noise", tmp_path)
    assert digest(result) == uninterrupted("noise")


@pytest.mark.parametrize("section", ["hyper", "progress", "random", "place", "origin", "optimizer"])
def test_an_undamaged_checkpoint_of_nonsense_is_a_typed_error(tmp_path, section):
    with pytest.raises(Crash):
        train("noise", tmp_path, callbacks=[crash_at(14)])
    store = CheckpointStore(tmp_path)
    found = store.load_latest()
    store.clear()
    store.save(found.step, {**found.state, section: {}}, environment=found.environment)
    with pytest.raises(CheckpointCorrupt, match="not the state of such a run"):
        train("noise", tmp_path)


def test_a_second_call_in_the_same_directory_is_refused(tmp_path):
    refused = []

    def second(event):
        if event.kind == "epoch" and not refused:
            with pytest.raises(CheckpointLocked, match=f"process {os.getpid()}") as raised:
                train("noise", tmp_path)
            refused.append(raised)

    assert digest(train("noise", tmp_path, callbacks=[second])) == uninterrupted("noise")
    assert refused


def test_no_pickle_is_read_or_written(tmp_path):
    with pytest.raises(Crash):
        train("noise", tmp_path, callbacks=[crash_at(14)])
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ""}  # the last one is the lock
    newest = CheckpointStore(tmp_path).steps()[-1]
    adopt(tmp_path / f"step-{newest:06d}", "state.json", b"\x80\x04.")
    with pytest.warns(CheckpointWarning):
        train("noise", tmp_path)


SCHEDULERS = {
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [3, 5]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_states_of_schedulers_survive(tmp_path, make):
    def built():
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        return optimizer, make(optimizer)

    def rates(optimizer, scheduler, count):
        found = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    first = built()
    rates(*first, 4)
    store = CheckpointStore(tmp_path)
    store.save(1, {"optimizer": [part.state_dict() for part in first]})
    second = built()
    for part, state in zip(second, store.load(1).state["optimizer"], strict=True):
        part.load_state_dict(state)
    assert rates(*second, 6) == rates(*first, 6)


@ignores_convergence
def test_a_scheduler_without_a_state_is_refused(tmp_path):
    class Forgetful:
        def __init__(self, optimizer):
            pass

        def step(self):
            pass

    with pytest.raises(CheckpointError, match=r"Forgetful has no state_dict\(\)"):
        small(shuffled(), tmp_path, scheduler_cls=Forgetful)


# -- loaders -------------------------------------------------------------------------------------


class Foreign:
    """Shuffles by a random state of its own."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.x, self.y = pictures()

    def __iter__(self):
        for rows in np.array_split(self.rng.permutation(len(self.x)), 3):
            yield self.x[rows], self.y[rows]


class Stateful(Foreign):
    def state_dict(self):
        state = self.rng.bit_generator.state
        return {**state, "state": {k: str(v) for k, v in state["state"].items()}}

    def load_state_dict(self, state):
        numbers = {k: int(v) for k, v in state["state"].items()}
        self.rng.bit_generator.state = {**state, "state": numbers}


def small(loader, directory=None, **options):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    where = None if directory is None else Checkpoints(directory, max_overhead=float("inf"))
    return margeq.optimize_marglik(
        model, loader, n_epochs=6, n_epochs_burnin=2, marglik_frequency=2, seed=0,
        progress="none", checkpoint_dir=where, **options,
    )  # fmt: skip


@ignores_convergence
def test_a_loader_with_a_state_goes_on_where_it_was(tmp_path):
    torch.manual_seed(0)
    expected = digest(small(Stateful()))
    torch.manual_seed(0)
    with pytest.raises(Crash):
        small(Stateful(), tmp_path, callbacks=[crash_at(5)])
    assert digest(small(Stateful(seed=9), tmp_path)) == expected


@ignores_convergence
def test_a_foreign_loader_is_resumed_at_an_epoch_with_a_warning(tmp_path):
    with pytest.raises(Crash):
        small(Foreign(), tmp_path, callbacks=[crash_at(5)])
    with pytest.warns(DeterminismWarning, match=r"start of an epoch.*order of batches of Foreign"):
        result = small(Foreign(), tmp_path)
    assert len(result.history.losses) == 6


@ignores_convergence
def test_other_threads_are_reported(tmp_path):
    with pytest.raises(Crash):
        small(shuffled(), tmp_path, callbacks=[crash_at(5)])
    torch.set_num_threads(2)
    try:
        with pytest.warns(DeterminismWarning, match="threads 1 there, 2 here"):
            small(shuffled(), tmp_path)
    finally:
        torch.set_num_threads(1)


@ignores_convergence
def test_augmentation_in_two_workers_goes_on(tmp_path):
    class Noisy(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + 0.1 * torch.randn(x.shape), y

    def call(directory=None, **options):
        loader = torch.utils.data.DataLoader(Noisy(*pictures()), 16, shuffle=True, num_workers=2)
        return small(loader, directory, marglik_loader=[pictures()], **options)

    torch.manual_seed(1)
    expected = digest(call())
    torch.manual_seed(1)
    with pytest.raises(Crash):
        call(tmp_path, callbacks=[crash_at(5)])
    torch.manual_seed(2)
    assert digest(call(tmp_path)) == expected


@ignores_convergence
def test_random_numbers_of_numpy_and_python_go_on(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __init__(self):
            self.x, self.y = pictures()

        def __len__(self):
            return len(self.x)

        def __getitem__(self, index):
            return self.x[index] * (1 + np.random.rand() + random.random()), self.y[index]

    def call(directory=None, **options):
        loader = torch.utils.data.DataLoader(Noisy(), 16, shuffle=True)
        return small(loader, directory, marglik_loader=[pictures()], **options)

    def seed(value):
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)

    seed(1)
    expected = digest(call())
    seed(1)
    with pytest.raises(Crash):
        call(tmp_path, callbacks=[crash_at(5)])
    seed(2)
    assert digest(call(tmp_path)) == expected
