"""Data of the experiments on partial equivariance, by name, with a validation part."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.partial_presets import PartialSettings
from margeq.data import (
    ImageTask,
    cifar10,
    cifar100,
    mnist,
    mnist6_180,
    mnist6_mirror,
    rotated_mnist,
)
from margeq.data.geometry import resized, rotated
from margeq.errors import ConfigError

__all__ = ["load_partial", "turned_sixes"]

_SIX = 6
_PLAIN = {
    "rotmnist": rotated_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def load_partial(name: str, settings: PartialSettings, seed: int, data_dir: str) -> ImageTask:
    """Pictures in [0, 1]: a training, a validation and a test part that share no picture.

    Raises:
        ConfigError: for an unknown name.
    """
    folder, size = data_dir or None, settings.size
    n_train, n_test = settings.n_train, settings.n_test
    if name in _PLAIN:
        both = None if n_train is None else n_train + settings.n_validation
        task = _PLAIN[name](size, folder, both, n_test, seed)
        return task.with_validation(settings.n_validation, seed)
    n_validation = settings.n_validation
    if name == "mnist6-mirror":
        return mnist6_mirror(size, folder, n_train, n_test, seed, n_validation=n_validation)
    if name in ("mnist6-180", "mnist6-half"):
        turns = "half" if name == "mnist6-half" else "circle"
        return mnist6_180(
            size, folder, n_train, n_test, seed, n_validation=n_validation, turns=turns
        )
    raise ConfigError(f"task {name!r} is unknown")


def turned_sixes(settings: PartialSettings, data_dir: str, angles: Tensor) -> Tensor:
    """MNIST's held-out sixes as they are written, turned: ``[angles, sixes, 1, size, size]``."""
    digits = mnist(28, data_dir or None)
    sixes = digits.test_images[digits.test_labels == _SIX]
    turned = [rotated(sixes, angle.expand(len(sixes))) for angle in angles]
    return torch.stack([resized(images, settings.size, True) for images in turned])
