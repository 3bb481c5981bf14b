"""Checkpoints of several ranks: rank 0 writes and reads them for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import TensorDataset

from margeq.checkpoint import Checkpoints, CheckpointStore, disk, run_lock
from margeq.comm import current_comm
from margeq.curvature.options import KfacOptions
from margeq.distributed import accumulate_in_order
from margeq.distributed.states import gather_states, share_state
from margeq.errors import (
    CheckpointError,
    CheckpointLocked,
    CheckpointMismatch,
    CheckpointWarning,
    DeterminismWarning,
    DistributedError,
)
from margeq.training.proximal import ProximalSteps
from margeq.training.randomness import Randomness
from tests.rank_trainings import call, launched, paths_net, pictures, resumable, shuffled_share
from tests.ranks import on_ranks
from tests.test_curvature_sums import sums

ROOT = Path(__file__).parent.parent


# --- states that ranks tell each other


def some_state(rank):
    return {
        "number": rank, "nothing": None, "pair": (1.5, float("inf")), ("a", 1): [True, "é"],
        "tensors": [
            torch.arange(3 + rank, dtype=torch.int16), torch.tensor(rank + 0.1).double(),
            torch.tensor([True, False]), torch.zeros(0, 2), torch.randn(2, 3).t().bfloat16(),
        ],
    }  # fmt: skip


def told(rank):
    torch.manual_seed(rank)
    state = some_state(rank)
    comm = current_comm()
    found = [share_state(comm, state, 1), gather_states(comm, state), share_state(comm, None, 0)]
    try:
        share_state(comm, object() if rank == 1 else None, 1)
    except CheckpointError as error:
        found.append(str(error))
    return found


def test_states_arrive_to_the_last_bit():
    expected = []
    for rank in range(2):
        torch.manual_seed(rank)
        expected.append(some_state(rank))
    for from_1, everyones, nothing, error in on_ranks(2, told):
        assert nothing is None
        assert "is a object, which cannot be stored" in error
        for found, state in zip([from_1, *everyones], [expected[1], *expected], strict=True):
            plain, others = ({k: v for k, v in s.items() if k != "tensors"} for s in (found, state))
            assert plain == others
            for a, b in zip(found["tensors"], state["tensors"], strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(a, b)


# --- the same number of ranks


class Stopped(Exception):
    """Ends a run on all ranks, from a callback."""


def stop_at(number):
    events = []

    def callback(event):
        events.append(event.kind)
        if len(events) == number:
            raise Stopped(event.kind)

    return callback


def stopped(directory, number, **options):
    try:
        resumable(directory, callbacks=[stop_at(number)], **options)
    except (Stopped, DistributedError):
        return
    raise AssertionError("nothing stopped the run")


def interrupted(rank, folder, steps):
    """Digests of a run without checkpoints, with them, and stopped and resumed."""
    # only the first rank has this disk
    where = Path(folder) if rank == 0 else Path("/proc/no/such/disk")
    found = [resumable(None), resumable(where / "whole")]
    for number in steps:
        stopped(where / str(number), number)
        found.append(resumable(where / str(number), built=number))
    found.append(resumable(where / "whole", built=99))
    return found


# in the first start and in the second; after an epoch, and after an update
def test_a_stopped_run_is_resumed_bit_for_bit_on_all_ranks(tmp_path):
    answers = on_ranks(2, interrupted, str(tmp_path), (4, 10))
    for found in answers:
        assert not isinstance(found, Exception), found
        assert len(set(found)) == 1
    assert answers[0] == answers[1]
    manifest = CheckpointStore(tmp_path / "whole").load_latest()
    assert manifest.environment["ranks"] == 2
    assert len(manifest.state["ranks"]) == 1
    assert not torch.equal(
        manifest.state["ranks"][0]["random"]["torch"], manifest.state["random"]["torch"]
    )


# --- signals, which may reach one rank only


def stop_by_signal(rank, directory, number, who, which, gap):
    """Send a signal to one rank in a step; how the run ended, and in which step."""
    taken, step = [], ProximalSteps.step

    def raising(self, precisions):
        taken.append(1)
        if len(taken) == number and rank == who:
            signal.raise_signal(which)
        step(self, precisions)

    with patch.object(ProximalSteps, "step", raising):
        try:
            resumable(directory, gap=gap)
        except BaseException as stop:
            return type(stop).__name__, str(stop), len(taken)
    return None


def signalled(rank, folder, number, who, which, gap):
    """Digests of a whole run, and of one that was stopped and resumed."""
    where = Path(folder) / "run" if rank == 0 else Path("/proc/no/such/disk")
    ended = stop_by_signal(rank, where, number, who, which, gap)
    return resumable(None), ended, resumable(where, built=1, gap=gap)


# steps 2, 5 and 8 of 3 in an epoch: in the first two epochs, and in the second start
@pytest.mark.parametrize(
    ("number", "who", "which", "gap"),
    [
        (2, 1, signal.SIGTERM, 600.0),
        (5, 0, signal.SIGINT, float("inf")),
        (11, 1, signal.SIGUSR1, 0.0),
    ],
)
def test_a_signal_to_one_rank_stops_all_of_them_in_the_same_step(tmp_path, number, who, which, gap):
    answers = on_ranks(2, signalled, str(tmp_path), number, who, which, gap)
    for whole, (kind, text, taken), resumed_run in answers:
        assert kind == ("KeyboardInterrupt" if which == signal.SIGINT else "SystemExit")
        assert kind == "KeyboardInterrupt" or text == "143"
        assert number <= taken <= number + 1
        assert resumed_run == whole
    assert len({taken for _, (_, _, taken), _ in answers}) == 1
    assert answers[0][0] == answers[1][0]


def test_one_process_goes_on_from_inside_an_epoch_of_two_with_a_warning(tmp_path):
    on_ranks(2, stop_by_signal, str(tmp_path), 1, 0, signal.SIGTERM, 600.0)
    state = CheckpointStore(tmp_path).load_latest().state
    # ranks tell each other with the next step
    assert state["position"]["steps"] == state["ranks"][0]["position"]["steps"] == 2
    with pytest.warns(DeterminismWarning, match="random numbers differ"):
        resumable(tmp_path)


# --- another number of ranks


def resumed(rank, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = losses(Path(folder))
    return found, [str(w.message) for w in caught if w.category is DeterminismWarning]


def losses(directory, **options):
    """Of each start, without random numbers but the order of the data, which ranks share."""
    where = directory and Checkpoints(directory, max_overhead=float("inf"))
    result = call(
        paths_net(), shuffled_share(), checkpoint_dir=where, restarts=["symmetric", "free"],
        **{"marglik_frequency": 1, "n_epochs": 3, **options},
    )  # fmt: skip
    return [loss for restart in result.restarts for loss in restart.history.losses]


def stop_and_go(rank, folder, number):
    try:
        losses(Path(folder), callbacks=[stop_at(number)])
    except (Stopped, DistributedError):
        return "stopped"
    return None


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_another_number_of_ranks_goes_on_with_a_warning(tmp_path, before, after):
    run, expected = tmp_path / "run", losses(None)
    start = on_ranks(before, stop_and_go, str(run), 4) if before > 1 else [stop_and_go(0, run, 4)]
    assert start == ["stopped"] * before
    found = on_ranks(after, resumed, str(run)) if after > 1 else [resumed(0, str(run))]
    for mine, said in found:
        assert mine == pytest.approx(expected, rel=1e-10)
        assert len(said) == 1
        assert f"ranks {before} there, {after} here): random numbers differ" in said[0]
    assert CheckpointStore(run).load_latest().environment["ranks"] == after


def test_ranks_of_another_number_draw_new_numbers_of_their_own():
    order = shuffled_share()
    generator = torch.Generator().manual_seed(3)
    own = torch.utils.data.DataLoader(TensorDataset(*pictures()), generator=generator)
    randomness = Randomness(torch.nn.Linear(1, 1), [order, own])
    stored, before = randomness.state_dict(), torch.get_rng_state()
    list(order), list(own)
    live = randomness.state_dict()["generators"]
    first, second = (randomness.on_other_ranks(stored, seed) for seed in (1, 2))
    assert not torch.equal(first["torch"], second["torch"])
    assert torch.equal(torch.get_rng_state(), before)
    # the order that all ranks share goes on, that of a rank's own share does not
    for found in (first, second):
        shared, foreign = found["generators"]
        assert torch.equal(shared, stored["generators"][0])
        assert torch.equal(foreign, live[1])
        assert not torch.equal(foreign, stored["generators"][1])


def ordered_factors(rank, folder):
    """Curvature sums at the weights of a checkpoint."""
    state = CheckpointStore(Path(folder)).load_latest().state
    model = paths_net()
    best = max(state["finished"], key=lambda outcome: outcome["log_marginal_likelihood"])
    model.load_state_dict(best["model_state"])
    found = accumulate_in_order(
        model.float(), TensorDataset(*pictures(dtype=torch.float32)), options=KfacOptions(), chunk=3
    )
    return sums(found)


def written(rank, folder):
    return losses(Path(folder), n_epochs=2)


# P10
def test_a_checkpoint_of_four_ranks_has_the_same_factors_on_fewer(tmp_path):
    on_ranks(4, written, str(tmp_path))
    expected = ordered_factors(0, tmp_path)
    for size in (2, 4):
        for found in on_ranks(size, ordered_factors, str(tmp_path)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(tmp_path, n_epochs=2) == written_losses(tmp_path)  # it is finished


def written_losses(folder):
    finished = CheckpointStore(folder).load_latest().state["finished"]
    return [loss for outcome in finished for loss in outcome["history"]["losses"]]


# --- what fails


def failing(rank, folder):
    folder, found = Path(folder), {}

    def attempt(name, function):
        try:
            found[name] = function()
        except Exception as error:
            found[name] = error

    stopped(folder / "run", 4)
    attempt("other arguments", lambda: resumable(folder / "run", n_hypersteps=3))
    attempt("some have none", lambda: resumable(folder / "run" if rank == 0 else None))
    attempt("nowhere", lambda: resumable(Path("/proc/no/such/disk")))
    with run_lock(folder / "locked") if rank == 0 else open(os.devnull):
        attempt("locked", lambda: resumable(folder / "locked"))
    real = disk.write_file

    def full(path, data):
        raise OSError(28, "No space left on device")

    disk.write_file = full if rank == 0 else real
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        attempt("full", lambda: resumable(folder / "full"))
    disk.write_file = real
    attempt("unknown", lambda: call(Odd(), shuffled_share(), checkpoint_dir=folder / "odd"))
    attempt("after", lambda: resumable(folder / "run") == resumable(None))
    return found


class Odd(torch.nn.Module):
    """Has a state that needs pickle."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(16, 2).double()

    def get_extra_state(self):
        return {1}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.map(x.flatten(1))


def test_failures_of_the_first_rank_are_those_of_all(tmp_path):
    here, there = on_ranks(2, failing, str(tmp_path))
    expected = {
        "other arguments": (CheckpointMismatch, "schedule.n_hypersteps: 20 in the checkpoint"),
        "nowhere": (CheckpointError, "cannot write checkpoints"),
        "locked": (CheckpointLocked, "is in use by process"),
        "full": (CheckpointError, "3 checkpoints in a row"),
        "unknown": (CheckpointError, "is a set, which cannot be stored"),
    }
    for name, (error, message) in expected.items():
        assert type(here[name]) is type(there[name]) is error, (name, here[name], there[name])
        assert message in str(here[name]), name
        assert message in str(there[name]), name
    assert "'checkpoint_dir' differs between ranks" in str(here["some have none"])
    assert here["after"] is there["after"] is True


# --- the launcher


def with_torchrun(folder):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        f"--rdzv-id={os.getpid()}", "-m", "tests.rank_trainings", str(folder),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_ADDR2LINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


# P9, with the launcher: it opens a port of localhost, which a sandbox may refuse
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the name of the loopback interface")
def test_a_restarted_job_ends_like_one_that_was_not_killed(tmp_path):
    (digest, begins), (other, _) = on_ranks(2, launched, None)
    assert digest == other
    assert begins == [0, 0]
    killed = with_torchrun(tmp_path)
    assert list(killed) == ["1-0.json", "1-1.json"]
    assert [found[0] for found in killed.values()] == [digest, digest]
    (epoch,) = killed["1-0.json"][1]  # in the second run, which goes on
    assert epoch > 0
