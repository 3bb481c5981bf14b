"""What checkpoints cost a training: ``python -m benchmarks.checkpoints``.

The corner question of the demonstration, with and without checkpoints at their default frequency,
in turn; processor and wall time of one thread, and the ratios of their medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from margeq.errors import ConvergenceWarning
from margeq.optimize import optimize_marglik
from margeq.runs.questions import question_task

__all__ = ["main", "train"]


def train(directory: Path | None, n_epochs: int) -> tuple[float, float]:
    """Seconds of one training: of the processor, and on the wall."""
    task = question_task("corner", 0)
    begin = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        optimize_marglik(
            task.model,
            task.train_loader,
            marglik_loader=task.marglik_loader,
            n_epochs=n_epochs,
            n_epochs_burnin=min(6, n_epochs),
            marglik_frequency=3,
            optimizer_kwargs={"lr": 0.01},
            restarts=["symmetric"],
            seed=0,
            progress="none",
            checkpoint_dir=directory,
        )
    return time.process_time() - begin[0], time.perf_counter() - begin[1]


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(None, 3)  # loads what is slow to import
    plain, saved = [], []
    for _ in range(arguments.repeats):
        plain.append(train(None, arguments.epochs))
        with tempfile.TemporaryDirectory() as folder:
            saved.append(train(Path(folder), arguments.epochs))
    print(f"{arguments.epochs} epochs, seconds, median of {arguments.repeats} (least to most)\n")
    print("| time | without | with checkpoints | more |\n|---|---|---|---|")
    for which, name in enumerate(("processor", "wall")):
        columns = [[times[which] for times in runs] for runs in (plain, saved)]
        without, with_them = (statistics.median(column) for column in columns)
        cells = [
            f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in columns
        ]
        print(f"| {name} | {' | '.join(cells)} | {with_them / without - 1:+.1%} |")


if __name__ == "__main__":
    main()
