"""A signal ends a call after the step in progress: saved, and with the best state in the model."""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq import cli
from margeq.checkpoint import CheckpointStore, disk
from margeq.config import DemoConfig
from margeq.demo import Listener, run_demo
from margeq.errors import CheckpointWarning
from margeq.terminal import demo as terminal_demo
from margeq.training.interruption import listening
from margeq.training.outcome import Outcome
from tests.resume_cases import CASES, digest, pictures, train
from tests.test_positions import Foreign, batches, loader_of, small

ROOT = Path(__file__).parent.parent
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}
SELDOM = 1e-9  # only the first checkpoint is due by itself

ignores_convergence = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == HANDLERS


@functools.cache
def uninterrupted(case):
    return digest(train(case))


def signal_at(number, which=signal.SIGINT, times=1):
    """A ``batch_fn`` that sends a signal with the batch of a number, whatever reads it."""
    read = []

    def batch_fn(raw):
        read.append(number)
        if len(read) == number:
            for _ in range(times):
                signal.raise_signal(which)
        return raw

    return batch_fn


PARTS = {
    "first_look": "first look",
    "train_epoch": "step",
    "curvature": "curvature",
    "network_gradient": "network",
    "shares": "shares",
    "conclude": "conclusion",
}


@functools.cache
def places(case):
    """For every batch that a call reads: by what part, in which restart, after how many epochs."""
    found, events = [], []

    def batch_fn(raw):
        names = {frame.name for frame in traceback.extract_stack()}
        (part,) = (what for name, what in PARTS.items() if name in names)
        kinds = [event.kind for event in events]
        last = max((i for i, kind in enumerate(kinds) if kind == "start"), default=0)
        found.append((part, kinds.count("start"), kinds[last:].count("epoch")))
        return raw

    train(case, batch_fn=batch_fn, callbacks=[events.append])
    return found


def stopped(call, which, *arguments, **options):
    """The exception with which a call ends that gets a signal."""
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        call(*arguments, **options)
    if which == signal.SIGINT:
        assert caught.type is KeyboardInterrupt
        return str(caught.value)
    assert (caught.type, caught.value.code) == (SystemExit, 143)
    return ""


def check_place(case, number, which, directory):
    stopped(
        train, which, case, directory, batch_fn=signal_at(number, which), overhead=SELDOM
    )  # fmt: skip
    # another process: other weights and random numbers, unless there was nothing to save yet
    built = number if CheckpointStore(directory).steps() else 0
    again = train(case, directory, built=built, overhead=SELDOM, batch_fn=lambda raw: raw)
    assert digest(again) == uninterrupted(case), (case, number, places(case)[number - 1])


WANTED = [
    ("noise", signal.SIGINT, ("step", 1, 0)),  # in the first epoch, before the first update
    ("noise", SIGNALS[-1], ("first look", 0, 0)),
    ("noise", signal.SIGTERM, ("curvature", 1, 3)),
    ("noise", signal.SIGINT, ("curvature", 1, 8)),  # the last update
    ("augmented", SIGNALS[-1], ("step", 1, 5)),
    ("augmented", signal.SIGINT, ("curvature", 1, 5)),
    ("groups", signal.SIGTERM, ("curvature", 1, 2)),
    ("lengthscales", SIGNALS[-1], ("network", 2, 5)),
    ("samples", signal.SIGINT, ("curvature", 2, 2)),
    ("paths", SIGNALS[-1], ("step", 2, 6)),
    ("paths", signal.SIGTERM, ("shares", 2, 5)),
]


@pytest.mark.parametrize(("case", "which", "place"), WANTED)
def test_a_run_that_was_stopped_anywhere_goes_on_bit_for_bit(case, which, place, tmp_path):
    """Of the batches that are read in a place, the second if there are two."""
    at = [number for number, found in enumerate(places(case), 1) if found == place]
    check_place(case, at[min(1, len(at) - 1)], which, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_signal_at_many_batches_is_gone_on_with_bit_for_bit(case, tmp_path):
    """12 batches of each case, with all signals in turn, and one of every part of a call."""
    total, found = len(places(case)), [part for part, *_ in places(case)]
    chosen = random.Random(0).sample(range(1, total + 1), 12)
    chosen += [total - found[::-1].index(part) for part in set(found)]
    for turn, number in enumerate(dict.fromkeys(chosen)):
        check_place(case, number, SIGNALS[turn % len(SIGNALS)], tmp_path / str(number))


def test_what_an_update_has_moved_already_is_not_saved(tmp_path):
    """Moments of the solver's Adam have moved when hyperparameters inside the network are."""
    options = {"hyper_solver": "adam", "n_hypersteps": 2, "restarts": ["current"], "n_epochs": 4}
    expected, events = digest(train("lengthscales", **options)), []

    def batch_fn(raw):
        names = {frame.name for frame in traceback.extract_stack()}
        if "network_gradient" in names and len(events) > 5:
            signal.raise_signal(signal.SIGINT)
            events.clear()
        return raw

    stopped(
        train, signal.SIGINT, "lengthscales", tmp_path, batch_fn=batch_fn, overhead=SELDOM,
        callbacks=[events.append], **options,
    )  # fmt: skip
    found = CheckpointStore(tmp_path).load_latest().state["progress"]["history"]
    assert len(found["losses"]) > len(found["updates"]) + 1 > 1  # of the update nothing is left
    assert digest(train("lengthscales", tmp_path, built=4, **options)) == expected


def test_run_after_run_is_stopped_and_ends_alike(tmp_path):
    result, stops = None, 0
    while result is None:
        try:
            result = train("noise", tmp_path, built=stops, batch_fn=signal_at(12), overhead=SELDOM)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    assert digest(result) == uninterrupted("noise")


# -- what is left of a call that was stopped -----------------------------------------------------


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.3).eval(), torch.nn.Linear(16, 2)
    )


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@ignores_convergence
def test_the_best_state_so_far_is_in_the_model_and_all_else_is_as_before():
    model, kept, values = network(), [], []

    def watch(event):
        if event.kind == "update":
            values.append(event.data["log_marginal_likelihood"])
            kept.append(state_of(model))
            if len(values) == 6:
                signal.raise_signal(signal.SIGINT)

    before = torch.get_rng_state()
    options = {"n_epochs_burnin": 1, "marglik_frequency": 1, "n_epochs": 4}
    message = stopped(
        small, signal.SIGINT, loader_of(shuffle=True), model=model, callbacks=[watch],
        restarts=["current"] * 2, optimizer_kwargs={"lr": 0.5}, **options,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model] == [True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    # the four of a finished restart count by their last value, which is converged
    best = max(range(6), key=values.__getitem__)
    assert best < 4, "make the first restart the better one"
    assert same(kept[best], state_of(model))
    assert "best state so far" in message
    assert "nothing was saved (checkpoint_dir=... would have)" in message


@ignores_convergence
def test_a_running_restart_can_hold_the_best_state():
    model, kept = network(), []

    def watch(event):
        if event.kind == "update":
            kept.append((event.data["log_marginal_likelihood"], state_of(model)))
        if event.kind == "epoch" and event.data["epoch"] == 3:
            signal.raise_signal(signal.SIGINT)

    stopped(
        small, signal.SIGINT, batches(), model=model, callbacks=[watch], n_epochs=4,
        n_epochs_burnin=1, marglik_frequency=1,
    )  # fmt: skip
    _, state = max(kept, key=lambda entry: entry[0])
    assert len(kept) == 2
    assert same(state, state_of(model))


def test_hyperparameters_inside_the_network_belong_to_the_best_state(monkeypatch):
    found, real = [], margeq.optimize_marglik

    def noted(model, loader, **options):
        found.append(options["hyperparameters"][0])
        return real(model, loader, **options)

    monkeypatch.setattr(margeq, "optimize_marglik", noted)
    updates = []

    def watch(event):
        if event.kind == "update":
            updates.append(event.data)
            if len(updates) == 4:
                signal.raise_signal(signal.SIGINT)

    stopped(train, signal.SIGINT, "lengthscales", callbacks=[watch])
    best = max(updates, key=lambda update: update["log_marginal_likelihood"])
    assert len({update["hyperparameters"]["hyperparameters[0]"][0] for update in updates}) == 4
    assert found[0].item() == best["hyperparameters"]["hyperparameters[0]"][0]


@ignores_convergence
@pytest.mark.parametrize("number", [2, 7, 13])
def test_before_the_first_update_the_model_is_as_before(number):
    """In the first look, in epoch 1 and in epoch 2."""
    model = network()
    before = state_of(model)
    message = stopped(
        small, signal.SIGINT, batches(), model=model, batch_fn=signal_at(number)
    )  # fmt: skip
    assert same(before, state_of(model))
    assert message.endswith("no hyperparameter update yet: the model is as before")


@ignores_convergence
def test_the_step_in_progress_is_the_last_one(tmp_path):
    """A signal with batch 3 of epoch 1: that step is taken and saved, no other batch is read."""
    read = signal_at(5 + 3)
    message = stopped(small, signal.SIGINT, batches(), tmp_path, batch_fn=read)
    assert CheckpointStore(tmp_path).load_latest().state["position"]["batches"] == 3
    assert f"saved in {tmp_path}, from where the same call goes on" in message


@ignores_convergence
def test_a_step_whose_batch_is_being_read_is_finished_too(tmp_path):
    class Sends(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for number, batch in enumerate(super().__iter__()):
                if (self.passes, number) == (2, 2):
                    signal.raise_signal(signal.SIGINT)
                yield batch

    message = stopped(small, signal.SIGINT, Sends(batches()), tmp_path)
    assert "; saved in" in message
    assert CheckpointStore(tmp_path).load_latest().state["position"]["batches"] == 3


@ignores_convergence
def test_a_pass_of_the_evidence_ends_with_the_next_batch(tmp_path):
    """Epochs 1 and 2 have five batches each, as has the first look; then comes curvature."""
    read = []

    def batch_fn(raw):
        read.append(raw)
        if len(read) == 16:
            signal.raise_signal(signal.SIGINT)
        return raw

    loader = batches()
    message = stopped(small, signal.SIGINT, loader, tmp_path, batch_fn=batch_fn)
    assert len(read) == 16
    assert "not saved" not in message
    found = CheckpointStore(tmp_path).load_latest().state
    assert found["position"] is None
    assert len(found["progress"]["history"]["losses"]) == 2
    assert found["progress"]["history"]["updates"] == []


@ignores_convergence
def test_a_loader_of_unknown_order_is_stopped_but_not_saved(tmp_path):
    message = stopped(small, signal.SIGINT, Foreign(), tmp_path, batch_fn=signal_at(13))
    assert f"not saved here, but see the last checkpoint in {tmp_path}" in message
    assert CheckpointStore(tmp_path).load_latest().state["position"] is None


@ignores_convergence
def test_a_signal_after_the_work_is_not_lost():
    model, results = network(), []

    def late(event):
        if event.kind == "result":
            results.append(state_of(model))
            signal.raise_signal(signal.SIGINT)

    message = stopped(small, signal.SIGINT, batches(), model=model, callbacks=[late])
    assert same(results[0], state_of(model))
    assert "best state" in message


@ignores_convergence
def test_an_error_after_a_signal_is_its_context():
    """The workers of a loader get signals of a terminal too, and their end is an error here."""

    def fails(event):
        if event.kind == "epoch":
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(KeyboardInterrupt) as caught:
        small(batches(), callbacks=[fails])
    assert "exited unexpectedly" in str(caught.value.__cause__)


@ignores_convergence
@pytest.mark.parametrize("workers", [0, 2])
def test_the_step_before_workers_died_is_saved(workers, tmp_path):
    """Ctrl-C reaches them too; of a loader without workers an error says nothing about its data."""
    breaks = []

    class Mortal(DataLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if breaks and number == 3:
                    signal.raise_signal(signal.SIGINT)
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    def loader():
        return Mortal(TensorDataset(*pictures()), 8, shuffle=True, num_workers=workers)

    torch.manual_seed(5)
    expected = digest(small(loader()))
    torch.manual_seed(5)

    def watch(event):
        if event.kind == "epoch":
            breaks.append(event)

    message = stopped(small, signal.SIGINT, loader(), tmp_path, callbacks=[watch])
    assert ("not saved here" in message) == (workers == 0)
    position = CheckpointStore(tmp_path).load_latest().state["position"]
    assert (position and position["batches"]) == (3 if workers else None)
    breaks.clear()
    assert digest(small(loader(), tmp_path)) == expected


@ignores_convergence
def test_a_full_disk_does_not_keep_a_call_from_ending(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(raw):
        monkeypatch.setattr(disk, "write_file", full)
        return read(raw)

    read = signal_at(8)
    with pytest.warns(CheckpointWarning, match="No space left"):
        message = stopped(small, signal.SIGINT, batches(), tmp_path, batch_fn=fill)
    assert "not saved here" in message


# -- handlers ------------------------------------------------------------------------------------


@ignores_convergence
@pytest.mark.parametrize("number", [3, 8, 17])
def test_a_second_sigint_aborts_at_once(number, tmp_path):
    """In the first look, in a step and in a curvature pass: the model is as before the call."""
    model = network()
    before, went_on = state_of(model), []
    read = signal_at(number, times=2)

    def batch_fn(raw):
        read(raw)
        went_on.append(raw)
        return raw

    with pytest.raises(KeyboardInterrupt, match="aborted by a second SIGINT"):
        small(batches(), tmp_path, model=model, batch_fn=batch_fn)
    assert len(went_on) == number - 1
    assert same(before, state_of(model))


def test_a_second_sigint_during_the_last_save_aborts_it_too(tmp_path, monkeypatch):
    real, writes = disk.write_file, []

    def write_file(path, data):
        writes.append(path)
        if len(writes) > 10:
            signal.raise_signal(signal.SIGINT)
        real(path, data)

    monkeypatch.setattr(disk, "write_file", write_file)
    with pytest.raises(KeyboardInterrupt, match="second"):
        train("noise", tmp_path, batch_fn=signal_at(20), overhead=SELDOM)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".tmp-*"))
    assert digest(train("noise", tmp_path)) == uninterrupted("noise")


def test_a_second_sigint_while_the_best_state_is_put_back_waits_for_it(monkeypatch):
    model, restored, real = network(), [], Outcome.restore

    def restore(outcome, problem):
        signal.raise_signal(signal.SIGINT)
        real(outcome, problem)
        restored.append(state_of(model))

    monkeypatch.setattr(Outcome, "restore", restore)
    with pytest.raises(KeyboardInterrupt, match="best state so far"):
        small(batches(), None, model=model, batch_fn=signal_at(40))
    assert same(restored[-1], state_of(model))


@pytest.mark.parametrize("second", SIGNALS[1:])
def test_other_signals_never_abort_and_the_last_one_decides(second, tmp_path):
    def call():
        with listening(tmp_path) as interruption:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(second)
            signal.raise_signal(second)
            assert interruption.requested == second
            interruption.stop_if_requested()

    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 143


@pytest.mark.parametrize("which", SIGNALS)
def test_a_handler_of_the_users_stays(which, tmp_path):
    heard = []
    signal.signal(which, lambda number, frame: heard.append(number))
    mine = signal.getsignal(which)
    try:
        result = train("noise", tmp_path, batch_fn=signal_at(12, which), overhead=SELDOM)
        assert signal.getsignal(which) is mine
    finally:
        signal.signal(which, HANDLERS[which])
    assert heard == [which]
    assert digest(result) == uninterrupted("noise")


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As SIGINT is in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert digest(train("noise", tmp_path, batch_fn=signal_at(12))) == uninterrupted("noise")
    finally:
        signal.signal(signal.SIGINT, HANDLERS[signal.SIGINT])


@ignores_convergence
@pytest.mark.parametrize("saved", [True, False])
def test_which_signals_are_heard(saved, tmp_path):
    """Without checkpoints SIGTERM ends a process as it ever did: nothing could be saved."""
    heard = []

    def look(event):
        changed = [n for n in SIGNALS if signal.getsignal(n) != HANDLERS[n]]
        heard.append(changed)

    small(batches(), tmp_path if saved else None, callbacks=[look])
    assert heard[0] == (SIGNALS if saved else [signal.SIGINT])
    assert all(entry == heard[0] for entry in heard)


@ignores_convergence
def test_outside_of_the_main_thread_nothing_is_heard(tmp_path):
    found = []

    def look(event):
        found.append({n: signal.getsignal(n) for n in SIGNALS})

    def work():
        found.append(small(batches(), tmp_path, callbacks=[look]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found.pop(), margeq.MargLikResult)
    assert found
    assert all(handlers == HANDLERS for handlers in found)


@ignores_convergence
def test_handlers_are_put_back_after_an_error():
    def fails(event):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        small(batches(), callbacks=[fails])


@ignores_convergence
def test_updates_are_remembered_only_if_a_signal_can_come(tmp_path, monkeypatch):
    """One more state is held during an update; nobody pays for it in vain."""
    taken = []
    real = margeq.training.restarts.Restarts.state_dict

    def state_dict(restarts):
        taken.append(threading.current_thread())
        return real(restarts)

    monkeypatch.setattr(margeq.training.restarts.Restarts, "state_dict", state_dict)
    small(batches(), tmp_path / "a")
    assert len(taken) == 2 + 2  # the first state, the last, and two updates
    taken.clear()
    thread = threading.Thread(target=lambda: small(batches(), tmp_path / "b"))
    thread.start()
    thread.join()
    assert len(taken) == 2


# -- processes -----------------------------------------------------------------------------------


def started(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(store, process, count):
    deadline = time.monotonic() + 60
    while len(store.steps()) < count and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def ended(process, which):
    """Send a signal to a process, which has to end within five seconds."""
    began = time.monotonic()
    process.send_signal(which)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    return out, err


needs_signals = pytest.mark.skipif(os.name == "nt", reason="signals of another kind")


@needs_signals
def test_a_process_is_terminated_and_gone_on_with_by_a_fresh_one(tmp_path):
    command = ("-m", "tests.resume_cases", "noise", str(tmp_path))
    first = started(*command, "0")
    wait_for(CheckpointStore(tmp_path), first, 2)
    ended(first, signal.SIGTERM)
    assert first.returncode == 143
    assert not list(tmp_path.glob(".tmp-*"))
    out, _ = started(*command, "9").communicate(timeout=120)
    assert out == uninterrupted("noise")


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("which", SIGNALS)
def test_processes_are_stopped_and_gone_on_with(which, tmp_path):
    command = ("-m", "tests.resume_cases", "paths", str(tmp_path))
    first = started(*command, "0")
    wait_for(CheckpointStore(tmp_path), first, 2)
    time.sleep(1.0)
    _, err = ended(first, which)
    if which == signal.SIGINT:
        assert first.returncode == -signal.SIGINT  # as Python ends after Ctrl-C
        assert "KeyboardInterrupt: training stopped by SIGINT; saved in" in err
    else:
        assert (first.returncode, err) == (143, "")
    out, _ = started(*command, "9").communicate(timeout=120)
    assert out == uninterrupted("paths")


# -- the demonstration ---------------------------------------------------------------------------

QUICK = ["demo", "--epochs", "3", "--questions", "corner", "--restarts", "symmetric", "--quiet"]


@pytest.fixture
def signals_in_the_demo(monkeypatch):
    """Send a signal after the first epoch of the question."""

    def use(which):
        def callbacks(face, question):
            def send(event):
                if event.kind == "epoch" and question == "corner":
                    signal.raise_signal(which)

            return [send]

        monkeypatch.setattr(terminal_demo._Face, "callbacks", callbacks)

    return use


def test_the_demonstration_says_how_to_go_on(signals_in_the_demo, tmp_path, capsys):
    signals_in_the_demo(signal.SIGINT)
    assert cli.main([*QUICK, "--out", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == (
        "", f"margeq: interrupted; 'margeq resume {tmp_path}' goes on from there\n"
    )  # fmt: skip
    assert '"epochs": 3' in (tmp_path / "config.json").read_text()
    assert CheckpointStore(tmp_path / "checkpoints" / "corner").steps()


def test_a_terminated_demonstration_ends_with_143(signals_in_the_demo, tmp_path, capsys):
    signals_in_the_demo(signal.SIGTERM)
    assert cli.main([*QUICK, "--out", str(tmp_path)]) == 143
    resume = f"margeq: terminated; go on with: margeq resume {tmp_path}\n"
    assert capsys.readouterr() == ("", resume)


def without_times(summary):
    text = re.sub(r"'seconds': [0-9.e+-]+", "", repr(summary))
    return re.sub(r"'config': {.*?}", "", text)


@pytest.mark.slow
@ignores_convergence
def test_a_demonstration_goes_on_or_begins_anew(signals_in_the_demo, tmp_path):
    config = DemoConfig(epochs=3, questions=("corner",), restarts="symmetric", out=str(tmp_path))
    expected = run_demo(config, tmp_path / "whole", Listener())

    class Signals(Listener):
        def callbacks(self, question):
            return [lambda e: signal.raise_signal(signal.SIGINT) if e.kind == "epoch" else None]

    class Counts(Listener):
        def __init__(self):
            self.epochs = []

        def callbacks(self, question):
            return [lambda e: self.epochs.append(question) if e.kind == "epoch" else None]

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt, match=f"margeq resume {part}"):
        run_demo(config, part, Signals())
    rest = Counts()
    resumed = run_demo(config, part, rest, resume=True)
    assert rest.epochs == ["corner"] * 2 + ["corner, CONV only"] * 3
    assert without_times(resumed) == without_times(expected)
    again = Counts()
    assert without_times(run_demo(config, part, again)) == without_times(expected)
    assert len(again.epochs) == 6
