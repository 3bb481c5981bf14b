"""Layer-wise equivariance on CIFAR-10 (section 6.2, tables 2 and 4).

Run with ``python -m experiments.cifar10``.
"""

from __future__ import annotations

import tyro

from experiments.presets import CIFAR10, Settings
from experiments.records import Cell
from experiments.runs import Options, run_table
from margeq import data

EXPERIMENT = "cifar10"


def load(cell: Cell, settings: Settings, data_dir: str) -> data.ImageTask:
    """Standardised pictures; which ones depends on the seed."""
    task = data.cifar10(
        settings.size,
        data_dir or None,
        n_train=settings.n_train,
        n_test=settings.n_test,
        seed=cell.seed,
    )
    return task.standardised()


if __name__ == "__main__":
    run_table(EXPERIMENT, CIFAR10, load, tyro.cli(Options, description=__doc__))
