"""Peak memory of one job in a fresh process: growth of its resident set, sampled by a thread.

``python -m benchmarks.memory WEIGHTS JOB`` prints mebibytes; with a number of data as a third
argument the job is one of the S-CONV LeNet's, on that many. The process has imported everything,
loaded data and trained weights, and run one forward pass before the job starts; the job runs once.
(The kernel's own high-water mark would not do: imports reach a higher one before the job starts.)
"""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from benchmarks.curvature import curvature_jobs, plain_jobs
from benchmarks.lengthscales import memory_jobs
from benchmarks.neighbours import neighbour_jobs
from benchmarks.networks import digits, lenet, sparse_lenet
from benchmarks.timing import Job

__all__ = ["MemoryRow", "Sampler", "gradient_memory", "peak_memory"]

_INTERVAL = 0.0005
"""Seconds between samples."""


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one job in mebibytes, by number of data."""

    job: str
    peak_mib: Mapping[int, float]


def peak_memory(weights: str, jobs: Sequence[Job]) -> dict[str, float]:
    """Mebibytes of each job, each in a process of its own."""
    return {job.name: _in_fresh_process(weights, job.name) for job in jobs}


def gradient_memory(weights: str, jobs: Sequence[str], n_data: Sequence[int]) -> list[MemoryRow]:
    """Mebibytes of the gradients inside the network, for each number of data."""
    return [
        MemoryRow(job, {n: _in_fresh_process(weights, job, str(n)) for n in n_data}) for job in jobs
    ]


def _in_fresh_process(weights: str, job: str, *n_data: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", weights, job, *n_data]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _main(weights: str, name: str, n_data: str | None = None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches = digits() if n_data is None else digits(int(n_data))
    model = lenet() if n_data is None else sparse_lenet()
    model.load_state_dict(torch.load(weights, weights_only=True))
    makers = (neighbour_jobs,) if name.startswith("laplace") else (plain_jobs, curvature_jobs)
    makers = makers if n_data is None else (memory_jobs,)
    jobs = {job.name: job for make in makers for job in make(model, batches)}
    model(batches[0][0])
    with Sampler() as sampler:
        jobs[name].run()
    print(sampler.growth)


class Sampler:
    """Largest resident set size while the context is open, in MiB above that at its start."""

    def __enter__(self) -> Self:
        self._start = self._largest = _resident_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> float:
        """MiB above the start."""
        return self._largest - self._start

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._largest = max(self._largest, _resident_mib())


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    _main(*sys.argv[1:])
