"""A run directory: what lies where, and whose it is.

config.json      command, configuration, versions, digest of the file with the task: first
events.jsonl     one line per event
checkpoints/     of :func:`margeq.optimize_marglik`
result.json      last, in one step: a directory that has it is finished
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from margeq.errors import ConfigError, DeterminismWarning
from margeq.runs.files import read_if_there, read_table
from margeq.runs.identity import differences, file_digest

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EVENTS",
    "LOG",
    "REQUEST",
    "RESULT",
    "is_free",
    "read_command",
    "require_same_config",
    "warn_if_factory_changed",
]

CONFIG, EVENTS, RESULT, CHECKPOINTS = "config.json", "events.jsonl", "result.json", "checkpoints"
REQUEST, LOG = "request.json", "log.txt"


def read_command(directory: Path) -> tuple[str, dict[str, Any]]:
    """What a run directory is about, by its ``config.json``.

    Returns:
        ``"run"`` or ``"demo"``, and the plain configuration.

    Raises:
        ConfigError: if this is no run directory.
    """
    path = directory / CONFIG
    if not path.exists():
        raise ConfigError(f"{directory} is no run directory: there is no {CONFIG} in it")
    stored = read_table(path)
    command, config = stored.get("command"), stored.get("config")
    if command not in ("run", "demo") or not isinstance(config, Mapping):
        raise ConfigError(
            f"{path}: command {command!r} and a {type(config).__name__} as its configuration; "
            f"expected 'run' or 'demo' and a table"
        )
    return str(command), dict(config)


def is_free(directory: Path) -> bool:
    """Whether no run has taken a step here: one that was refused at once leaves its place free."""
    taken = (directory / RESULT).exists() or any((directory / CHECKPOINTS).glob("**/step-*"))
    return not ((directory / CONFIG).exists() and taken)


def require_same_config(directory: Path, command: str, config: Mapping[str, Any]) -> None:
    """Refuse the directory of another run, unless it :func:`is_free`.

    Raises:
        ConfigError: naming the keys that differ, with both values.
    """
    if is_free(directory):
        return
    stored_command, stored = read_command(directory)
    differing = differences({"command": stored_command, **stored}, {"command": command, **config})
    if differing:
        raise ConfigError(
            f"{directory} is the directory of another run ({'; '.join(differing)}); choose another "
            f"--out"
        )


def warn_if_factory_changed(directory: Path, factory: Path | None) -> None:
    """Say so if the file with the task is not the one that the run began with."""
    noted = (read_if_there(directory / CONFIG) or {}).get("factory")
    if not isinstance(noted, Mapping) or factory is None:
        return
    if noted.get("sha256") != file_digest(factory):
        message = (
            f"{factory} has changed since {directory} began (it was {noted.get('path')!r}): the "
            f"result may be that of another task; choose another --out to have one of this file"
        )
        warnings.warn(message, DeterminismWarning, stacklevel=2)
