"""The demonstration: one network, one set of digits, two questions, two symmetries.

"Which digit?" with digits anywhere on the canvas should switch the fully connected paths off;
"which corner?" cannot be answered without them. No validation set is used anywhere.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from margeq import __version__
from margeq.callbacks import Callback, Event, JsonlCallback, to_json
from margeq.checkpoint import CheckpointStore, run_lock
from margeq.config import DemoConfig
from margeq.data import ImageTask, place_digits
from margeq.errors import ConfigError
from margeq.models import digit_network
from margeq.optimize import MargLikResult, optimize_marglik
from margeq.report.figures import save_figures

__all__ = ["Answer", "Listener", "run_demo"]

Question = Literal["digit", "corner"]
_CLASSES = {"digit": 10, "corner": 4}
_CONV_ONLY = "corner-conv-only"
_BATCH, _CURVATURE_BATCH = 128, 512


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
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # of an earlier run in the same place; also shows before the work that writing is possible
        (directory / "result.json").unlink(missing_ok=True)
        (directory / "config.json").write_text(to_json(asdict(config), indent=1) + "\n", "utf-8")
        with (directory / "events.jsonl").open("a" if resume else "w", encoding="utf-8"):
            pass
    if not resume:
        _remove_checkpoints(directory)
    summary: dict[str, Any] = {
        "config": asdict(config),
        "versions": {
            "margeq": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": config.threads,
        "questions": {},
    }
    for question in config.questions:
        with _threads(config.threads):
            answer = _answer(question, config, directory, listener)
        summary["questions"][question] = _plain(answer)
        listener.answered(answer)
    with _writing(directory):
        text = to_json(summary, indent=1)
        (directory / "result.json").write_text(text + "\n", encoding="utf-8")
    return summary


def _checkpoints(directory: Path, name: str) -> Path:
    return directory / "checkpoints" / name


def _remove_checkpoints(directory: Path) -> None:
    """Those of questions that are not asked again too: they are about another run."""
    for name in (*_CLASSES, _CONV_ONLY):
        where = _checkpoints(directory, name)
        if where.is_dir():
            with run_lock(where):
                CheckpointStore(where).clear()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, reason = error.filename or directory, error.strerror or error
        raise ConfigError(f"cannot write to {place}: {reason}") from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads for torch while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _answer(question: Question, config: DemoConfig, directory: Path, listener: Listener) -> Answer:
    began = time.perf_counter()
    task = place_digits(question, seed=config.seed).standardised()
    network = digit_network(_CLASSES[question])
    callbacks = [_log(directory, question), *listener.callbacks(question)]
    restarts = "auto" if config.restarts == "auto" else config.restarts.split(",")
    where = _checkpoints(directory, question)
    result = _train(network, task, config, restarts, callbacks, where)
    conv_only = None
    if question == "corner":
        plain = digit_network(_CLASSES[question], paths=("conv",))
        face, where = listener.callbacks("corner, CONV only"), _checkpoints(directory, _CONV_ONLY)
        alone = _train(plain, task, config, "symmetric", face, where)
        conv_only = (_accuracy(plain, task), alone.log_marginal_likelihood / alone.n_data)
    with _writing(directory):
        figures = save_figures(result, directory, f"{question}-")
    seconds = time.perf_counter() - began
    return Answer(question, result, _accuracy(network, task), conv_only, seconds, figures)


def _train(
    network: nn.Module,
    task: ImageTask,
    config: DemoConfig,
    restarts: str | list[str],
    callbacks: list[Callback],
    checkpoint_dir: Path,
) -> MargLikResult:
    data = TensorDataset(task.train_images, task.train_labels)
    loader = DataLoader(data, _BATCH, shuffle=True)
    return optimize_marglik(
        network,
        loader,
        marglik_loader=DataLoader(data, _CURVATURE_BATCH),
        n_epochs=config.epochs,
        n_epochs_burnin=min(6, config.epochs),
        marglik_frequency=3,
        optimizer_kwargs={"lr": 0.01},
        scheduler_cls=CosineAnnealingLR,
        scheduler_kwargs={"T_max": config.epochs * len(loader)},
        restarts=restarts,
        seed=config.seed,
        callbacks=callbacks,
        progress="none",
        checkpoint_dir=checkpoint_dir,
    )


def _log(directory: Path, question: str) -> Callback:
    write = JsonlCallback(directory / "events.jsonl")

    def log(event: Event) -> None:
        with _writing(directory):
            write(Event(event.kind, {"question": question, **event.data}))

    return log


@torch.no_grad()
def _accuracy(network: nn.Module, task: ImageTask) -> float:
    network.eval()
    predictions: Tensor = network(task.test_images).argmax(1)
    return float((predictions == task.test_labels).double().mean())


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
