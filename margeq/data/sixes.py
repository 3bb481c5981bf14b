"""MNIST6: questions about a single digit that a network with too much symmetry cannot answer.

A six that is turned upside down, or mirrored, is still ink in the same shape: a network that
averages over all turns, or both mirror images, sees no difference. It takes part of the symmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from margeq.data.formats import Source
from margeq.data.geometry import rotated
from margeq.data.recipes import Recipe, render_task
from margeq.data.sources import Folder, mnist_source
from margeq.data.tasks import ImageTask
from margeq.errors import ConfigError, DataError

__all__ = ["mnist6_180", "mnist6_mirror"]

_SIX = 6
_N_VALIDATION = 918  # leaves 5,000 of MNIST's 5,918 training sixes


def _is_upright(labels: Tensor, angles: Tensor) -> Tensor:
    return ((angles < 90) | (angles > 270)).to(labels)


def _mirrored(images: Tensor, draws: Tensor) -> Tensor:
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(3), images)


_ANGLES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "circle": lambda n, generator: 360 * torch.rand(n, generator=generator),
    "half": lambda n, generator: 180.0 * torch.randint(2, (n,), generator=generator),
}
_TURNED_SIX = {
    turns: Recipe(draw, rotated, _is_upright, ("upside down", "upright"))
    for turns, draw in _ANGLES.items()
}
_MIRRORED_SIX = Recipe(
    lambda n, generator: torch.rand(n, generator=generator),
    _mirrored, lambda labels, draws: (draws < 0.5).to(labels), ("plain", "mirrored"),
)  # fmt: skip


def mnist6_180(
    size: int = 28,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    n_validation: int | None = _N_VALIDATION,
    turns: Literal["circle", "half"] = "circle",
    download: bool = True,
) -> ImageTask:
    """MNIST's sixes, each turned once about its centre: upright or not?

    The answer is 1 (``"upright"``) for turns of less than 90 degrees to either side, else 0. A
    network that is invariant to all turns cannot know it; one that is invariant to none wastes
    what turned sixes have in common.

    Sixes are written with different slants, so that turns near 90 degrees can only be guessed: over
    the whole circle no network answers all of them.

    Args:
        size: side of the pictures.
        data_dir: see :func:`margeq.data.mnist`.
        n_train: number of training sixes, a random choice; None takes all that validation leaves.
        n_test: number of held-out sixes, all from MNIST's test part; None takes all 958.
        seed: seed of the choices and of the angles; the global random state is not used.
        n_validation: number of sixes for choices between runs, taken from MNIST's 5,918 training
            sixes; None for no validation part.
        turns: ``"circle"``, angles uniform on it; or ``"half"``, 0 or 180 degrees.
        download: see :func:`margeq.data.mnist`.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many sixes, or for other turns.
        DataError: if MNIST is not found.

    Reference:
        Romero & Lohit (2022), section 6 (MNIST6-180).
    """
    if turns not in _TURNED_SIX:
        raise ConfigError(f"turns={turns!r}: use one of {tuple(_TURNED_SIX)}")
    numbers = n_train, n_test, n_validation
    return _task("mnist6-180", _TURNED_SIX[turns], numbers, size, seed, data_dir, download)


def mnist6_mirror(
    size: int = 28,
    data_dir: Folder | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    *,
    n_validation: int | None = _N_VALIDATION,
    download: bool = True,
) -> ImageTask:
    """MNIST's sixes, each mirrored left to right with probability ½: mirrored or not?

    The answer is 1 (``"mirrored"``) or 0 (``"plain"``). A network that is invariant to
    reflections cannot know it.

    Args:
        size: see :func:`mnist6_180`.
        data_dir: see :func:`margeq.data.mnist`.
        n_train: see :func:`mnist6_180`.
        n_test: see :func:`mnist6_180`.
        seed: seed of the choices and of the reflections; the global random state is not used.
        n_validation: see :func:`mnist6_180`.
        download: see :func:`margeq.data.mnist`.

    Returns:
        The pictures ``[n, 1, size, size]`` in [0, 1], and the labels.

    Raises:
        ConfigError: if there are not that many sixes.
        DataError: if MNIST is not found.

    Reference:
        Romero & Lohit (2022), section 6 (MNIST6-M).
    """
    numbers = n_train, n_test, n_validation
    return _task("mnist6-mirror", _MIRRORED_SIX, numbers, size, seed, data_dir, download)


def _task(
    name: str,
    recipe: Recipe,
    numbers: tuple[int | None, int | None, int | None],
    size: int,
    seed: int,
    data_dir: Folder | None,
    download: bool,
) -> ImageTask:
    parts = (
        _sixes(mnist_source("train", data_dir, download)),
        _sixes(mnist_source("test", data_dir, download)),
    )
    n_train, n_test, n_validation = numbers
    task = render_task(name, parts, recipe, (None, n_test), size, seed)
    # first, so that the number of training sixes does not decide which ones validate
    if n_validation is not None:
        task = task.with_validation(n_validation, seed)
    return task if n_train is None else task.subset(n_train, seed=seed)


def _sixes(source: Source) -> Source:
    """The sixes of a source alone."""
    places = (source.labels == _SIX).nonzero()[:, 0]
    if not len(places):
        raise DataError(f"there is no six among {len(source)} digits; get the files of MNIST again")
    return Source(
        source.labels[places], lambda chosen: source.read(places[chosen]), source.class_names
    )
