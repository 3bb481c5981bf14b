"""The demonstration on a terminal: progress, tables, verdicts."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from margeq import __version__
from margeq.callbacks import Callback, Event, RichProgress, to_json
from margeq.config import DemoConfig
from margeq.demo import Answer, Listener, run_demo
from margeq.effective_dim import EffectiveDimension
from margeq.errors import ConfigError, ConvergenceWarning
from margeq.report.table import subset_lines, symmetry_table

__all__ = ["show_demo"]

_SECONDS_BETWEEN_LINES = 10.0
_WIDTH = 100


def show_demo(config: DemoConfig) -> None:
    """Run the demonstration with the face that the terminal and the flags ask for.

    Raises:
        ConfigError: for arguments that cannot work, before anything is computed.
    """
    _check(config)
    directory = Path(config.out or f"runs/demo-{config.seed}")
    console = _Console(stderr=config.json, quiet=config.quiet or config.json, highlight=False)
    if not console.is_terminal:
        console = _Console(file=console.file, quiet=console.quiet, width=_WIDTH, highlight=False)
    threads = f"{config.threads} thread{'s' * (config.threads > 1)}"
    console.print(
        f"margeq {__version__} · torch {torch.__version__}, {threads} · seed {config.seed} · "
        f"run {directory}"
    )
    console.print(
        "data   1,797 handwritten digits on a 16×16 canvas; 20 % are held out for the last line "
        "only\nmodel  3 layers, each CONV + FC (candidate paths); no validation set is used"
    )
    with ExitStack() as stack:
        face = _Face(console, stack)
        # a run that has not settled says so in the table's footer
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ConvergenceWarning)
        summary = run_demo(config, directory, face)
    if config.json:
        sys.stdout.write(to_json(summary, indent=1) + "\n")
    else:
        total = sum(entry["seconds"] for entry in summary["questions"].values())
        console.print(f"written {directory}/result.json, events.jsonl, *.png   ({total:.0f} s)")


def _check(config: DemoConfig) -> None:
    for name in ("epochs", "threads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}: at least 1")
    if not config.questions:
        raise ConfigError("--questions needs at least one of digit, corner")
    known = {"symmetric", "free", "only:conv", "only:fc"}
    unknown = set(config.restarts.split(",")) - known
    if config.restarts != "auto" and unknown:
        raise ConfigError(
            f"--restarts {config.restarts}: use 'auto' or a list of {', '.join(sorted(known))}"
        )


class _Console(Console):
    """Leaves a broken pipe to the caller instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raise what is being handled."""
        raise


class _Face(Listener):
    """Bars on a terminal, a line every ten seconds elsewhere, tables everywhere."""

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console = console
        self._bars = None
        if console.is_terminal and not console.quiet:
            self._bars = stack.enter_context(RichProgress(console))

    def callbacks(self, question: str) -> list[Callback]:
        """One bar per run, or plain lines."""
        if self._bars is not None:
            bars = self._bars
            return [lambda event: bars(Event(event.kind, {"title": question, **event.data}))]
        return [_Lines(self._console, question)]

    def answered(self, answer: Answer) -> None:
        """Print table, verdict, diagnostics and the held-out check."""
        result, say = answer.result, self._console.print
        dimension = result.effective_dimension()
        title = f"Which symmetry did each layer choose?  (task: which {answer.question}?)"
        say()
        say(symmetry_table(dimension, title))
        for number, line in enumerate(_verdicts(dimension)):
            say(f"{'' if number else 'verdict':<12} {line}")
        for number, line in enumerate(subset_lines(dimension)):
            say(f"{'' if number else 'gates':<12} {line}")
        tries = "   ".join(
            f"{r.start} {r.log_marginal_likelihood / result.n_data:.3f}{' ← kept' * r.kept}"
            for r in result.restarts
        )
        say(f"evidence     log marginal likelihood per datum: {tries}")
        d = result.diagnostics
        say(f"diagnostics  {result.message} (slope {d.slope:.2g})")
        say(
            f"             clamped eigenvalues {d.clamped_eigenvalues} · precisions at bounds "
            f"{len(d.at_bounds)} · trace captured {d.captured_trace:.2%}"
        )
        say(f"check        held-out digits, never seen: {answer.accuracy:.1%}")
        if answer.conv_only is not None:
            accuracy, evidence = answer.conv_only
            say(
                f"             CONV only, same training: {accuracy:.1%} "
                f"(evidence per datum {evidence:.3f})"
            )
        say()


class _Lines:
    """One plain line per run and ten seconds, for logs."""

    def __init__(self, console: Console, question: str) -> None:
        self._console, self._question = console, question
        self._start, self._last, self._evidence = "", 0.0, ""

    def __call__(self, event: Event) -> None:
        """Follow the run."""
        if event.kind == "start":
            self._start, self._last = event.data["start"], time.monotonic()
        elif event.kind == "update":
            value = event.data["log_marginal_likelihood"]
            self._evidence = f", log marginal likelihood {value:.0f}"
        elif event.kind == "epoch" and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._say(f"epoch {event.data['epoch']}, loss {event.data['loss']:.3f}{self._evidence}")
        elif event.kind == "end":
            self._say(f"done{self._evidence}")

    def _say(self, text: str) -> None:
        self._console.print(f"which {self._question}? {self._start}: {text}", soft_wrap=True)


def _verdicts(dimension: EffectiveDimension) -> list[str]:
    """One line per layer, honest about mixtures."""
    lines = []
    for layer in dimension.selected:
        rows = [row for row in dimension.paths if row.layer == layer]
        chosen = [row for row in rows if row.verdict == "selected"]
        if chosen:
            lines.append(f"{layer}: {chosen[0].path.upper()}")
        else:
            on = [f"{r.path.upper()} {r.function_share:.0%}" for r in rows if r.verdict != "off"]
            lines.append(f"{layer}: mixed ({', '.join(on)})")
    return lines
