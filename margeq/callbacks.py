"""Callbacks: any function of an :class:`margeq.training.history.Event`.

The library never prints; progress on a terminal is a callback like any other.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from margeq.errors import ConfigError
from margeq.printable import printable
from margeq.training.history import Callback, Event

__all__ = ["Callback", "Event", "JsonlCallback", "RichProgress", "progress_callback", "to_json"]


class JsonlCallback:
    """Append every event as one JSON line; a number that is not finite becomes ``null``.

    Args:
        path: file to append to; its folder must exist.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __call__(self, event: Event) -> None:
        """Write one line."""
        line = to_json({"event": event.kind, **event.data})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def to_json(data: Any, indent: int | None = None) -> str:
    """Valid JSON of plain data, in which NaN and infinities are ``null``."""
    return json.dumps(_plain(data), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)
    return number if math.isfinite(number) else None


class RichProgress:
    """One progress bar per run, with loss and log marginal likelihood.

    Args:
        console: a rich console; standard error by default.
    """

    def __init__(self, console: Any = None) -> None:
        # imported here: rich is only needed when somebody watches
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console or Console(stderr=True),
        )
        self._task: Any = None
        self._loss = ""
        self._evidence = ""

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Follow the run."""
        if event.kind == "start":
            label = printable(f"{event.data.get('title', '')} {event.data['start']}".strip())
            self._loss = self._evidence = ""
            done, total = event.data.get("epoch", 0), event.data["n_epochs"]
            self._task = self._progress.add_task(label, total=total, completed=done, status="")
        elif event.kind == "epoch":
            self._loss = f"loss {event.data['loss']:.3f}"
            self._progress.update(self._task, advance=1, status=f"{self._loss}  {self._evidence}")
        elif event.kind == "update":
            self._evidence = f"log marg. lik. {event.data['log_marginal_likelihood']:.0f}"


def progress_callback(progress: str) -> RichProgress | None:
    """The progress callback of a name: ``"auto"`` draws on a terminal only.

    Returns:
        A callback and context manager, or ``None`` for silence.

    Raises:
        ConfigError: for an unknown name.
    """
    if progress not in ("auto", "rich", "none"):
        raise ConfigError(f"progress={progress!r}: use 'auto', 'rich' or 'none'")
    wanted = progress == "rich" or (progress == "auto" and sys.stderr.isatty())
    return RichProgress() if wanted else None
