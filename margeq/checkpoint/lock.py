"""One writer per run directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from margeq.checkpoint import disk
from margeq.checkpoint.text import from_json, to_canonical_json
from margeq.errors import CheckpointCorrupt, CheckpointError, CheckpointLocked

__all__ = ["run_lock"]

_LOCK, _OWNER = ".lock", ".lock-owner.json"


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if there is none.

    The operating system holds the lock: that of a killed process is free at once.

    Raises:
        CheckpointLocked: naming the process and host that hold it.
        CheckpointError: if nothing can be written there.
    """
    # imported here: only runs with checkpoints need it
    from filelock import FileLock, Timeout

    owner = directory / _OWNER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / _LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise CheckpointLocked(
            f"{directory} is in use by {_holder(owner)}; wait for it to end, or choose another "
            f"checkpoint_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"cannot write checkpoints to {directory}: {error}; choose a directory that can be "
            f"written to and locked"
        ) from error
    try:
        _sign(owner)
        yield
    finally:
        with suppress(OSError):  # read-only or gone by now, of which the body has told
            owner.unlink(missing_ok=True)
        lock.release()


def _sign(owner: Path) -> None:
    try:
        owner.unlink(missing_ok=True)  # of a killed process
        host = socket.gethostname()
        disk.write_file(owner, to_canonical_json({"pid": os.getpid(), "host": host}))
    except OSError:
        return  # only the message to a second writer is poorer


def _holder(owner: Path) -> str:
    try:
        found = from_json(disk.read_file(owner, 4096), owner.name)
        return f"process {int(found['pid'])} on host {str(found['host'])[:80]!r}"
    except (CheckpointCorrupt, KeyError, TypeError, ValueError):
        return "another process"
