"""Batches of tensors in memory: re-iterable, rewindable, augmented for training only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["Augmentation", "TensorLoader"]

#: Changed pictures of a batch, with one draw per picture from the generator.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class TensorLoader:
    """Batches of pictures and labels that lie in memory, on any one device.

    Each pass takes one number from ``generator`` and draws its order and its augmentation from
    that number. Putting the generator's state back therefore repeats the passes that followed,
    also after a pass was left in the middle; :func:`margeq.optimize_marglik` does so between
    restarts. A loader that neither shuffles nor augments draws nothing.

    Args:
        images: ``[n, ...]``.
        labels: ``[n]``.
        batch_size: pictures per batch; the last batch may be smaller, none is dropped and none is
            empty.
        shuffle: whether each pass has its own order.
        augment: applied to each batch of pictures, see :func:`margeq.data.random_shift_flip`. For
            training batches: evidence and held-out batches have to show the data as they are.
        seed: seed of ``generator``; the global random state is not used.

    Attributes:
        dataset: the pictures and labels without augmentation.
        generator: decides the passes to come.

    Raises:
        ConfigError: if the batch size is no positive whole number, or pictures and labels differ in
            number.

    Examples:
        >>> loader = TensorLoader(torch.arange(5.0)[:, None], torch.arange(5), 2)
        >>> [labels.tolist() for _, labels in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if not is_count(batch_size):
            raise ConfigError(f"batch_size={batch_size!r}, but a batch holds at least one picture")
        if len(images) != len(labels):
            raise ConfigError(f"{len(images)} pictures, but {len(labels)} labels")
        self.dataset = TensorDataset(images, labels)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def part(self, first: int, last: int, batch_size: int | None = None) -> TensorLoader:
        """The data from ``first`` to before ``last``, in order; none are copied.

        Returns:
            A loader with this one's batch size, or another one.

        Raises:
            ConfigError: if this loader shuffles or augments.
        """
        if self.shuffle or self.augment is not None:
            raise ConfigError(
                "this TensorLoader shuffles or augments, but a part shows the data as they are and "
                "in order; take it from one with shuffle=False and augment=None"
            )
        images, labels = self.dataset.tensors
        return TensorLoader(images[first:last], labels[first:last], batch_size or self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        order = torch.arange(len(labels))
        draws = torch.Generator()
        if self.shuffle or self.augment is not None:
            draws.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
        if self.shuffle:
            order = torch.randperm(len(labels), generator=draws)
        order = order.to(labels.device)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = images[indices.to(images.device)]
            yield (batch if self.augment is None else self.augment(batch, draws)), labels[indices]
