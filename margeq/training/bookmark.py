"""Where a pass over the training data stands, and how another process goes on from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from margeq.training.randomness import Randomness
from margeq.training.saving import Saving

__all__ = ["Bookmark"]


class Bookmark:
    """The place in the pass over the training data that is in progress, if one is.

    A pass is gone on with in one of two ways. A loader that says where it stands itself (see
    :meth:`Randomness.says_where_it_stands`) goes on by its own state. Any other of known order
    begins its pass again, from the random states of then, and the batches already used are left
    out; after that come the random states of the place.

    Args:
        loader: of the training data.
        randomness: of the run.
        is_possible: whether places are asked for, and can be gone on from, on all ranks.
        saving: asked after steps.
        capture: gives the state that it saves.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        randomness: Randomness,
        is_possible: bool,
        saving: Saving,
        capture: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._loader, self._randomness, self._saving = loader, randomness, saving
        self._capture = capture if is_possible else None
        self._by_itself = randomness.says_where_it_stands(loader)
        self.is_possible = is_possible
        self._began: Mapping[str, Any] | None = None
        self._now: Mapping[str, Any] | None = None
        self._inside = False
        self.batches, self.steps, self.seen, self._total = 0, 0, 0, None

    def total(self, device: torch.device) -> Tensor:
        """Sum of the losses so far."""
        return torch.zeros((), device=device) if self._total is None else self._total.to(device)

    def rest(self) -> Iterable[Any]:
        """The batches that are left of the pass, or those of a new one."""
        if self._now is not None:
            now, self._now = self._now, None
            rest = _Rest(self._loader, self._randomness, self._began or now, self._skipped, now)
            return _Guarded(rest, self._look_again)
        if self.is_possible and not self._by_itself:
            self._began = self._randomness.state_dict()
        return _Guarded(self._loader, self._look_again)

    def note(self, batches: int | None, seen: int, total: Tensor) -> None:
        """Note the place after a step.

        Args:
            batches: taken from the loader so far; ``None`` for no further one.
            seen: data of all steps so far, of all ranks.
            total: sum of their losses.
        """
        self._inside = True
        self.batches = self.batches if batches is None else batches
        self.steps, self.seen, self._total = self.steps + 1, seen, total

    def is_needed(self) -> bool:
        """Whether :meth:`save_or_stop` has something to do."""
        return self._saving.is_needed(self.is_possible)

    def save_or_stop(self) -> None:
        """Save the place that was noted, or stop there."""
        self._saving.after_step(self._capture)

    def _look_again(self) -> None:
        """A signal to a whole group of processes can end the workers of a loader first."""
        # without workers the batch that failed may have drawn random numbers
        if self._inside and self._saving.is_alone and getattr(self._loader, "num_workers", 0):
            if self.is_needed():
                self.save_or_stop()

    def close(self) -> None:
        """The pass is over."""
        self._began, self._inside = None, False
        self.batches, self.steps, self.seen, self._total = 0, 0, 0, None

    @property
    def _skipped(self) -> int:
        return 0 if self._by_itself else self.batches

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Random states of the moment, and the place in the pass, if any."""
        if not self._inside:
            return {"random": self._randomness.state_dict(), "position": None}
        position = {
            "batches": self.batches, "steps": self.steps, "seen": self.seen,
            "total": self._total, "began": self._began,
        }  # fmt: skip
        if self._began is None:
            return {"random": self._randomness.state_dict(), "position": position}
        # between passes alone the other loaders' states mean something
        random = {**self._randomness.numbers(), "loaders": self._began["loaders"]}
        return {"random": random, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with the next :meth:`rest`."""
        position = state.get("position")  # the first checkpoints had none
        if position is not None and position["began"] is not None:
            self._randomness.load_state_dict(position["began"])
        self._randomness.load_state_dict(state["random"])
        if position is not None:
            self.batches, self.steps = int(position["batches"]), int(position["steps"])
            self.seen = int(position["seen"])
            self._total, self._began = position["total"], position["began"]
            self._now = state["random"]


class _Rest:
    """What is left of a pass.

    Args:
        loader: of the pass.
        randomness: of the run.
        began: random states with which its iterator is made.
        skip: batches to leave out.
        now: random numbers of the place.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        randomness: Randomness,
        began: Mapping[str, Any],
        skip: int,
        now: Mapping[str, Any],
    ) -> None:
        self._loader, self._randomness = loader, randomness
        self._began, self._skip, self._now = began, skip, now

    def __iter__(self) -> Iterator[Any]:
        self._randomness.load_state_dict(self._began)
        iterator = iter(self._loader)
        deque(islice(iterator, self._skip), maxlen=0)
        self._randomness.load_numbers(self._now)
        return iterator


class _Guarded:
    """Batches of a loader; if it fails, somebody may know why.

    Args:
        loader: of a pass, or what is left of one.
        explain: called with an error, which it may replace.
    """

    def __init__(self, loader: Iterable[Any], explain: Callable[[], None]) -> None:
        self._loader, self._explain = loader, explain

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        try:
            yield from iterator
        except Exception:
            self._explain()
            raise
