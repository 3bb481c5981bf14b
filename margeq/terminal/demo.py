"""The demonstration on a terminal."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from margeq import __version__
from margeq.callbacks import Callback, to_json
from margeq.config import DemoConfig
from margeq.demo import Answer, Listener, run_demo
from margeq.errors import ConfigError, ConvergenceWarning
from margeq.report.text import as_text
from margeq.terminal.answer import show_answer
from margeq.terminal.console import open_console, resumable
from margeq.terminal.progress import Progress

__all__ = ["show_demo"]


def show_demo(config: DemoConfig, resume: bool = False) -> None:
    """Run the demonstration with the face that the terminal and the flags ask for.

    Args:
        config: from the flags, or from a run directory.
        resume: go on from the checkpoints there.

    Raises:
        ConfigError: for arguments that cannot work, before anything is computed.
    """
    _check(config)
    directory = Path(config.out or f"runs/demo-{config.seed}")
    console = open_console(config.quiet, config.json)
    threads = f"{config.threads} thread{'s' * (config.threads > 1)}"
    console.print(
        f"margeq {__version__} · torch {torch.__version__}, {threads} · seed {config.seed} · "
        f"run {as_text(directory)}"
    )
    console.print(
        "data   1,797 handwritten digits on a 16×16 canvas; 20 % are held out for the last line "
        "only\nmodel  3 layers, each CONV + FC (candidate paths); no validation set is used"
    )
    with ExitStack() as stack:
        stack.enter_context(resumable(directory))
        face = _Face(console, stack)
        # a run that has not settled says so in the table's footer
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ConvergenceWarning)
        summary = run_demo(config, directory, face, resume)
    if config.json:
        sys.stdout.write(to_json(summary, indent=1) + "\n")
    else:
        total = sum(entry["seconds"] for entry in summary["questions"].values())
        written = f"{as_text(directory)}/report.html, result.json, events.jsonl, *.png, *.svg"
        console.print(f"written {written}   ({total:.0f} s)", soft_wrap=True)


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


class _Face(Listener):
    """Progress of each question, and its answer."""

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console, self._progress = console, Progress(console, stack)

    def callbacks(self, question: str) -> list[Callback]:
        """One bar per run, or plain lines."""
        return [self._progress.of(f"which {question}?")]

    def answered(self, answer: Answer) -> None:
        """Print table, verdict, diagnostics and the held-out check."""
        checks = [f"held-out digits, never seen: {answer.accuracy:.1%}"]
        if answer.conv_only is not None:
            accuracy, evidence = answer.conv_only
            checks.append(
                f"CONV only, same training: {accuracy:.1%} (evidence per datum {evidence:.3f})"
            )
        title = f"Which symmetry did each layer choose?  (task: which {answer.question}?)"
        show_answer(self._console, answer.result.to_dict(), title, checks)
