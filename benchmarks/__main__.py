"""``python -m benchmarks``: measure, print the tables and write them under ``docs/``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.curvature import captured_trace, curvature_jobs, hyper_jobs, plain_jobs
from benchmarks.factored import factored_rows
from benchmarks.group_fourier import fourier_rows
from benchmarks.group_layers import group_layer_rows
from benchmarks.lengthscales import EPOCHS, N_DATA, lengthscale_jobs, memory_jobs
from benchmarks.memory import MemoryRow, gradient_memory, peak_memory
from benchmarks.neighbours import neighbour_hyper_jobs, neighbour_jobs
from benchmarks.networks import (
    BATCH,
    TRAINING_EPOCHS,
    accuracy,
    digits,
    sparse_lenet,
    trained,
)
from benchmarks.partial_layers import partial_rows
from benchmarks.report import Report, Row, write
from benchmarks.timing import Cost, Job, measure


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="margeq alone, median of 3, no memory; prints the tables and writes nothing",
    )
    quick = parser.parse_args().quick
    report = run(quick)
    print(report.as_markdown())
    if not quick:
        write(report)


def run(quick: bool) -> Report:
    """Measure; ``quick`` leaves out the neighbours and the memory."""
    torch.set_num_threads(1)
    repeats = 3 if quick else 5
    batches = digits()
    model = trained(batches)
    plain = plain_jobs(model, batches)
    heavy = [*plain, *curvature_jobs(model, batches)]
    light = hyper_jobs(model, batches)
    if not quick:
        heavy += neighbour_jobs(model, batches)
        light += neighbour_hyper_jobs(model, batches)
    costs = measure([*heavy, *light], plain[0].run, repeats)
    peaks = {} if quick else _peaks(model, heavy)
    rows = _rows([*heavy, *light], costs, peaks)
    lengthscales, memory = _lengthscales(quick, repeats)
    facts = {
        "repeats": repeats,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "data": len(batches.dataset),
        "batch": BATCH,
        "training_epochs": TRAINING_EPOCHS,
        "accuracy": accuracy(model, batches),
        "captured_trace": captured_trace(model, batches),
        "lengthscale_data": N_DATA,
    }
    factored, fourier = factored_rows(repeats), fourier_rows(repeats)
    layers, parts = group_layer_rows(repeats), partial_rows(repeats)
    return Report(facts, rows, factored, lengthscales, memory, fourier, layers, parts)


def _rows(jobs: Sequence[Job], costs: Mapping[str, Cost], peaks: Mapping[str, float]) -> list[Row]:
    return [
        Row(
            job.name,
            1e3 * costs[job.name].seconds,
            costs[job.name].units,
            job.target,
            peaks.get(job.name),
        )
        for job in jobs
    ]


def _lengthscales(quick: bool, repeats: int) -> tuple[list[Row], list[MemoryRow]]:
    """The S-CONV LeNet: cost of each gradient, and memory for few and for many data."""
    batches = digits(N_DATA)
    model = trained(batches, sparse_lenet, EPOCHS)
    jobs = lengthscale_jobs(model, batches)
    rows = _rows(jobs, measure(jobs, jobs[0].run, repeats), {})
    if quick:
        return rows, []
    names = [job.name for job in memory_jobs(model, batches)]
    with tempfile.TemporaryDirectory() as folder:
        weights = _saved(model, folder)
        return rows, gradient_memory(weights, names, (500, 5000))


def _saved(model: nn.Module, folder: str) -> str:
    weights = Path(folder) / "weights.pt"
    torch.save(model.state_dict(), weights)
    return str(weights)


def _peaks(model: nn.Module, jobs: Sequence[Job]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return peak_memory(_saved(model, folder), jobs)


if __name__ == "__main__":
    main()
