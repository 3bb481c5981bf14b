"""Pictures and labels of one question: a training part, a held-out part, perhaps one between."""

from __future__ import annotations

from collections.abc import Iterator
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
        validation_images: pictures for choices between runs, which the held-out ones must not
            decide; none by default, see :meth:`with_validation`.
        validation_labels: class indices.

    Raises:
        DataError: if pictures and labels differ in number, or the pictures of two parts in shape.

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
    validation_images: Tensor | None = None
    validation_labels: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.validation_images is None) != (self.validation_labels is None):
            raise DataError(f"task {self.name!r}: validation takes both pictures and labels")
        train = self.train_images
        for part, images, labels in self._parts():
            if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels):
                raise DataError(
                    f"task {self.name!r}: {part} pictures {tuple(images.shape)} and labels "
                    f"{tuple(labels.shape)} have to be [n, channels, height, width] and [n]"
                )
            if train.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"task {self.name!r}: training pictures are {tuple(train.shape[1:])}, {part} "
                    f"pictures {tuple(images.shape[1:])}"
                )

    def _parts(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield "training", self.train_images, self.train_labels
        yield "held-out", self.test_images, self.test_labels
        if self.validation_images is not None and self.validation_labels is not None:
            yield "validation", self.validation_images, self.validation_labels

    @property
    def n_classes(self) -> int:
        """Number of classes, also of a :meth:`subset` that misses some of them."""
        if self.class_names:
            return len(self.class_names)
        return 1 + max(int(labels.max()) for _, _, labels in self._parts())

    def standardised(self) -> ImageTask:
        """The same task with zero mean and unit variance per channel over the training pictures.

        Returns:
            The task; all other pictures get the mean and deviation of the training pictures.

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
        validation = self.validation_images
        return replace(
            self,
            train_images=(self.train_images - mean) / deviation,
            test_images=(self.test_images - mean) / deviation,
            validation_images=None if validation is None else (validation - mean) / deviation,
        )

    def subset(self, n_train: int, n_test: int | None = None, seed: int = 0) -> ImageTask:
        """Random training pictures and, if asked for, random held-out pictures.

        A smaller subset of the same seed is contained in a larger one. Validation pictures are
        kept.

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
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            class_names=self._names(),
        )

    def with_validation(self, n_validation: int, seed: int = 0) -> ImageTask:
        """Move random training pictures to the validation part; none stays in both.

        Args:
            n_validation: number of pictures; at least one is left for training.
            seed: seed of the choice; the global random state is not used.

        Returns:
            The task with fewer training pictures, in their order, and the classes of this one.

        Raises:
            ConfigError: if there are not that many pictures, or the task has such a part already.

        Examples:
            >>> task = ImageTask(torch.rand(5, 1, 8, 8), torch.arange(5),
            ...                  torch.rand(2, 1, 8, 8), torch.arange(2), name="toy")
            >>> task = task.with_validation(2)
            >>> len(task.train_images), len(task.validation_images)
            (3, 2)
        """
        if self.validation_images is not None:
            raise ConfigError(f"task {self.name!r} has validation pictures already")
        n_train, generator = len(self.train_images), torch.Generator().manual_seed(seed)
        if not (is_count(n_validation) and n_validation < n_train):
            raise ConfigError(
                f"n_validation={n_validation!r}, but there are {n_train} training pictures, of "
                f"which at least one has to stay"
            )
        order = torch.randperm(n_train, generator=generator)
        chosen, rest = order[:n_validation].sort().values, order[n_validation:].sort().values
        return replace(
            self,
            train_images=self.train_images[rest],
            train_labels=self.train_labels[rest],
            validation_images=self.train_images[chosen],
            validation_labels=self.train_labels[chosen],
            class_names=self._names(),
        )

    def _names(self) -> tuple[str, ...]:
        """Names of the classes, also of those that fewer pictures would miss."""
        return self.class_names or tuple(map(str, range(self.n_classes)))

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

    def validation_loader(self, batch_size: int) -> TensorLoader:
        """The validation pictures as they are, in their order.

        Returns:
            A loader.

        Raises:
            ConfigError: if the task has none.
        """
        if self.validation_images is None or self.validation_labels is None:
            raise ConfigError(
                f"task {self.name!r} has no validation pictures; take some from the training "
                f"pictures by with_validation(...)"
            )
        return TensorLoader(self.validation_images, self.validation_labels, batch_size)

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
