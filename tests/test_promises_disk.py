"""Disks: full ones, read-only ones, and several processes beside each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from margeq.checkpoint import CheckpointStore
from margeq.errors import CheckpointError, CheckpointWarning
from tests.resume_cases import digest, train

ROOT = Path(__file__).parent.parent


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def output(*command):
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")


# -- K1: a full disk -------------------------------------------------------------------------------

FULL = """
import os, sys, warnings
from pathlib import Path
import torch
from margeq.checkpoint import CheckpointStore
from margeq.errors import CheckpointError, CheckpointWarning
from tests.resume_cases import digest, train

torch.set_num_threads(1)
disk, run, ballast = Path(sys.argv[1]), Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "ballast"

def fill(until):
    def callback(event):
        if event.kind != "epoch":
            return
        if event.data["epoch"] == 3:
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if event.data["epoch"] == until:
            ballast.unlink()
    return callback

def attempt(until):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = digest(train("noise", run, callbacks=[fill(until)]))
        except CheckpointError as error:
            found = str(error)
    print([w.category.__name__ for w in caught].count("CheckpointWarning"))
    print(found)
    print(CheckpointStore(run).load_latest().step, len(list(run.glob(".tmp-*"))))

attempt(99)      # the disk stays full
ballast.unlink()
print(digest(train("noise", run, built=5)))  # there is room again, the run goes on
for path in sorted(run.rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
attempt(5)       # full for two checkpoints only
"""


def test_a_disk_of_two_megabytes_that_is_full(tmp_path):
    """A real tmpfs, in a user namespace: warnings, an intact checkpoint, an error after three."""
    namespace = ("unshare", "-rm")
    if shutil.which("unshare") is None or subprocess.run(
        [*namespace, "sh", "-c", f"mount -t tmpfs -o size=2m tmpfs {tmp_path}"],
        capture_output=True,
    ).returncode:  # fmt: skip
        pytest.skip("user namespaces are not permitted here")
    script = tmp_path.with_suffix(".py")
    script.write_text(FULL)
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && exec "$0" {script} {tmp_path}'
    expected = digest(train("noise"))
    lines = output(*namespace, "sh", "-c", mount, sys.executable)
    assert lines[0] == "2"
    assert lines[1].startswith("3 checkpoints in a row could not be written")
    assert "No space left on device; make room" in lines[1]
    assert lines[2] == "2 0"  # the checkpoint before the disk was full; nothing half-written
    assert lines[3] == expected
    assert lines[4] == "2"
    assert lines[5] == expected  # training went on
    assert lines[6].endswith(" 0")


LIMITED = """
import resource, signal, sys, warnings
from pathlib import Path
import torch
from margeq.checkpoint import CheckpointStore
from margeq.errors import CheckpointError
from tests.resume_cases import train

torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Path(sys.argv[1])

def limit(event):
    if event.kind == "epoch" and event.data["epoch"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        train("noise", run, callbacks=[limit])
    except CheckpointError as error:
        print(error)
print([w.category.__name__ for w in caught].count("CheckpointWarning"))
print(CheckpointStore(run).load_latest().step, len(list(run.glob(".tmp-*"))))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_limit_on_file_sizes_during_training(tmp_path):
    lines = output(sys.executable, "-c", LIMITED, str(tmp_path))
    assert "3 checkpoints in a row could not be written" in lines[0]
    assert lines[1:3] == ["2", "2 0"]
    assert digest(train("noise", tmp_path, built=4)) == digest(train("noise"))


# -- K2: a directory that cannot be written to -----------------------------------------------------

READ_ONLY = """
import os, sys, warnings
from pathlib import Path
import filelock, safetensors.torch, torch
from margeq.checkpoint import CheckpointStore
from margeq.errors import CheckpointError
from tests.resume_cases import digest, train

torch.set_num_threads(1)
train("noise")                       # imports whatever comes late
parent = Path(sys.argv[1])
closed, closing = parent / "closed", parent / "closing"
for path in (closed, closing):
    path.mkdir()
    os.chmod(path, 0o777)
os.chmod(closed, 0o555)
os.chmod(parent, 0o755)
if os.geteuid() == 0:                # whom no permission stops
    os.seteuid(65534)
try:
    train("noise", closed)
except CheckpointError as error:
    print(error)
else:
    print("written")

def close(event):
    if event.kind == "epoch" and event.data["epoch"] == 3:
        os.chmod(closing / "inside", 0o555)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        train("noise", closing / "inside", callbacks=[close])
    except CheckpointError as error:
        print(error)
print([w.category.__name__ for w in caught].count("CheckpointWarning"))
print(CheckpointStore(closing / "inside").load_latest().step)
os.chmod(closing / "inside", 0o755)
print(digest(train("noise", closing / "inside", built=2)))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs permissions of POSIX")
def test_a_read_only_directory_at_once_and_in_the_middle():
    """As another user where the tests run as root, since nothing is read-only for root."""
    parent = Path(tempfile.mkdtemp())
    try:
        lines = output(sys.executable, "-c", READ_ONLY, str(parent))
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    assert "cannot write checkpoints to" in lines[0]
    assert "Permission denied" in lines[0]
    assert "choose a directory that can be written to" in lines[0]
    assert "3 checkpoints in a row could not be written" in lines[1]
    assert "Permission denied" in lines[1]
    assert lines[2:4] == ["2", "2"]
    assert lines[4] == digest(train("noise"))


# -- K3: a directory that goes away ----------------------------------------------------------------


def test_a_directory_that_is_deleted_in_the_middle(tmp_path):
    def delete(event):
        if event.kind == "epoch" and event.data["epoch"] == 3:
            shutil.rmtree(tmp_path / "run")

    with (
        pytest.warns(CheckpointWarning, match="No such file") as caught,
        pytest.raises(CheckpointError, match="3 checkpoints in a row"),
    ):
        train("noise", tmp_path / "run", callbacks=[delete])
    assert len(caught) == 2


# -- K7: different runs, same parent ---------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_with_runs_of_their_own_beside_each_other(tmp_path):
    """Both at once, in one parent directory; each ends as it does alone."""
    cases = ("noise", "augmented")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.resume_cases", case, str(tmp_path / case), "0"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for case in cases
    ]  # fmt: skip
    found = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert found == [digest(train(case)) for case in cases]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cases)
    for case in cases:
        assert CheckpointStore(tmp_path / case).load_latest() is not None
