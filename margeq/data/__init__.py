"""Data sets: questions about pictures whose symmetry is known, and loaders for them."""

from __future__ import annotations

from margeq.data.augment import random_shift_flip
from margeq.data.batching import TensorLoader
from margeq.data.digits import load_digits, place_digits
from margeq.data.image_sets import (
    cifar10,
    cifar100,
    mnist,
    quadrant_mnist,
    rotated_cifar10,
    rotated_mnist,
    translated_mnist,
)
from margeq.data.sixes import mnist6_180, mnist6_mirror
from margeq.data.sources import load_image_folder
from margeq.data.tasks import ImageTask

__all__ = [
    "ImageTask",
    "TensorLoader",
    "cifar10",
    "cifar100",
    "load_digits",
    "load_image_folder",
    "mnist",
    "mnist6_180",
    "mnist6_mirror",
    "place_digits",
    "quadrant_mnist",
    "random_shift_flip",
    "rotated_cifar10",
    "rotated_mnist",
    "translated_mnist",
]
