"""Processor time of jobs, interleaved in one process, so that only their ratios matter."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["UNIT", "Job", "measure"]

UNIT = "plain epoch"


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        name: its row in the table.
        run: does the work once.
        target: largest allowed multiple of one plain epoch, if there is one.
        calls: calls per measurement, for jobs below the resolution of the clock.
    """

    name: str
    run: Callable[[], object]
    target: float | None = None
    calls: int = 1


def measure(jobs: Sequence[Job], repeats: int) -> Mapping[str, float]:
    """Median seconds of processor time of each job, over rounds in which each runs once.

    The first round is not counted: it fills caches and loads kernels.
    """
    times: dict[str, list[float]] = {job.name: [] for job in jobs}
    for _ in range(repeats + 1):
        for job in jobs:
            times[job.name].append(_seconds(job))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _seconds(job: Job) -> float:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        for _ in range(job.calls):
            job.run()
        return (time.process_time() - start) / job.calls
