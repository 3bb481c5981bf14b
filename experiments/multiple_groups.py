"""Choosing between shifts, and shifts with turns, layer by layer (appendix B, table 3).

The mixer F-FC+CONV+GCONV on the rotation group p4, for pictures as they are, shifted or turned.
Run with ``python -m experiments.multiple_groups``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import tyro

from experiments.presets import MULTIPLE_GROUPS, Settings
from experiments.records import Cell
from experiments.runs import Options, run_table
from margeq import data
from margeq.data import ImageTask
from margeq.errors import ConfigError

__all__ = ["EXPERIMENT", "load", "run"]

EXPERIMENT = "multiple_groups"

_TASKS: Mapping[str, Callable[..., ImageTask]] = {
    "mnist": data.mnist,
    "translated-mnist": data.translated_mnist,
    "rotated-mnist": data.rotated_mnist,
    "cifar10": data.cifar10,
    "rotated-cifar10": data.rotated_cifar10,
}


def load(cell: Cell, settings: Settings, data_dir: str) -> ImageTask:
    """Standardised pictures; which ones, and how they are changed, depends on the seed."""
    task = _TASKS[cell.task](
        settings.size,
        data_dir or None,
        n_train=settings.n_train,
        n_test=settings.n_test,
        seed=cell.seed,
    )
    return task.standardised()


def run(options: Options) -> None:
    """All digits, then all colour pictures, as far as they are asked for.

    Raises:
        ConfigError: for a data set that is in neither.
    """
    unknown = sorted(set(options.tasks) - set(_TASKS))
    if unknown:
        raise ConfigError(f"tasks={unknown}: use any of {', '.join(_TASKS)}")
    for presets in MULTIPLE_GROUPS:
        known = presets[options.preset].tasks
        tasks = tuple(task for task in options.tasks or known if task in known)
        if tasks:
            run_table(EXPERIMENT, presets, load, replace(options, tasks=tasks))


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
