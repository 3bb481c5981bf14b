"""When the state of a call is saved: after epochs, inside long ones, and when it has to stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from margeq.comm import ALONE, Comm
from margeq.errors import CheckpointError, CheckpointWarning
from margeq.training.interruption import Interruption, Stopped
from margeq.training.shared_checkpoints import Writer

__all__ = ["Saving"]

Capture = Callable[[], Mapping[str, Any]]

_UNMOVED = ("settings", "place", "origin", "finished", "cache", "optimizer", "best")
"""Sections whose tensors an update replaces or leaves alone, as long as it reads data."""


class Saving:
    """Saves the state of a call now and then, and stops it where a signal asks for it.

    Args:
        writer: of checkpoints, if any.
        interruption: signals.
        first: number of the first checkpoint.
        comm: ranks that save and stop together.
    """

    def __init__(
        self,
        writer: Writer | None,
        interruption: Interruption,
        first: int = 0,
        comm: Comm = ALONE,
    ) -> None:
        self._writer, self._interruption, self._number = writer, interruption, first
        self._comm = comm

    @property
    def is_wanted(self) -> bool:
        """Whether there are checkpoints at all."""
        return self._writer is not None

    def between_epochs(self, capture: Capture, evidence: float | None = None) -> None:
        """Save if there is time for it; save and stop if the call is asked to.

        Args:
            capture: gives the state.
            evidence: by which the best checkpoint is kept.

        Raises:
            Stopped: if it is.
        """
        if self._is_asked_to_stop():
            self._stop(capture, evidence)
        elif self._writer is not None and self._writer.is_due():
            self._write(capture, evidence)

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks."""
        return self._comm.size == 1

    def is_needed(self, is_possible: bool) -> bool:
        """Whether to call :meth:`after_step`; ``is_possible``: to go on from inside an epoch."""
        if self._interruption.requested is not None:
            return True
        return is_possible and self._writer is not None and self._writer.is_overdue()

    def after_step(self, capture: Capture | None) -> None:
        """The same inside an epoch, where checkpoints are rarer; on all ranks if one needs it.

        Args:
            capture: gives the state, ``None`` where it cannot be gone on with from inside.

        Raises:
            Stopped: if the call is asked to stop.
        """
        if self._is_asked_to_stop():
            self._stop(capture)
        elif self._writer is not None and capture is not None:
            self._write(capture)

    def steps(self) -> AbstractContextManager[None]:
        """A context for an epoch of steps, each of which is followed by :meth:`after_step`."""
        return self._interruption.steps()

    @contextmanager
    def update(self, capture: Capture) -> Iterator[None]:
        """A context for an update, which is saved as it began if it is stopped.

        Raises:
            Stopped: if the call is asked to stop.
        """
        if self._is_asked_to_stop():
            self._stop(capture)
        before = None
        if self._writer is not None and self._interruption.stops_in_passes:
            before = {k: v if k in _UNMOVED else _copied(v) for k, v in capture().items()}
        try:
            yield
        except Stopped:
            if before is not None:
                self._save(lambda: before)
            raise

    def at_end(self, capture: Capture) -> None:
        """The last checkpoint is always written, and its failure costs nothing but itself."""
        if self._writer is None:
            return
        try:
            self._save(capture)
        except CheckpointError as error:
            message = f"the run is finished, but its last checkpoint is missing: {error}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal has come, on whichever rank."""
        if self._comm.size > 1:
            heard = [number for number in self._comm.gather(self._interruption.requested) if number]
            if heard:
                self._interruption.adopt(heard[0])
        return self._interruption.requested is not None

    def _stop(self, capture: Capture | None, evidence: float | None = None) -> None:
        if self._writer is not None and capture is not None:
            self._save(capture, evidence)
        raise Stopped

    def _save(self, capture: Capture, evidence: float | None = None) -> None:
        """Write, and remember whether that is where the call stands."""
        self._interruption.saved = self._write(capture, evidence)

    def _write(self, capture: Capture, evidence: float | None = None) -> bool:
        assert self._writer is not None
        number, self._number = self._number, self._number + 1
        return self._writer.write(number, capture, evidence)


def _copied(value: Any) -> Any:
    """A nested state that later steps do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value
