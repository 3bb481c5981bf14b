"""Files of a run directory: written in one step, read with care."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from margeq.callbacks import to_json
from margeq.errors import ConfigError

__all__ = ["mend_lines", "read_if_there", "read_table", "write_json", "write_text", "writing"]

_LARGEST = 1 << 28  # 256 MiB of text are no configuration and no result


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Say which file cannot be written.

    Raises:
        ConfigError: instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        place, reason = error.filename or directory, error.strerror or error
        raise ConfigError(f"cannot write to {place}: {reason}") from error


def write_json(path: Path, data: Any) -> None:
    """Write plain data as :func:`write_text` writes text."""
    write_text(path, to_json(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either there as a whole or not at all, also after a crash.

    Raises:
        ConfigError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # not writing(): the temporary name tells nobody anything
        raise ConfigError(f"cannot write to {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON file.

    Returns:
        Its table.

    Raises:
        ConfigError: if it cannot be read, or is no table.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > _LARGEST:
        raise ConfigError(f"{path} has more than {_LARGEST} bytes")
    try:
        decoded = text.decode("utf-8")
        data = tomllib.loads(decoded) if path.suffix == ".toml" else json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be understood: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected a table")
    return dict(data)


def read_if_there(path: Path) -> dict[str, Any] | None:
    """As :func:`read_table`, but ``None`` if there is no such file."""
    return read_table(path) if path.exists() else None


def mend_lines(path: Path) -> None:
    """Cut off the half line that a killed process may have left at the end of a log.

    Raises:
        ConfigError: if the file cannot be written.
    """
    with writing(path.parent), path.open("ab+") as file:
        end = file.tell()
        file.seek(0)
        kept = file.read().rfind(b"\n") + 1
        if kept < end:
            file.truncate(kept)
