"""Where the faces print, and how a stopped or doubtful run says so."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console

from margeq.printable import printable
from margeq.runs.layout import CONFIG

__all__ = ["PlainConsole", "open_console", "resumable", "warnings_in_one_line"]

_WIDTH = 100


class PlainConsole(Console):
    """Leaves a broken pipe to the caller instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raise what is being handled."""
        raise


def open_console(quiet: bool, json: bool) -> PlainConsole:
    """Standard output, or standard error if that is for JSON; of a fixed width in a file."""
    console = PlainConsole(stderr=json, quiet=quiet or json, highlight=False)
    if console.is_terminal:
        return console
    return PlainConsole(file=console.file, quiet=console.quiet, width=_WIDTH, highlight=False)


@contextmanager
def resumable(directory: Path) -> Iterator[None]:
    """Add to an interruption how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        said = "margeq resume" in str(stop)
        if not said and (directory / CONFIG).exists():
            stop.add_note(f"go on with: margeq resume {directory}")
        raise


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Warnings as lines on standard error, without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        sys.stderr.write(f"margeq: {category.__name__}: {printable(str(message))}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
