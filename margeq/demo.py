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

from margeq.callbacks import Callback, Event, JsonlCallback, to_json
from margeq.config import DemoConfig
from margeq.optimize import MargLikResult, optimize_marglik
from margeq.report.figures import save_figures
from margeq.runs.environment import threads, versions
from margeq.runs.files import writing
from margeq.runs.held_out import accuracy
from margeq.runs.questions import question_task
from margeq.runs.tasks import Task

__all__ = ["Answer", "Listener", "run_demo"]

Question = Literal["digit", "corner"]


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
        figures: files written.
    """

    question: str
    result: MargLikResult
    accuracy: float
    conv_only: tuple[float, float] | None
    seconds: float
    figures: list[Path]


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
    """Answer both questions and write ``result.json``, ``events.jsonl`` and figures.

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
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # of an earlier run in the same place; also shows before the work that writing is possible
        (directory / "result.json").unlink(missing_ok=True)
        (directory / "events.jsonl").write_text("", encoding="utf-8")
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
    with writing(directory):
        text = to_json(summary, indent=1)
        (directory / "result.json").write_text(text + "\n", encoding="utf-8")
    return summary


def _answer(question: Question, config: DemoConfig, directory: Path, listener: Listener) -> Answer:
    began = time.perf_counter()
    task = question_task(question, config.seed)
    callbacks = [_log(directory, question), *listener.callbacks(question)]
    restarts = "auto" if config.restarts == "auto" else config.restarts.split(",")
    result = _train(task, config, restarts, callbacks)
    conv_only = None
    if question == "corner":
        plain = question_task(question, config.seed, paths=("conv",))
        alone = _train(plain, config, "symmetric", listener.callbacks("corner, CONV only"))
        conv_only = (accuracy(plain), alone.log_marginal_likelihood / alone.n_data)
    with writing(directory):
        figures = save_figures(result, directory, f"{question}-")
    seconds = time.perf_counter() - began
    return Answer(question, result, accuracy(task), conv_only, seconds, figures)


def _train(
    task: Task, config: DemoConfig, restarts: str | list[str], callbacks: list[Callback]
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
    )


def _log(directory: Path, question: str) -> Callback:
    write = JsonlCallback(directory / "events.jsonl")

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
        "figures": [path.name for path in answer.figures],
        "conv_only": conv_only
        and {
            "held_out_accuracy": conv_only[0],
            "log_marginal_likelihood_per_datum": conv_only[1],
        },
        **answer.result.to_dict(),
    }
