"""The 1,797 UCI digits, and two questions about the same pictures that need different symmetries.

*Which digit?* is put at every position of a canvas: the answer does not change with the position.
*Which corner?* is the position: a network that ignores positions cannot answer it.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from margeq.data.tasks import ImageTask
from margeq.errors import ConfigError

__all__ = ["Question", "load_digits", "place_digits"]

Question = Literal["digit", "corner"]

_NAMES = {
    "digit": tuple("0123456789"),
    "corner": ("upper left", "upper right", "lower left", "lower right"),
}
_SIDE = 8  # pixels of a digit
_LARGEST_GREY = 16
_TRAIN_SHARE = 0.8
_POSES = 1_000_003


def load_digits() -> tuple[Tensor, Tensor]:
    """The embedded handwritten digits, with the values of scikit-learn's ``load_digits``.

    Returns:
        Images ``[1797, 8, 8]``, float32 grey values in [0, 1], and labels ``[1797]``, int64.

    Reference:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
        Learning Repository, doi:10.24432/C50P49. Licence: ``LICENSE-digits.txt``.

    Examples:
        >>> images, labels = load_digits()
        >>> tuple(images.shape), labels[:5].tolist()
        ((1797, 8, 8), [0, 1, 2, 3, 4])
    """
    path = files("margeq.data") / "digits.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"])
        labels = torch.from_numpy(archive["labels"])
    return images.to(torch.float32) / _LARGEST_GREY, labels.to(torch.int64)


def place_digits(
    question: Question, *, canvas: int = 16, copies: int = 2, turned: bool = False, seed: int = 0
) -> ImageTask:
    """Put the digits on an empty canvas and ask one of two questions about them.

    ``"digit"``: each digit lies at uniformly random offsets, its label is the digit.
    ``"corner"``: each digit lies in a random corner, its label is the corner (0 upper left,
    1 upper right, 2 lower left, 3 lower right). Both questions share the split into 1,437
    training and 360 held-out digits, which depends on ``seed`` alone.

    Args:
        question: ``"digit"`` or ``"corner"``.
        canvas: side of the canvas in pixels; 16 leaves 9 × 9 offsets.
        copies: independent placements of each training digit for ``"digit"``, one block of all
            digits after the other; ``"corner"`` and the held-out digits are placed once.
        turned: whether each placement turns its digit by a random multiple of 90 degrees; the
            places are the same.
        seed: seed of the split and of the offsets; the global random state is not used.

    Returns:
        The pictures and labels of the question.

    Raises:
        ConfigError: if the question is unknown, the canvas leaves no room, or ``copies`` is not
            positive.

    Reference:
        Alpaydin and Kaynak (1998), doi:10.24432/C50P49.

    Examples:
        >>> task = place_digits("corner")
        >>> tuple(task.train_images.shape), sorted(set(task.test_labels.tolist()))
        ((1437, 1, 16, 16), [0, 1, 2, 3])
    """
    _check_arguments(question, canvas, copies)
    images, labels = load_digits()
    generator = torch.Generator().manual_seed(seed)
    poses = torch.Generator().manual_seed(seed + _POSES)  # a stream apart: the places stay
    train, test = _split(len(images), generator)
    if question == "digit":
        train = train.repeat(copies)

    def pictures(indices: Tensor) -> tuple[Tensor, Tensor]:
        offsets, corners = _draw_offsets(question, len(indices), canvas - _SIDE, generator)
        answers = labels[indices] if question == "digit" else corners
        digits = _turn(images[indices], poses) if turned else images[indices]
        return _place(digits, offsets, canvas), answers

    return ImageTask(*pictures(train), *pictures(test), name=question, class_names=_NAMES[question])


def _check_arguments(question: str, canvas: int, copies: int) -> None:
    if question not in get_args(Question):
        raise ConfigError(f"unknown question {question!r}; choose one of {get_args(Question)}")
    # With no room to move, the four corners are the same place.
    smallest = _SIDE if question == "digit" else _SIDE + 1
    if canvas < smallest:
        raise ConfigError(
            f"canvas={canvas} is too small for {_SIDE}×{_SIDE} digits and the question "
            f"{question!r}; use at least {smallest}"
        )
    if copies < 1:
        raise ConfigError(f"copies={copies}, but each digit has to be placed at least once")


def _split(n_digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out digits."""
    order = torch.randperm(n_digits, generator=generator)
    n_train = int(_TRAIN_SHARE * n_digits)
    return order[:n_train], order[n_train:]


def _draw_offsets(
    question: Question, n: int, largest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Offsets ``[n, 2]`` as (y, x), and the corner ``[n]`` (only meaningful for ``"corner"``)."""
    choices = 2 if question == "corner" else largest + 1
    cells = torch.randint(choices**2, (n,), generator=generator)
    steps = torch.stack([cells // choices, cells % choices], dim=1)
    return (steps * largest if question == "corner" else steps), cells


def _turn(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Each digit ``[n, 8, 8]`` turned by 0 to 3 quarters."""
    quarters = torch.randint(4, (len(digits),), generator=generator)
    poses = torch.stack([torch.rot90(digits, k, (1, 2)) for k in range(4)], dim=1)
    return poses[torch.arange(len(digits)), quarters]


def _place(digits: Tensor, offsets: Tensor, canvas: int) -> Tensor:
    """Pictures ``[n, 1, canvas, canvas]``, black except for digit n at ``offsets[n]``."""
    pictures = digits.new_zeros(len(digits), 1, canvas, canvas)
    datum = torch.arange(len(digits))[:, None, None]
    inside = torch.arange(_SIDE)
    rows = offsets[:, 0, None, None] + inside[:, None]
    columns = offsets[:, 1, None, None] + inside
    pictures[datum, 0, rows, columns] = digits
    return pictures
