"""One JSON file per run: settings, seed, versions, results; written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import margeq
from margeq.callbacks import to_json
from margeq.errors import ConfigError, DataError

__all__ = ["RESULTS", "Cell", "is_done", "read_record", "read_records", "versions", "write_record"]

RESULTS = Path(__file__).parent / "results"
"""Where records are kept, and committed."""

_KEYS = ("experiment", "preset", "cell", "config", "versions", "threads", "seconds", "results")
_EVALUATED = ("accuracy", "nll")


@dataclass(frozen=True)
class Cell:
    """One run of one table.

    Attributes:
        experiment: script that runs it.
        preset: name of its settings.
        task: question.
        model: kind of network.
        training: ``"map"`` or ``"evidence"``.
        seed: of the data, the weights and the order of the batches.
    """

    experiment: str
    preset: str
    task: str
    model: str
    training: str
    seed: int

    @property
    def name(self) -> str:
        """What is printed."""
        return f"{self.task}-{self.model}-{self.training}-seed{self.seed}"

    def path(self, root: Path) -> Path:
        """Where its record lies."""
        return root / self.experiment / self.preset / f"{self.name}.json"


def is_done(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run with these settings has been made.

    Raises:
        ConfigError: if a record of other settings lies there; it is never overwritten.
    """
    if not path.exists():
        return False
    wanted = json.loads(to_json(config))
    found = read_record(path)["config"]
    differing = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked for"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path} was made with other settings ({'; '.join(differing)}); delete it to run again"
        )
    return True


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write via a neighbouring file, so that an interrupted run leaves no half a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(to_json(_rounded(record), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """A record, checked for what the tables need.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable record ({error}); delete it to run again") from (
            error
        )
    missing = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
    if not missing:
        test = record["results"].get("test", {})
        missing = [f"results.test.{key}" for key in _EVALUATED if key not in test]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; delete it to run again")
    return record


def read_records(root: Path, experiment: str, preset: str) -> Iterator[dict[str, Any]]:
    """All records of an experiment, in the order of their names."""
    for path in sorted((root / experiment / preset).glob("*.json")):
        yield read_record(path)


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    return {
        "margeq": margeq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
    }


def _revision() -> str:
    """Commit of the working tree, with ``+changes`` if margeq or the experiments differ from it."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        code = ("margeq", "experiments/*.py")
        return commit + ("+changes" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _rounded(value: Any) -> Any:
    """Seven significant digits: more is noise in the history of the files."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
