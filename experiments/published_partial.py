"""Numbers of Romero & Lohit 2022, for the tables: test accuracy in per cent."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PUBLISHED", "PUBLISHED_TASKS", "PUBLISHED_TOY"]

PUBLISHED_TOY: Mapping[str, float] = {"full": 50.0, "partial": 100.0}
"""Table 1, the same for both questions and all groups."""

PUBLISHED_TASKS = ("rotmnist", "cifar10", "cifar100")

PUBLISHED: Mapping[str, tuple[float, float, float]] = {
    "mc-t2-se2-1": (97.23, 83.11, 47.99),
    "mc-full-se2-4": (99.10, 83.73, 52.35),
    "mc-partial-se2-4": (99.13, 86.15, 53.91),
    "mc-full-se2-8": (99.17, 86.08, 55.55),
    "mc-partial-se2-8": (99.23, 88.59, 57.26),
    "mc-full-se2-16": (99.24, 86.59, 51.55),
    "mc-partial-se2-16": (99.18, 89.11, 57.31),
    "mc-full-e2-8": (98.14, 85.55, 54.29),
    "mc-partial-e2-8": (97.78, 89.00, 55.22),
    "mc-full-e2-16": (98.35, 88.95, 57.78),
    "mc-partial-e2-16": (98.58, 90.12, 61.46),
    "mc-augmented-se2-8": (99.17, 82.38, 52.98),
    "mc-augmented-se2-16": (99.25, 82.53, 51.47),
    "mc-augmented-e2-8": (99.12, 84.29, 52.59),
    "mc-augmented-e2-16": (99.18, 83.54, 54.76),
    "mc-t2head-se2-16": (99.04, 82.76, 52.51),
    "mc-mlp-se2-16": (99.00, 86.25, 56.29),
    "mc-t2head-e2-16": (97.98, 86.68, 57.61),
    "mc-mlp-e2-16": (99.02, 87.43, 58.87),
    "cnn13-t2-se2-1": (96.90, 91.21, 67.14),
    "cnn13-full-se2-2": (98.70, 85.51, 62.06),
    "cnn13-partial-se2-2": (98.94, 87.78, 65.79),
    "cnn13-augmented-se2-2": (98.72, 92.48, 66.72),
    "cnn13-full-se2-4": (98.43, 89.73, 65.97),
    "cnn13-partial-se2-4": (98.94, 91.66, 68.99),
    "cnn13-augmented-se2-4": (98.78, 92.28, 69.83),
    "cnn13-full-se2-8": (98.54, 90.55, 67.70),
    "cnn13-partial-se2-8": (99.28, 89.96, 69.66),
    "cnn13-augmented-se2-8": (98.77, 91.99, 70.80),
}
"""Table 3, of tables 2 and 4 the rows that table 3 lacks, and table 5, by the names of
:mod:`experiments.partial_networks`. Tables 2 and 4 print other figures for some cells of table 3;
augmentation turns copies of the input and averages over as many of them."""
