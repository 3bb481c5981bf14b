"""Full disks, vanished directories, killed writers, second writers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from margeq.checkpoint import Checkpoints, CheckpointStore, CheckpointWriter, disk, run_lock
from margeq.errors import CheckpointError, CheckpointLocked, CheckpointWarning, ConfigError
from tests.checkpoint_files import equal, saved, state

ROOT = Path(__file__).parent.parent
STEPS = ("make_directory", "write_file", "sync_directory", "rename")
N_OPERATIONS = 8
"""Directory, three files of tensors and values, manifest, sync, rename, sync."""


class Fault(BaseException):
    """Stands for a crash: nothing in the library may handle it."""


def interrupt(monkeypatch, at, error, torn=False):
    """Make the operation of number ``at`` fail; returns the names of those before it."""
    done = []

    def wrap(name):
        real = getattr(disk, name)

        def step(*arguments):
            if len(done) == at:
                if torn and name == "write_file":
                    arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
                raise error
            done.append(name)
            return real(*arguments)

        monkeypatch.setattr(disk, name, step)

    for name in STEPS:
        wrap(name)
    return done


def test_the_protocol_has_eight_steps(tmp_path, monkeypatch):
    tmp_path.joinpath("run").mkdir()
    done = interrupt(monkeypatch, 99, Fault())
    CheckpointStore(tmp_path / "run").save(1, state())
    assert done == [
        "make_directory", *["write_file"] * 4, "sync_directory", "rename", "sync_directory",
    ]  # fmt: skip


@pytest.mark.parametrize("at", range(N_OPERATIONS))
def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, monkeypatch, at):
    store = saved(tmp_path)
    writer = CheckpointWriter(store, 0.02, {})
    with monkeypatch.context() as patch:
        interrupt(patch, at, OSError(errno.ENOSPC, "No space left on device"), torn=True)
        with pytest.warns(CheckpointWarning, match=r"checkpoint 2 was not written.*No space left"):
            writer.write(2, lambda: state(2.0))
    assert not list(tmp_path.glob(".tmp-*"))
    assert equal(store.load(1).state, state(1.0))
    writer.write(3, lambda: state(3.0))  # training went on
    assert equal(store.load_latest().state, state(3.0))


@pytest.mark.parametrize("at", range(N_OPERATIONS))
def test_a_crash_leaves_the_old_or_the_new_state(tmp_path, monkeypatch, at):
    store = saved(tmp_path)
    # what a crash leaves behind is not tidied up
    monkeypatch.setattr(disk, "remove_tree", lambda path: None)
    with monkeypatch.context() as patch:
        interrupt(patch, at, Fault(), torn=True)
        with pytest.raises(Fault):
            store.save(2, state(2.0))
    found = store.load_latest()
    assert equal(found.state, state(float(found.step)))
    assert found.step == (2 if at == N_OPERATIONS - 1 else 1)


def test_the_third_failure_in_a_row_is_an_error(tmp_path, monkeypatch):
    store = saved(tmp_path)
    writer = CheckpointWriter(store, 0.02, {})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for repetition in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(disk, "write_file", full)
            for number in range(2):
                with pytest.warns(CheckpointWarning):
                    writer.write(10 * repetition + number, state)
        if not repetition:
            writer.write(5, state)  # one that works begins the count anew
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_file", full)
        with pytest.raises(CheckpointError, match=r"3 checkpoints in a row.*make room"):
            writer.write(6, state)
    assert store.load_latest().step == 5


def test_a_deleted_directory_is_reported(tmp_path):
    store = saved(tmp_path / "run")
    disk.remove_tree(tmp_path / "run")
    with pytest.warns(CheckpointWarning, match="No such file"):
        CheckpointWriter(store, 0.02, {}).write(2, state)


def test_a_directory_that_cannot_be_written_to_is_reported_at_once(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(CheckpointError, match="choose a directory"), run_lock(tmp_path / "file"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_directory_is_reported_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission"), run_lock(tmp_path):
        pass


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


SMALL_FILES = """
import resource, signal, sys, warnings
from pathlib import Path
import torch
from margeq.checkpoint import CheckpointStore, CheckpointWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by default
store = CheckpointStore(Path(sys.argv[1]))
writer = CheckpointWriter(store, 0.02, {})
writer.write(1, lambda: {"model": {"w": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    writer.write(2, lambda: {"model": {"w": torch.ones(10_000)}})
print(*(type(w.message).__name__ for w in caught), store.load_latest().step)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_limit_on_file_sizes_leaves_the_previous_checkpoint_intact(tmp_path):
    out, _ = python(SMALL_FILES, tmp_path).communicate(timeout=60)
    assert out.split() == ["CheckpointWarning", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


HOLD = """
import sys
from pathlib import Path
from margeq.checkpoint import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_learns_who_is_first_and_a_stale_lock_is_free(tmp_path):
    first = python(HOLD, tmp_path)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckpointLocked, match=rf"process {first.pid} on host '.+'"),
            run_lock(tmp_path),
        ):
            pass
        with run_lock(tmp_path.with_name("other")):  # another run beside it
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=30)
    assert (tmp_path / ".lock-owner.json").exists()
    with run_lock(tmp_path):  # of a killed process
        pass
    assert not (tmp_path / ".lock-owner.json").exists()


def test_a_lock_is_held_against_the_same_process_too(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(CheckpointLocked, match=f"process {os.getpid()}"),
        run_lock(tmp_path),
    ):
        pass


def test_checkpoints_are_left_out_until_they_are_cheap(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("margeq.checkpoint.writer.time.perf_counter", lambda: now[0])
    tmp_path.joinpath("run").mkdir()
    writer = CheckpointWriter(CheckpointStore(tmp_path / "run"), 0.02, {})
    assert writer.is_due()

    def slow():
        now[0] += 0.1
        return state()

    writer.write(1, slow)
    assert not writer.is_due()
    now[0] += 4.9
    assert not writer.is_due()
    now[0] += 0.2
    assert writer.is_due()


@pytest.mark.parametrize("options", [{"max_overhead": 0}, {"max_overhead": -1.0}, {"keep": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError):
        Checkpoints("run", **options)
