"""``python -m benchmarks``: measure, print the tables and write them under ``docs/``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.curvature import captured_trace, curvature_jobs, hyper_jobs, plain_jobs
from benchmarks.factored import factored_rows
from benchmarks.memory import peak_memory
from benchmarks.networks import BATCH, TRAINING_EPOCHS, accuracy, digits, trained
from benchmarks.neighbours import neighbour_hyper_jobs, neighbour_jobs
from benchmarks.report import Report, Row, write
from benchmarks.timing import UNIT, measure


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
    heavy = [*plain_jobs(model, batches), *curvature_jobs(model, batches)]
    light = hyper_jobs(model, batches)
    if not quick:
        heavy += neighbour_jobs(model, batches)
        light += neighbour_hyper_jobs(model, batches)
    seconds = measure([*heavy, *light], repeats)
    peaks: dict[str, float] = {}
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pt"
            torch.save(model.state_dict(), weights)
            peaks = peak_memory(str(weights), heavy)
    unit = seconds[UNIT]
    rows = [
        Row(job.name, 1e3 * seconds[job.name], seconds[job.name] / unit, job.target, peaks.get(job.name))
        for job in (*heavy, *light)
    ]
    facts = {
        "repeats": repeats,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "data": len(batches.dataset),
        "batch": BATCH,
        "training_epochs": TRAINING_EPOCHS,
        "accuracy": accuracy(model, batches),
        "captured_trace": captured_trace(model, batches),
    }
    return Report(facts, rows, factored_rows(repeats))


if __name__ == "__main__":
    main()
