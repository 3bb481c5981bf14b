"""Signals that ask a call to stop: the step in progress is finished and saved, then the call ends.

Ctrl-C (SIGINT) becomes a ``KeyboardInterrupt``; SIGTERM and SIGUSR1, which a batch system sends
before it kills, become a ``SystemExit`` with code 143.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from margeq.errors import CheckpointWarning

__all__ = ["Interruption", "Stopped", "listening"]

_TERMINATED = 143
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(BaseException):
    """Leaves the training after a signal, from a place where nothing is half done."""


class Interruption:
    """Whether a call was asked to stop, and what it says when it ends.

    Args:
        directory: of checkpoints, if any.
        alone: whether no other ranks take part. They would wait for one that stops inside a pass.

    Attributes:
        listens: whether any signal is heard.
        saved: whether the state of the moment was saved.
        restore_best: puts the best state so far into the model; returns its evidence, ``None``
            without a state.
    """

    def __init__(self, directory: Path | None = None, alone: bool = True) -> None:
        self._directory, self._alone = directory, alone
        self._process, self._before = os.getpid(), {}
        self._signal: int | None = None
        self._aborted = self._ending = self._stepping = False
        self.listens = self.saved = False
        self.restore_best: Callable[[], float | None] = _no_state

    @property
    def requested(self) -> int | None:
        """Number of the signal that asked the call to stop; ``None`` to go on."""
        return self._signal

    @property
    def stops_in_passes(self) -> bool:
        """Whether a pass over the data can end in the middle."""
        return self.listens and self._alone

    @property
    def aborted(self) -> bool:
        """Whether a second SIGINT came: nothing is waited for."""
        return self._aborted

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: for a SIGINT after any other signal.
        """
        if os.getpid() != self._process:  # a child that was forked meanwhile is not our business
            signal.signal(number, self._before.get(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)
            return
        again = self._signal is not None and number == signal.SIGINT
        if again and not self._ending:
            self._aborted = True
            raise KeyboardInterrupt("training aborted by a second SIGINT; the model is as before")
        if not again:
            self._signal = number

    def handlers_before(self, handlers: Mapping[int, Any]) -> None:
        """Remember whom signals are for in processes that are forked from here."""
        self._before = dict(handlers)

    def adopt(self, number: int) -> None:
        """Stop for a signal that another rank has heard."""
        self._signal = self._signal or number

    def stop_if_requested(self) -> None:
        """Leave the training if it was asked to stop.

        Raises:
            Stopped: if so.
        """
        if self._signal is not None:
            raise Stopped

    def watched(self, batch_fn: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
        """A ``batch_fn`` that leaves passes over the data, other than steps, between batches."""
        if not self._alone:
            return batch_fn

        def read(raw: Any) -> Any:
            if not self._stepping:
                self.stop_if_requested()
            return raw if batch_fn is None else batch_fn(raw)

        return read

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Steps are taken while the context is open: they look at :attr:`requested` themselves."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def ending(self) -> BaseException:
        """The exception with which the call ends; the best state is in the model then."""
        self._ending = True  # a model that is half put back would be of no use
        evidence = self.restore_best()
        if self._signal != signal.SIGINT:
            return SystemExit(_TERMINATED)
        model = (
            "there was no hyperparameter update yet: the model is as before"
            if evidence is None
            else f"the model holds the best state so far, log marginal likelihood {evidence:.6g}"
        )
        return KeyboardInterrupt(f"training stopped by SIGINT; {self.place()}; {model}")

    def place(self) -> str:
        """Where the call can be gone on from."""
        if self._directory is None:
            return "nothing was saved (checkpoint_dir=... would have)"
        what = "saved in" if self.saved else "not saved here, but see the last checkpoint in"
        return f"{what} {self._directory}, from where the same call goes on"


def _no_state() -> float | None:
    return None


@contextmanager
def listening(directory: Path | None, alone: bool = True) -> Iterator[Interruption]:
    """Listen to signals while the context is open, in the main thread, where nobody else does.

    Args:
        directory: of checkpoints. Without one only SIGINT is heard.
        alone: whether no other ranks take part.

    Yields:
        What came.

    Raises:
        KeyboardInterrupt: after SIGINT.
        SystemExit: with code 143, after SIGTERM or SIGUSR1.
    """
    interruption = Interruption(directory, alone)
    before = _install(interruption, directory is not None)
    try:
        yield interruption
    except BaseException as error:
        if interruption.requested is None or interruption.aborted:
            raise
        # an error is often the signal's doing: it reaches the workers of loaders too
        cause = None if isinstance(error, Stopped) else error
        if cause is not None and interruption.requested != signal.SIGINT:
            # the traceback of a SystemExit is never shown
            what = f"stopped by a signal after {type(cause).__name__}: {cause}"
            warnings.warn(f"{what}; {interruption.place()}", CheckpointWarning, stacklevel=2)
        raise interruption.ending() from cause
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interruption.requested is not None:  # too late to stop anything
        raise interruption.ending()


def _install(interruption: Interruption, with_checkpoints: bool) -> dict[int, Any]:
    """The handlers of before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    names = ("SIGINT", "SIGTERM", "SIGUSR1") if with_checkpoints else ("SIGINT",)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows
    found = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in found.items() if handler in _DEFAULTS}
    interruption.handlers_before(before)
    for number in before:
        signal.signal(number, interruption.receive)
    interruption.listens = bool(before)
    return before
