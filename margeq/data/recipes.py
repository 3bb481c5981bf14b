"""From a source to a task: what is drawn for each picture, and what the draws do to it.

Each picture's draw depends on the seed, the part and the picture's index alone: it is the same in
a task of 100 pictures and in the full one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.data.formats import Source
from margeq.data.geometry import resized, rotated
from margeq.data.tasks import ImageTask
from margeq.errors import ConfigError, DataError

__all__ = ["PLAIN", "TURNED", "Recipe", "render_task"]

_CHUNK = 2048  # pictures that are changed at once: a canvas of all digits takes 750 MB


@dataclass(frozen=True)
class Recipe:
    """What is drawn for each picture, and what the draws do to pictures and labels."""

    draw: Callable[[int, torch.Generator], Tensor]
    change: Callable[[Tensor, Tensor], Tensor]
    relabel: Callable[[Tensor, Tensor], Tensor] = lambda labels, draws: labels
    class_names: tuple[str, ...] = ()  # those of the source if empty
    antialias: bool = True


PLAIN = Recipe(lambda n, generator: torch.zeros(n), lambda images, draws: images)
TURNED = Recipe(lambda n, generator: 360 * torch.rand(n, generator=generator), rotated)


def render_task(
    name: str,
    parts: tuple[Source, Source],
    recipe: Recipe,
    numbers: tuple[int | None, int | None],
    size: int,
    seed: int,
) -> ImageTask:
    """Render both parts of a data set.

    Args:
        name: the question.
        parts: training and held-out pictures.
        recipe: see there.
        numbers: how many pictures of each part, a random choice; None takes all in their order.
        size: side of the pictures.
        seed: seed of choice and draws; the global random state is not used.

    Returns:
        The task.

    Raises:
        ConfigError: for a size or number out of range.
        DataError: if the parts have other classes.
    """
    if not is_count(size):
        raise ConfigError(f"size={size!r}, but pictures have at least one pixel")
    train, test = parts
    if train.class_names != test.class_names:
        raise DataError(
            f"training classes {train.class_names} and held-out classes {test.class_names} differ"
        )
    # each part has a stream of its own, so that one does not depend on the other
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    tensors: list[Tensor] = []
    for part, argument, number, part_seed in zip(
        parts, ("n_train", "n_test"), numbers, seeds, strict=True
    ):
        if number is not None and not (is_count(number) and number <= len(part)):
            raise ConfigError(f"{argument}={number!r}, but there are {len(part)} pictures")
        tensors += _rendered(part, recipe, number, size, part_seed)
    return ImageTask(*tensors, name=name, class_names=recipe.class_names or train.class_names)


def _rendered(
    part: Source, recipe: Recipe, number: int | None, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Pictures and labels of all data, or of the first ``number`` in a random order."""
    generator = torch.Generator().manual_seed(seed)
    draws = recipe.draw(len(part), generator)
    indices = torch.arange(len(part))
    if number is not None:
        indices = torch.randperm(len(part), generator=generator)[:number]
    chunks = [
        resized(recipe.change(part.read(chunk), draws[chunk]), size, recipe.antialias)
        for chunk in indices.split(_CHUNK)
    ]
    return torch.cat(chunks), recipe.relabel(part.labels[indices], draws[indices])
