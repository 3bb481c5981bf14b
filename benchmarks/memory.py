"""Peak memory of one job in a fresh process: growth of its largest resident set size.

``python -m benchmarks.memory WEIGHTS JOB`` prints mebibytes. The process has imported everything,
loaded data and trained weights, and run one forward pass before the job starts; the job runs once.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from collections.abc import Sequence

import torch

from benchmarks.curvature import curvature_jobs, plain_jobs
from benchmarks.neighbours import neighbour_jobs
from benchmarks.networks import digits, lenet
from benchmarks.timing import Job

__all__ = ["peak_memory"]


def peak_memory(weights: str, jobs: Sequence[Job]) -> dict[str, float]:
    """Mebibytes of each job, each in a process of its own."""
    return {job.name: _in_fresh_process(weights, job.name) for job in jobs}


def _in_fresh_process(weights: str, job: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", weights, job]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _main(weights: str, name: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches, model = digits(), lenet()
    model.load_state_dict(torch.load(weights, weights_only=True))
    makers = (neighbour_jobs,) if name.startswith("laplace") else (plain_jobs, curvature_jobs)
    jobs = {job.name: job for make in makers for job in make(model, batches)}
    model(batches[0][0])
    before = _peak()
    jobs[name].run()
    print(max(0.0, _peak() - before))


def _peak() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    _main(*sys.argv[1:])
