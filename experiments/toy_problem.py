"""Toy problem (section 6.1, table 1): the same digits, with and without a symmetry.

MNIST digits in a random quadrant of the canvas. *Which digit?* does not change with the quadrant;
*which digit and which quadrant?* cannot be answered by a network that ignores positions.
Run with ``python -m experiments.toy_problem``.
"""

from __future__ import annotations

from typing import cast

import tyro

from experiments.presets import TOY_PROBLEM, Settings
from experiments.records import Cell
from experiments.runs import Options, run_table
from margeq.data import ImageTask, quadrant_mnist
from margeq.data.image_sets import QuadrantQuestion

EXPERIMENT = "toy_problem"


def load(cell: Cell, settings: Settings, data_dir: str) -> ImageTask:
    """The cell's question, standardised; pictures and quadrants depend on the seed."""
    task = quadrant_mnist(
        cast(QuadrantQuestion, cell.task),
        settings.size,
        data_dir or None,
        n_train=settings.n_train,
        n_test=settings.n_test,
        seed=cell.seed,
        antialias=settings.antialias,
    )
    return task.standardised()


if __name__ == "__main__":
    run_table(EXPERIMENT, TOY_PROBLEM, load, tyro.cli(Options, description=__doc__))
