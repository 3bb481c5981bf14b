"""The file operations of the checkpoint protocol, each durable when it returns.

Every step that a crash or a full disk can interrupt is one function here.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from margeq.errors import CheckpointCorrupt

__all__ = ["make_directory", "read_file", "remove_tree", "rename", "sync_directory", "write_file"]

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_BINARY = getattr(os, "O_BINARY", 0)  # on Windows only
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for a writer at the other end of a pipe


def make_directory(path: Path) -> None:
    """A new directory, for its owner only."""
    path.mkdir(mode=0o700)


def write_file(path: Path, data: bytes) -> None:
    """A new file that is on the disk, not only in the cache, when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk; where directories cannot be opened, nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a directory its final name, in one step."""
    os.rename(source, target)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)


def read_file(path: Path, largest: int, size: int | None = None) -> bytes:
    """The bytes of a plain file that is no link; its size is checked before memory is taken.

    Args:
        path: of the file.
        largest: most bytes that are read.
        size: number of bytes that it has to have.

    Returns:
        All of its bytes.

    Raises:
        CheckpointCorrupt: for a link, a missing or unreadable file, or another size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _BINARY)
        try:
            return _read(descriptor, path, largest, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def _read(descriptor: int, path: Path, largest: int, size: int | None) -> bytes:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointCorrupt(f"{path} is no plain file")
    if size is not None and found.st_size != size:
        raise CheckpointCorrupt(f"{path} has {found.st_size} bytes, its manifest says {size}")
    if found.st_size > largest:
        raise CheckpointCorrupt(f"{path} has {found.st_size} bytes, more than {largest}")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        data = file.read(found.st_size)
    if len(data) != found.st_size:
        raise CheckpointCorrupt(f"{path} ended after {len(data)} of {found.st_size} bytes")
    return data
