"""Questions about MNIST and CIFAR that need different symmetries."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from margeq.data.formats import Source
from margeq.data.geometry import in_quadrants, shifted
from margeq.data.recipes import PLAIN, TURNED, Recipe, render_task
from margeq.data.sources import Folder, LabelKind, cifar10_source, cifar100_source, mnist_source
from margeq.data.tasks import ImageTask
from margeq.errors import ConfigError

__all__ = [
    "QuadrantQuestion",
    "cifar10",
    "cifar100",
    "mnist",
    "quadrant_mnist",
    "rotated_cifar10",
    "rotated_mnist",
    "translated_mnist",
]

QuadrantQuestion = Literal["digit", "digit+quadrant"]

_MNIST_SHIFT = 8.0  # pixels of 28
_QUADRANTS = ("upper left", "upper right", "lower left", "lower right")


_SHIFTED = Recipe(
    lambda n, generator: (2 * torch.rand(n, 2, generator=generator) - 1) * _MNIST_SHIFT, shifted
)
_IN_QUADRANTS = Recipe(
    lambda n, generator: torch.randint(4, (n,), generator=generator), in_quadrants
)
_QUESTIONS = {
    "digit": _IN_QUADRANTS,
    "digit+quadrant": replace(
        _IN_QUADRANTS,
        relabel=lambda labels, quadrants: labels + 10 * quadrants,
        class_names=tuple(f"{d} {quadrant}" for quadrant in _QUADRANTS for d in range(10)),
    ),
}


def quadrant_mnist(
    question: QuadrantQuestion = "digit",
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    antialias: bool = True,
    download: bool = True,
) -> ImageTask:
    """MNIST digits in a random quadrant of a canvas of 56 × 56 pixels, resized to ``size``.

    ``"digit"`` has 10 classes, and the answer does not change with the quadrant.
    ``"digit+quadrant"`` has 40, label = digit + 10 quadrant (0 upper left, 1 upper right, 2 lower
    left, 3 lower right), and needs the position. Both show the same pictures.

    Args:
        question: ``"digit"`` or ``"digit+quadrant"``.
        size: side of the pictures.
        data_dir: see :func:`margeq.data.mnist`.
        n_train: number of training digits, a random choice; None takes all 60,000.
        n_test: number of held-out digits, all from MNIST's test part; None takes all 10,000.
        seed: seed of the choice and of the quadrants; the global random state is not used.
        antialias: whether a pixel averages over all that it covers. Without it every pixel reads
            four pixels of the canvas: at size 32 strokes get jagged, at 16 they get lost. The
            published experiments used 32 without.
        download: see :func:`margeq.data.mnist`.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if the question is unknown, or there are not that many digits.
        DataError: if MNIST is not found.

    Reference:
        van der Ouderaa et al. (2023), section 5.1.
    """
    if question not in _QUESTIONS:
        raise ConfigError(f"unknown question {question!r}; choose one of {tuple(_QUESTIONS)}")
    recipe = replace(_QUESTIONS[question], antialias=antialias)
    parts = _mnist_parts(data_dir, download)
    return render_task(f"quadrant-mnist {question}", parts, recipe, (n_train, n_test), size, seed)


def mnist(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    download: bool = True,
) -> ImageTask:
    """MNIST, resized from 28 × 28 pixels to ``size``.

    Args:
        size: side of the pictures; bilinear interpolation, with averaging where they shrink.
        data_dir: folder with MNIST's files, also gzipped, in it or in ``MNIST/raw``. None: the
            environment variable ``MARGEQ_DATA``, else the cache ``~/.cache/margeq``.
        n_train: number of training digits, a random choice; None takes all 60,000.
        n_test: number of held-out digits; None takes all 10,000.
        seed: seed of the choice; the global random state is not used.
        download: whether missing files may be downloaded, with a check of their digests, into the
            cache; a folder that was named is never written to.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many digits.
        DataError: if MNIST is not found.

    Reference:
        LeCun, Bottou, Bengio and Haffner (1998).
    """
    parts = _mnist_parts(data_dir, download)
    return render_task("mnist", parts, PLAIN, (n_train, n_test), size, seed)


def translated_mnist(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    download: bool = True,
) -> ImageTask:
    """MNIST, each digit shifted once by up to 8 of its 28 pixels on each axis.

    The shifts are uniform on ±8/14 of half a side, with fractions of a pixel (bilinear); at a
    size of 32 that is ±9.1 pixels. A digit may leave the picture by up to 4 of its 20 pixels.

    Args:
        size: side of the pictures.
        data_dir: see :func:`mnist`.
        n_train: see :func:`mnist`.
        n_test: see :func:`mnist`.
        seed: seed of the choice and of the shifts; the global random state is not used.
        download: see :func:`mnist`.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many digits.
        DataError: if MNIST is not found.

    Reference:
        van der Ouderaa et al. (2023), appendix F.5.
    """
    parts = _mnist_parts(data_dir, download)
    return render_task("translated-mnist", parts, _SHIFTED, (n_train, n_test), size, seed)


def rotated_mnist(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    download: bool = True,
) -> ImageTask:
    """MNIST, each digit turned once about its centre by an angle uniform on the circle.

    Args:
        size: side of the pictures.
        data_dir: see :func:`mnist`.
        n_train: see :func:`mnist`.
        n_test: see :func:`mnist`.
        seed: seed of the choice and of the angles; the global random state is not used.
        download: see :func:`mnist`.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many digits.
        DataError: if MNIST is not found.

    Reference:
        van der Ouderaa et al. (2023), appendix F.5.
    """
    parts = _mnist_parts(data_dir, download)
    return render_task("rotated-mnist", parts, TURNED, (n_train, n_test), size, seed)


def cifar10(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    download: bool = True,
) -> ImageTask:
    """CIFAR-10 colour pictures.

    Args:
        size: side of the pictures; 32 leaves them as they are.
        data_dir: folder with ``cifar-10-batches-bin``, ``cifar-10-batches-py`` or the pictures
            ``train/<class>/*.png`` and ``test/<class>/*.png`` (or jpg), these also below
            ``cifar10`` or ``cifar10-jpeg``. None: the environment variable ``MARGEQ_DATA``, else
            the cache ``~/.cache/margeq``.
        n_train: number of training pictures, a random choice; None takes all 50,000.
        n_test: number of held-out pictures; None takes all 10,000.
        seed: seed of the choice; the global random state is not used.
        download: see :func:`mnist`.

    Returns:
        The pictures ``[n, 3, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many pictures.
        DataError: if CIFAR-10 is not found.

    Reference:
        Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    parts = _cifar_parts(data_dir, download)
    return render_task("cifar10", parts, PLAIN, (n_train, n_test), size, seed)


def rotated_cifar10(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    download: bool = True,
) -> ImageTask:
    """CIFAR-10, each picture turned once about its centre by an angle uniform on the circle.

    Args:
        size: side of the pictures.
        data_dir: see :func:`cifar10`.
        n_train: see :func:`cifar10`.
        n_test: see :func:`cifar10`.
        seed: seed of the choice and of the angles; the global random state is not used.
        download: see :func:`mnist`.

    Returns:
        The pictures ``[n, 3, size, size]`` in [0, 1], black in the corners, and the labels.

    Raises:
        ConfigError: if there are not that many pictures.
        DataError: if CIFAR-10 is not found.

    Reference:
        van der Ouderaa et al. (2023), appendix F.5.
    """
    parts = _cifar_parts(data_dir, download)
    return render_task("rotated-cifar10", parts, TURNED, (n_train, n_test), size, seed)


def cifar100(
    size: int = 32,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    labels: LabelKind = "fine",
) -> ImageTask:
    """CIFAR-100 colour pictures, from files of one's own.

    Args:
        size: side of the pictures; 32 leaves them as they are.
        data_dir: folder with ``train.bin`` and ``test.bin`` of the binary version, in it or in
            ``cifar-100-binary``. None: the environment variable ``MARGEQ_DATA``, else
            ``~/.cache/margeq``. Nothing is downloaded.
        n_train: number of training pictures, a random choice; None takes all 50,000.
        n_test: number of held-out pictures; None takes all 10,000.
        seed: seed of the choice; the global random state is not used.
        labels: ``"fine"`` (100 classes) or ``"coarse"`` (20).

    Returns:
        The pictures ``[n, 3, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: for unknown labels, or if there are not that many pictures.
        DataError: if CIFAR-100 is not found.

    Reference:
        Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    parts = cifar100_source("train", labels, data_dir), cifar100_source("test", labels, data_dir)
    return render_task(f"cifar100 {labels}", parts, PLAIN, (n_train, n_test), size, seed)


def _mnist_parts(data_dir: Folder | None, download: bool) -> tuple[Source, Source]:
    return mnist_source("train", data_dir, download), mnist_source("test", data_dir, download)


def _cifar_parts(data_dir: Folder | None, download: bool) -> tuple[Source, Source]:
    return cifar10_source("train", data_dir, download), cifar10_source("test", data_dir, download)
