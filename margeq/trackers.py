"""Experiment trackers that follow a run: TensorBoard, trackio, wandb, by one callback.

No tracker is imported unless it is asked for, and nothing is sent that the tracker does not send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from margeq.callbacks import Event
from margeq.errors import ConfigError

__all__ = ["TrackedRun", "Tracker", "by_name", "scalars", "tensorboard", "tracker"]

_NOT_A_VALUE = ("start", "epoch")


class TrackedRun(Protocol):
    """What a tracker has to offer; the runs of trackio and wandb do."""

    def log(self, metrics: dict[str, float], *, step: int) -> Any:
        """Take the values of one epoch."""

    def finish(self) -> Any:
        """Write what is left."""


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by name, such as ``"loss"`` or ``"prior_precision/<group>"``.

    Nested values have their keys joined by ``/``, and lists are numbered unless they hold a single
    number. What is missing, not a number or not finite is left out.

    Returns:
        Name -> number; empty for events that have none.

    >>> event = Event("update", {"epoch": 3, "sigma_noise": None, "prior_precision": {"a": 2.0}})
    >>> scalars(event)
    {'prior_precision/a': 2.0}
    """
    if event.kind == "switch":
        layer, path, kind = event.data["layer"], event.data["path"], event.data["to"]
        return {f"switch/{layer}/{path}": float(kind != "off")}
    if event.kind not in ("epoch", "update"):
        return {}
    values = {key: value for key, value in event.data.items() if key not in _NOT_A_VALUE}
    return dict(_numbers(values, ""))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield name, float(value)


class Tracker:
    """A callback that opens one tracked run per start and logs numbers under their epoch.

    Restarts begin at epoch 1 again, so each is a run of its own. A run that is resumed goes on with
    the epoch where it was. Runs are finished when their start ends, and by leaving the context:

        with tracker(trackio, project="digits") as follow:
            margeq.optimize_marglik(model, loader, callbacks=[follow])

    Args:
        open_run: makes the run of a start, from its name.
    """

    def __init__(self, open_run: Callable[[str], TrackedRun]) -> None:
        self._open = open_run
        self._run: TrackedRun | None = None
        self._epoch = 0

    def __call__(self, event: Event) -> None:
        """Follow the training."""
        if event.kind == "start":
            self.close()
            self._run, self._epoch = self._open(event.data["start"]), event.data.get("epoch", 0)
        elif self._run is not None:
            self._epoch = event.data.get("epoch", self._epoch)
            values = scalars(event)
            if values:
                self._run.log(values, step=self._epoch)
        if event.kind == "end":
            self.close()

    def close(self) -> None:
        """Finish the run that is open, if any."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def __enter__(self) -> Self:
        """Nothing is opened before the training starts."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the run, also after a failure."""
        self.close()


def tracker(module: ModuleType | Any, *, name: str = "", **init: Any) -> Tracker:
    """Follow a run by trackio, wandb, or any module with their ``init``.

    Args:
        module: ``trackio`` or ``wandb``, imported by the caller; ``module.init(**init, name=...)``
            returns an object with ``log(values, step=...)`` and ``finish()``.
        name: beginning of the names of the runs; a start's name is added.
        **init: passed on to ``module.init``: ``project=``, ``group=``, ``config=``, …

    Returns:
        A callback and context manager.

    Raises:
        ConfigError: if the module has no ``init``.
    """
    if not callable(getattr(module, "init", None)):
        raise ConfigError(
            f"tracker {module!r} has no init: pass the module trackio or wandb itself"
        )

    def open_run(start: str) -> TrackedRun:
        return module.init(**init, name=f"{name}-{start}" if name else start)

    return Tracker(open_run)


def tensorboard(directory: str | Path) -> Tracker:
    """Follow a run by TensorBoard: event files in ``directory/<start>``.

    Returns:
        A callback and context manager.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # imported here: only for who asks for it
    except ImportError as error:
        raise ConfigError("TensorBoard is missing: pip install tensorboard") from error
    return Tracker(lambda start: _TensorBoardRun(SummaryWriter(Path(directory) / start)))


def by_name(name: str, directory: Path) -> Tracker:
    """The tracker of a run directory: ``"tensorboard"``, ``"trackio"`` or ``"wandb"``.

    Returns:
        A callback and context manager; projects are called ``"margeq"``.

    Raises:
        ConfigError: if it is not installed.
    """
    if name == "tensorboard":
        return tensorboard(directory / "tensorboard")
    try:
        module = import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is missing: pip install {name}") from error
    return tracker(module, name=directory.name, project="margeq", group=directory.name)


class _TensorBoardRun:
    """A summary writer as a tracked run."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """One scalar per value."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write and close the event file."""
        self._writer.close()
