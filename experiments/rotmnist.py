"""Rotated MNIST with separable group convolutions (Lengyel & van Gemert 2021, table 1, figs. 2, 3).

The data are regenerated, not the published files: all 70,000 digits of MNIST, each turned once by
an angle uniform on the circle (bilinear, 28 x 28 pixels as they are), and from them disjoint random
parts for training and testing, 12,000 and 50,000 as in the original. Digits, angles, weights and
the order of the batches depend on the seed.

Tasks: ``rotmnist-1000``, so many training pictures as they are; ``rotmnist-1000+``, turned anew in
each epoch. Run with ``python -m experiments.rotmnist``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from experiments.group_presets import ROTMNIST, PlainSettings
from experiments.plain_training import PlainExperiment, PlainOptions, run_plain
from experiments.records import Cell
from experiments.redundancy import redundancy
from margeq.data import ImageTask, rotated_mnist
from margeq.data.batching import Augmentation
from margeq.data.geometry import rotated
from margeq.errors import ConfigError
from margeq.models import rotmnist_cnn

__all__ = ["EXPERIMENT", "kind_and_width", "n_pictures", "pooled", "turned"]


def load(cell: Cell, settings: PlainSettings, data_dir: str) -> ImageTask:
    """Standardised pictures; smaller training parts of one seed are contained in larger ones."""
    turned_digits = rotated_mnist(settings.size, data_dir or None, seed=cell.seed)
    number = n_pictures(cell.task)
    return pooled(turned_digits, number, settings.n_test, cell.seed).standardised()


def n_pictures(task: str) -> int:
    """Number of training pictures in the name of a task."""
    return int(task.removeprefix("rotmnist-").removesuffix("+"))


def pooled(task: ImageTask, n_train: int, n_test: int | None, seed: int) -> ImageTask:
    """Both parts put together and split anew, from the front and the end of one random order.

    Raises:
        ConfigError: if the parts would overlap.
    """
    images = torch.cat([task.train_images, task.test_images])
    labels = torch.cat([task.train_labels, task.test_labels])
    n_test = len(images) - n_train if n_test is None else n_test
    if n_train + n_test > len(images):
        raise ConfigError(
            f"n_train={n_train} and n_test={n_test} make more than {len(images)} pictures"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:n_train], order[len(order) - n_test :]
    return ImageTask(
        images[train], labels[train], images[test], labels[test], task.name, task.class_names
    )


def network(cell: Cell, settings: PlainSettings, task: ImageTask) -> nn.Module:
    """Seven convolutions of the kind and width in the cell's name."""
    kind, width = kind_and_width(cell.model)
    return rotmnist_cnn(
        kind,
        width,
        num_classes=task.n_classes,
        in_channels=task.train_images.shape[1],
        size=settings.size,
    )


def kind_and_width(model: str) -> tuple[str, int]:
    """``"gc-p4-w30"`` is ``("gc-p4", 30)``.

    Raises:
        ConfigError: if the name has no width.
    """
    found = re.fullmatch(r"(.+)-w(\d+)", model)
    if found is None:
        raise ConfigError(f"network {model!r}: name kind and width as in 'gc-p4-w30'")
    return found[1], int(found[2])


def augment(cell: Cell, settings: PlainSettings) -> Augmentation | None:
    """Another turn of every picture in every epoch, if the settings or the task say so."""
    return turned if settings.augment or cell.task.endswith("+") else None


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each standardised picture turned about its centre by an angle uniform on the circle."""
    angles = 360 * torch.rand(len(images), generator=generator)
    # corners have the value of the background, which is not 0 in standardised pictures
    background = images.amin()
    return rotated(images - background, angles) + background


def observe(model: nn.Module) -> dict[str, Any]:
    """Redundancy of full group convolutions over the group, fig. 2."""
    rows = redundancy(model)
    return {"first_component": rows} if rows else {}


EXPERIMENT = PlainExperiment("rotmnist", ROTMNIST, load, network, augment, observe)

if __name__ == "__main__":
    run_plain(EXPERIMENT, tyro.cli(PlainOptions, description=__doc__))
