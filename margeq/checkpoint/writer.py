"""When checkpoints are written, and what happens if they cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from margeq.checkpoint.store import CheckpointStore
from margeq.errors import CheckpointError, CheckpointWarning, ConfigError

__all__ = ["CheckpointWriter", "Checkpoints"]

_TOLERATED_FAILURES = 2


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go, and how much time they may take.

    Attributes:
        directory: of one run.
        max_overhead: share of the running time that writing may take; a checkpoint is left out
            until enough time has passed since the one before. ``float("inf")`` leaves none out.
        keep: how many of the newest are kept, besides the best by evidence.
        longest_gap: seconds after which a checkpoint is written also inside an epoch.
            ``float("inf")``: only between epochs.

    Raises:
        ConfigError: for a share that is not positive, ``keep`` below 1, or a negative gap.
    """

    directory: str | Path
    max_overhead: float = 0.02
    keep: int = 2
    longest_gap: float = 600.0

    def __post_init__(self) -> None:
        if not (isinstance(self.max_overhead, (int, float)) and self.max_overhead > 0):
            raise ConfigError(f"max_overhead={self.max_overhead!r} must be a positive number")
        if type(self.keep) is not int or self.keep < 1:
            raise ConfigError(f"keep={self.keep!r} must be an integer of at least 1")
        if not (isinstance(self.longest_gap, (int, float)) and self.longest_gap >= 0):
            raise ConfigError(f"longest_gap={self.longest_gap!r} must be a number of seconds")


class CheckpointWriter:
    """Writes checkpoints now and then; a full disk does not end the training at once.

    Args:
        store: where to.
        max_overhead: as in :class:`Checkpoints`.
        environment: plain values to note in every manifest.
        longest_gap: as in :class:`Checkpoints`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        max_overhead: float,
        environment: Mapping[str, Any],
        longest_gap: float = float("inf"),
    ) -> None:
        self._store, self._max_overhead, self._longest_gap = store, max_overhead, longest_gap
        self._began = time.perf_counter()
        self._environment = dict(environment)
        self._failures = 0
        self._pause, self._ended = 0.0, -float("inf")

    def is_due(self) -> bool:
        """Whether another checkpoint stays within the share of time."""
        return time.perf_counter() - self._ended >= self._pause

    def is_overdue(self) -> bool:
        """Whether, besides, the last one, or the beginning, is longer ago than the longest gap."""
        since = time.perf_counter() - max(self._began, self._ended)
        return since >= self._longest_gap and since >= self._pause

    def write(
        self, step: int, capture: Callable[[], Mapping[str, Any]], score: float | None = None
    ) -> bool:
        """Capture the state and write it.

        Args:
            step: number of the checkpoint.
            capture: gives the state.
            score: by which the best one is kept.

        Returns:
            Whether it was written.

        Raises:
            CheckpointError: for a state that cannot be stored, or after the third failure in a row.
        """
        began = time.perf_counter()
        try:
            self._store.save(step, capture(), score=score, environment=self._environment)
            self._failures = 0
            return True
        except OSError as error:
            self._failures += 1
            self._report(step, error)
            return False
        finally:
            self._ended = time.perf_counter()
            self._pause = (self._ended - began) / self._max_overhead

    def _report(self, step: int, error: OSError) -> None:
        place, reason = self._store.directory, error.strerror or error
        if self._failures > _TOLERATED_FAILURES:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be written to {place}: {reason}; "
                f"make room or choose another checkpoint_dir, and resume from the last one there"
            ) from error
        warnings.warn(
            f"checkpoint {step} was not written to {place}: {reason}; training goes on, the "
            f"checkpoint before it is intact",
            CheckpointWarning,
            stacklevel=3,
        )
