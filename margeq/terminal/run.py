"""One run on a terminal: begun, or gone on with."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from margeq import __version__
from margeq.callbacks import Event, to_json
from margeq.config import DemoConfig, RunConfig
from margeq.errors import ConfigError, ConvergenceWarning
from margeq.flags import ResumeFlags, RunFlags
from margeq.report.page import PAGE, write_report
from margeq.report.text import as_text
from margeq.runs.execute import execute, with_task
from margeq.runs.files import read_if_there
from margeq.runs.identity import run_id
from margeq.runs.layout import CONFIG, RESULT, read_command
from margeq.runs.plain import config_from
from margeq.runs.tasks import registered
from margeq.terminal.answer import show_answer
from margeq.terminal.console import open_console, resumable, warnings_in_one_line
from margeq.terminal.demo import show_demo
from margeq.terminal.progress import Progress
from margeq.trackers import by_name

__all__ = ["show_resume", "show_run"]


def show_run(flags: RunFlags) -> None:
    """Train as the flags say; a directory that holds this very run is gone on with."""
    plain = {field.name: getattr(flags, field.name) for field in fields(RunConfig)}
    factory = Path(flags.factory) if flags.factory else None
    config = with_task(config_from(plain, "the command line"), factory)
    directory = Path(flags.out or f"runs/{config.task}-{run_id(config)}")
    _show(config, directory, factory, flags, flags.resume)


def show_resume(flags: ResumeFlags) -> None:
    """Go on with an interrupted run of any kind, or show the result of a finished one.

    Raises:
        ConfigError: if this is no run directory, or the file with the task is missing.
    """
    directory = Path(flags.run)
    command, plain = read_command(directory)
    where = str(directory / CONFIG)
    if command == "demo":
        config = config_from(plain, where, DemoConfig)
        faces = {"quiet": flags.quiet, "json": flags.json, "debug": flags.debug}
        show_demo(replace(config, out=str(directory), **faces), resume=True)
        return
    config = config_from(plain, where)
    factory = Path(flags.factory) if flags.factory else None
    config = with_task(config, factory)
    # a result that is there can be shown without the task
    if config.task not in registered() and not (directory / RESULT).exists():
        raise ConfigError(
            f"task {config.task!r} is not built in: name its file again, as in margeq resume "
            f"{directory} --factory FILE (a run directory cannot point to code)"
        )
    _show(config, directory, factory, flags, True)


def _show(
    config: RunConfig,
    directory: Path,
    factory: Path | None,
    flags: RunFlags | ResumeFlags,
    resume: bool,
) -> None:
    console = open_console(flags.quiet, flags.json)
    threads = f"{config.threads} thread{'s' * (config.threads > 1)}"
    console.print(
        f"margeq {__version__} · torch {torch.__version__}, {threads} · seed {config.seed} · "
        f"run {as_text(directory)}",
        soft_wrap=True,
    )
    console.print(f"task   {as_text(_task_words(config))}", soft_wrap=True)
    trained: list[Event] = []
    with ExitStack() as stack:
        stack.enter_context(resumable(directory))
        progress = Progress(console, stack).of(config.task)
        stack.enter_context(warnings_in_one_line())
        callbacks = [progress, trained.append]
        if isinstance(flags, RunFlags) and flags.track != "none":
            callbacks.append(stack.enter_context(by_name(flags.track, directory)))
        # a run that has not settled says so below the table
        warnings.simplefilter("ignore", ConvergenceWarning)
        summary = execute(config, directory, factory=factory, resume=resume, callbacks=callbacks)
        wanted = not isinstance(flags, RunFlags) or flags.report
        if wanted and (trained or not (directory / PAGE).exists()):
            write_report(summary, directory, read_if_there(directory / CONFIG))
    if flags.json:
        sys.stdout.write(to_json(summary, indent=1) + "\n")
        return
    title = f"Which symmetry did each layer choose?  (task: {config.task})"
    show_answer(console, summary, title, _checks(summary))
    done = f"{summary['seconds']:.0f} s" if trained else "was finished already"
    files = f"{f'{PAGE}, ' * wanted}result.json, events.jsonl"
    console.print(f"written {as_text(directory)}/{files}   ({done})", soft_wrap=True)


def _task_words(config: RunConfig) -> str:
    given = ", ".join(f"{key}={value}" for key, value in config.arguments.items())
    return f"{config.task}({given}), {config.n_epochs} epochs"


def _checks(summary: dict[str, Any]) -> list[str]:
    scores = (summary["held_out"] or {}).items()
    return [f"held-out data, never seen: {name} {value:.4g}" for name, value in scores]
