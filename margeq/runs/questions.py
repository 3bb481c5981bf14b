"""The built-in tasks: two questions about the same digits, and the network that answers both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.utils.data import DataLoader, TensorDataset

from margeq.data import place_digits
from margeq.models import digit_network
from margeq.runs.tasks import Task, register_task

__all__ = ["question_task"]

_CLASSES = {"digit": 10, "corner": 4}
_BATCH, _CURVATURE_BATCH = 128, 512


def question_task(
    question: Literal["digit", "corner"],
    seed: int,
    paths: Sequence[str] = ("conv", "fc"),
    widths: Sequence[int] = (8, 16, 32),
    copies: int = 2,
) -> Task:
    """One of the two questions, with a fifth of the digits held out.

    Args:
        question: ``"digit"`` or ``"corner"``.
        seed: of split and placement.
        paths: candidate paths of each layer.
        widths: channels after each layer.
        copies: placements of each training digit, for ``"digit"``.

    Returns:
        Network and loaders.

    Raises:
        ConfigError: for arguments that data or network refuse.
    """
    task = place_digits(question, copies=copies, seed=seed).standardised()
    data = TensorDataset(task.train_images, task.train_labels)
    return Task(
        digit_network(_CLASSES[question], paths=paths, widths=widths),
        DataLoader(data, _BATCH, shuffle=True),
        DataLoader(data, _CURVATURE_BATCH),
        [(task.test_images, task.test_labels)],
    )


@register_task("digit")
def _digit(
    seed: int,
    paths: Sequence[str] = ("conv", "fc"),
    widths: Sequence[int] = (8, 16, 32),
    copies: int = 2,
) -> Task:
    return question_task("digit", seed, paths, widths, copies)


@register_task("corner")
def _corner(
    seed: int, paths: Sequence[str] = ("conv", "fc"), widths: Sequence[int] = (8, 16, 32)
) -> Task:
    return question_task("corner", seed, paths, widths)
