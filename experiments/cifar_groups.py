"""CIFAR-10 with networks on p4 and p4m (Lengyel & van Gemert 2021, table 2; Cohen & Welling 2016).

Tasks: ``cifar10``, the pictures as they are; ``cifar10+``, mirrored and shifted by up to 4 pixels
anew in each epoch; ``cifar10-10000``, a fifth of them as they are.
Run with ``python -m experiments.cifar_groups``.
"""

from __future__ import annotations

from functools import partial

import tyro
from torch import nn

from experiments.group_presets import CIFAR_GROUPS, PlainSettings
from experiments.plain_training import PlainExperiment, PlainOptions, run_plain
from experiments.records import Cell
from margeq import data
from margeq.data.batching import Augmentation
from margeq.errors import ConfigError
from margeq.groups import P4, P4M, Z2
from margeq.models import all_cnn_c, resnet44

__all__ = ["EXPERIMENT"]

_NETWORKS = {
    "resnet44-z2": partial(resnet44, Z2),
    "resnet44-p4m": partial(resnet44, P4M),
    "resnet44-g-p4m": partial(resnet44, P4M, separability="g"),
    "resnet44-gc-p4m": partial(resnet44, P4M, separability="gc"),
    "allcnn-z2": partial(all_cnn_c, Z2),
    "allcnn-p4": partial(all_cnn_c, P4),
    "allcnn-p4m": partial(all_cnn_c, P4M),
}


def load(cell: Cell, settings: PlainSettings, data_dir: str) -> data.ImageTask:
    """Standardised pictures; which ones depends on the seed."""
    _, _, number = cell.task.partition("-")
    task = data.cifar10(
        settings.size,
        data_dir or None,
        n_train=int(number) if number else settings.n_train,
        n_test=settings.n_test,
        seed=cell.seed,
    )
    return task.standardised()


def network(cell: Cell, settings: PlainSettings, task: data.ImageTask) -> nn.Module:
    """The published widths, or those of the preset, which double with every stage.

    Raises:
        ConfigError: for an unknown network.
    """
    if cell.model not in _NETWORKS:
        raise ConfigError(f"network {cell.model!r}: use one of {', '.join(_NETWORKS)}")
    n_widths = 3 if cell.model.startswith("resnet44") else 2
    width = settings.width
    return _NETWORKS[cell.model](
        widths=None if width is None else tuple(width * 2**stage for stage in range(n_widths)),
        num_classes=task.n_classes,
        in_channels=task.train_images.shape[1],
    )


def augment(cell: Cell, settings: PlainSettings) -> Augmentation | None:
    """Mirrors and shifts for ``cifar10+``."""
    return data.random_shift_flip if settings.augment or cell.task.endswith("+") else None


EXPERIMENT = PlainExperiment("cifar_groups", CIFAR_GROUPS, load, network, augment)

if __name__ == "__main__":
    run_plain(EXPERIMENT, tyro.cli(PlainOptions, description=__doc__))
