"""How much of a symmetry pictures have (Romero & Lohit 2022, tables 2 to 5, figures 5 and 6).

Tasks: ``rotmnist``, digits turned by an angle uniform on the circle (made from MNIST, not the
published files); ``mnist``, upright ones; ``cifar10``; ``cifar100``, from files of one's own.

Run with ``python -m experiments.partial_benchmarks``.
"""

from __future__ import annotations

import tyro

from experiments.partial_presets import PARTIAL_BENCHMARKS
from experiments.partial_training import PartialOptions, run_partial

__all__ = ["main"]


def main(options: PartialOptions) -> None:
    """Run what has no record yet."""
    settings = PARTIAL_BENCHMARKS[options.preset]
    run_partial("partial_benchmarks", settings, options, lambda model, task, cell: {})


if __name__ == "__main__":
    main(tyro.cli(PartialOptions, description=__doc__))
