"""The demonstration: one network, one set of digits, two questions, two symmetries.

"Which digit?" with digits anywhere on the canvas should switch the fully connected paths off;
"which corner?" cannot be answered without them. No validation set is used anywhere.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch.optim.lr_scheduler import CosineAnnealingLR

from margeq.callbacks import Callback, Event, JsonlCallback
from margeq.checkpoint import CheckpointStore, run_lock
from margeq.config import DemoConfig
from margeq.optimize import MargLikResult, optimize_marglik
from margeq.report.page import write_report
from margeq.runs.environment import threads, versions
from margeq.runs.files import mend_lines, read_table, write_json, writing
from margeq.runs.held_out import accuracy
from margeq.runs.layout import CHECKPOINTS, CONFIG, EVENTS, RESULT
from margeq.runs.questions import question_task
from margeq.runs.tasks import Task

__all__ = ["Answer", "Listener", "run_demo"]

Question = Literal["digit", "corner"]
_CONV_ONLY = "corner-conv-only"


@dataclass(frozen=True)
class Answer:
    """One question, answered.

    Attributes:
        question: ``"digit"`` or ``"corner"``.
        result: what :func:`margeq.optimize_marglik` found.
        accuracy: on the held-out digits, which nothing was tuned on.
        conv_only: accuracy and evidence per datum of the CONV-only network, for the corner
            question.
        seconds: wall time.
    """

    question: str
    result: MargLikResult
    accuracy: float
    conv_only: tuple[float, float] | None
    seconds: float


class Listener:
    """What a face of the demonstration may override."""

    def callbacks(self, question: str) -> list[Callback]:
        """Callbacks for the training of one question."""
        return []

    def answered(self, answer: Answer) -> None:
        """Called after each question."""


def run_demo(
    config: DemoConfig, directory: Path, listener: Listener, resume: bool = False
) -> dict[str, Any]:
    """Answer both questions and write ``result.json``, ``events.jsonl`` and the report.

    The configuration is written to ``config.json`` first, and the state of the training to
    ``checkpoints``: with both an interrupted demonstration can be gone on with.

    Args:
        config: resolved configuration.
        directory: run directory; created if needed.
        listener: face to report to.
        resume: go on from the checkpoints in the directory instead of removing them; the
            configuration has to be that of ``config.json``.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: if the directory or a file in it cannot be written.
        CheckpointError: for checkpoints that are in use, cannot be written, or cannot be trusted.
        KeyboardInterrupt: saying how to go on.
    """
    try:
        return _answer_all(config, directory, listener, resume)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"interrupted; 'margeq resume {directory}' goes on from there"
        ) from stop


def _answer_all(
    config: DemoConfig, directory: Path, listener: Listener, resume: bool
) -> dict[str, Any]:
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # of an earlier run in the same place; also shows before the work that writing is possible
        (directory / RESULT).unlink(missing_ok=True)
        if not resume:
            (directory / EVENTS).write_text("", encoding="utf-8")
    mend_lines(directory / EVENTS)
    write_json(directory / CONFIG, {"command": "demo", "config": asdict(config)})
    if not resume:
        _remove_checkpoints(directory)
    summary: dict[str, Any] = {
        "config": asdict(config),
        "versions": versions(),
        "threads": config.threads,
        "questions": {},
    }
    for question in config.questions:
        with threads(config.threads):
            answer = _answer(question, config, directory, listener)
        summary["questions"][question] = _plain(answer)
        listener.answered(answer)
    write_json(directory / RESULT, summary)
    stored = read_table(directory / RESULT)
    write_report(stored, directory, read_table(directory / CONFIG))
    return summary


def _checkpoints(directory: Path, name: str) -> Path:
    return directory / CHECKPOINTS / name


def _remove_checkpoints(directory: Path) -> None:
    """Those of questions that are not asked again too: they are about another run."""
    for name in ("digit", "corner", _CONV_ONLY):
        where = _checkpoints(directory, name)
        if where.is_dir():
            with run_lock(where):
                CheckpointStore(where).clear()


def _answer(question: Question, config: DemoConfig, directory: Path, listener: Listener) -> Answer:
    began = time.perf_counter()
    task = question_task(question, config.seed)
    callbacks = [_log(directory, question), *listener.callbacks(question)]
    restarts = "auto" if config.restarts == "auto" else config.restarts.split(",")
    where = _checkpoints(directory, question)
    result = _train(task, config, restarts, callbacks, where)
    conv_only = None
    if question == "corner":
        plain = question_task(question, config.seed, paths=("conv",))
        face, where = listener.callbacks("corner, CONV only"), _checkpoints(directory, _CONV_ONLY)
        alone = _train(plain, config, "symmetric", face, where)
        conv_only = (accuracy(plain), alone.log_marginal_likelihood / alone.n_data)
    seconds = time.perf_counter() - began
    return Answer(question, result, accuracy(task), conv_only, seconds)


def _train(
    task: Task,
    config: DemoConfig,
    restarts: str | list[str],
    callbacks: list[Callback],
    checkpoint_dir: Path,
) -> MargLikResult:
    return optimize_marglik(
        task.model,
        task.train_loader,
        marglik_loader=task.marglik_loader,
        n_epochs=config.epochs,
        n_epochs_burnin=min(6, config.epochs),
        marglik_frequency=3,
        optimizer_kwargs={"lr": 0.01},
        scheduler_cls=CosineAnnealingLR,
        scheduler_kwargs={"T_max": config.epochs * task.n_batches},
        restarts=restarts,
        seed=config.seed,
        callbacks=callbacks,
        progress="none",
        checkpoint_dir=checkpoint_dir,
    )


def _log(directory: Path, question: str) -> Callback:
    write = JsonlCallback(directory / EVENTS)

    def log(event: Event) -> None:
        with writing(directory):
            write(Event(event.kind, {"question": question, **event.data}))

    return log


def _plain(answer: Answer) -> dict[str, Any]:
    conv_only = answer.conv_only
    return {
        "held_out_accuracy": answer.accuracy,
        "log_marginal_likelihood_per_datum": (
            answer.result.log_marginal_likelihood / answer.result.n_data
        ),
        "seconds": answer.seconds,
        "conv_only": conv_only
        and {
            "held_out_accuracy": conv_only[0],
            "log_marginal_likelihood_per_datum": conv_only[1],
        },
        **answer.result.to_dict(),
    }
