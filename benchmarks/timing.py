"""Processor time of jobs, interleaved in one process, so that only their ratios matter."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Cost", "Job", "measure"]


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


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats: seconds of processor time, and multiples of the unit."""

    seconds: float
    units: float


def measure(jobs: Sequence[Job], unit: Callable[[], object], repeats: int) -> dict[str, Cost]:
    """Cost of each job; every measurement is divided by one of ``unit`` right before it.

    Jobs take turns, ``repeats`` times, after a first round that fills caches and loads kernels.
    """
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    units: dict[str, list[float]] = {job.name: [] for job in jobs}
    for _ in range(repeats + 1):
        for job in jobs:
            one_unit = _seconds(unit, 1)
            seconds[job.name].append(_seconds(job.run, job.calls))
            units[job.name].append(seconds[job.name][-1] / one_unit)
    return {
        name: Cost(statistics.median(values[1:]), statistics.median(units[name][1:]))
        for name, values in seconds.items()
    }


def _seconds(run: Callable[[], object], calls: int) -> float:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls
