"""Bars on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from contextlib import ExitStack

from rich.console import Console

from margeq.callbacks import Callback, Event, RichProgress
from margeq.report.text import as_text

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Follows training, one title after the other.

    Args:
        console: where to draw.
        stack: closes the bars.
    """

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console = console
        self._bars = None
        if console.is_terminal and not console.quiet:
            self._bars = stack.enter_context(RichProgress(console))

    def of(self, title: str) -> Callback:
        """A callback: one bar per run, or plain lines."""
        if self._bars is None:
            return _Lines(self._console, title)
        bars = self._bars
        return lambda event: bars(Event(event.kind, {"title": title, **event.data}))


class _Lines:
    """One plain line per run and ten seconds, for logs."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._start, self._last, self._evidence = "", 0.0, ""

    def __call__(self, event: Event) -> None:
        """Follow the run."""
        if event.kind == "start":
            self._start, self._last = event.data["start"], time.monotonic()
            self._evidence = ""
        elif event.kind == "update":
            value = event.data["log_marginal_likelihood"]
            self._evidence = f", log marginal likelihood {value:.0f}"
        elif event.kind == "epoch" and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._say(f"epoch {event.data['epoch']}, loss {event.data['loss']:.3f}{self._evidence}")
        elif event.kind == "end":
            self._say(f"done{self._evidence}")

    def _say(self, text: str) -> None:
        self._console.print(as_text(f"{self._title} {self._start}: {text}"), soft_wrap=True)
