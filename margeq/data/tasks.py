"""Pictures and labels of one question: a training part and a held-out part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.data.batching import Augmentation, TensorLoader
from margeq.errors import ConfigError, DataError

__all__ = ["ImageTask"]

_ROUNDINGS = 16
"""Range of a channel, in roundings of its largest value, that passes for constant."""


@dataclass(frozen=True)
class ImageTask:
    """Pictures and labels of one question, for training and for the final check.

    Args:
        train_images: ``[n_train, channels, height, width]``; grey or colour values in [0, 1] until
            the task is :meth:`standardised`.
        train_labels: class indices, ``[n_train]``.
        test_images: held-out pictures, ``[n_test, channels, height, width]``.
        test_labels: class indices, ``[n_test]``.
        name: the question.
        class_names: one name per class, in the order of the indices; without them the classes are
            counted by their largest index.

    Raises:
        DataError: if pictures and labels differ in number, or training and held-out pictures in
            shape.

    Examples:
        >>> task = ImageTask(torch.rand(5, 1, 8, 8), torch.arange(5),
        ...                  torch.rand(2, 1, 8, 8), torch.arange(2), name="toy")
        >>> task.n_classes, len(task.subset(3).train_images)
        (5, 3)
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        train, test = self.train_images, self.test_images
        for part, images, labels in (
            ("training", train, self.train_labels),
            ("held-out", test, self.test_labels),
        ):
            if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels):
                raise DataError(
                    f"task {self.name!r}: {part} pictures {tuple(images.shape)} and labels "
                    f"{tuple(labels.shape)} have to be [n, channels, height, width] and [n]"
                )
        if train.shape[1:] != test.shape[1:]:
            raise DataError(
                f"task {self.name!r}: training pictures are {tuple(train.shape[1:])}, held-out "
                f"pictures {tuple(test.shape[1:])}"
            )

    @property
    def n_classes(self) -> int:
        """Number of classes, also of a :meth:`subset` that misses some of them."""
        if self.class_names:
            return len(self.class_names)
        return 1 + max(int(part.max()) for part in (self.train_labels, self.test_labels))

    def standardised(self) -> ImageTask:
        """The same task with zero mean and unit variance per channel over the training pictures.

        Returns:
            The task; held-out pictures get the mean and deviation of the training pictures.

        Raises:
            DataError: if a channel has the same value in every training pixel, up to rounding.
        """
        # statistics of the training pictures alone: the held-out pictures stay unseen
        channels = self.train_images.unbind(1)
        mean = torch.stack([channel.mean() for channel in channels])[:, None, None]
        deviation = torch.stack([channel.std() for channel in channels])[:, None, None]
        if not all(_varies(channel) for channel in channels):
            raise DataError(
                f"task {self.name!r}: a channel is constant over the training pictures (deviations "
                f"{deviation.flatten().tolist()}); leave this channel out"
            )
        return replace(
            self,
            train_images=(self.train_images - mean) / deviation,
            test_images=(self.test_images - mean) / deviation,
        )

    def subset(self, n_train: int, n_test: int | None = None, seed: int = 0) -> ImageTask:
        """Random training pictures and, if asked for, random held-out pictures.

        A smaller subset of the same seed is contained in a larger one.

        Args:
            n_train: number of training pictures.
            n_test: number of held-out pictures; None keeps all.
            seed: seed of the choice; the global random state is not used.

        Returns:
            The smaller task, with the classes of this one.

        Raises:
            ConfigError: if there are not that many pictures.
        """
        generator = torch.Generator().manual_seed(seed)
        train = _choose(len(self.train_images), n_train, "n_train", generator)
        test = slice(None)
        if n_test is not None:
            test = _choose(len(self.test_images), n_test, "n_test", generator)
        names = self.class_names or tuple(map(str, range(self.n_classes)))
        return ImageTask(
            self.train_images[train],
            self.train_labels[train],
            self.test_images[test],
            self.test_labels[test],
            self.name,
            names,
        )

    def train_loader(
        self, batch_size: int, *, augment: Augmentation | None = None, seed: int = 0
    ) -> TensorLoader:
        """Shuffled batches of the training pictures, for the gradient steps.

        Args:
            batch_size: pictures per batch.
            augment: such as :func:`margeq.data.random_shift_flip`; every picture of every epoch
                has its own draw.
            seed: seed of the order and of the augmentation.

        Returns:
            A loader whose epochs differ, and repeat from the same seed.
        """
        return TensorLoader(
            self.train_images, self.train_labels, batch_size, True, augment, seed=seed
        )

    def marglik_loader(self, batch_size: int) -> TensorLoader:
        """The training pictures as they are, in their order: what the evidence is about."""
        return TensorLoader(self.train_images, self.train_labels, batch_size)

    def test_loader(self, batch_size: int) -> TensorLoader:
        """The held-out pictures as they are, in their order."""
        return TensorLoader(self.test_images, self.test_labels, batch_size)


def _varies(channel: Tensor) -> bool:
    """By the range: the deviation of equal values is not zero once their mean is rounded."""
    if channel.numel() == 0:
        return False
    rounding = torch.finfo(channel.dtype).eps * channel.abs().max()
    return bool(channel.max() - channel.min() > _ROUNDINGS * rounding)


def _choose(n: int, wanted: int, name: str, generator: torch.Generator) -> Tensor:
    """The first ``wanted`` of a random order of ``n``."""
    order = torch.randperm(n, generator=generator)
    if not (is_count(wanted) and wanted <= n):
        raise ConfigError(f"{name}={wanted!r}, but there are {n} pictures to choose from")
    return order[:wanted]
