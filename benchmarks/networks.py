"""The LeNet that all costs are measured on, real digits, and one plain training epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from margeq.data import load_digits
from margeq.layers import SparseConv2d
from margeq.parameters import named_weights

__all__ = [
    "BATCH",
    "N_DATA",
    "TRAINING_EPOCHS",
    "Batches",
    "accuracy",
    "digits",
    "epoch",
    "lenet",
    "optimizer_for",
    "sparse_lenet",
    "trained",
]

N_DATA, BATCH = 1024, 128
TRAINING_EPOCHS = 25
"""Epochs of the trained network: 99.6 % training accuracy."""


class Batches(list[tuple[Tensor, Tensor]]):
    """Batches cut once, so that no job pays for loading; laplace-torch also asks for the data."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = BATCH) -> None:
        super().__init__(zip(images.split(size), labels.split(size), strict=True))
        self.dataset = TensorDataset(images, labels)


def lenet() -> nn.Sequential:
    """LeNet-5 as conv6-conv16-120-10 on 28 x 28: 51,902 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 10),
    )


def sparse_lenet() -> nn.Sequential:
    """The LeNet with S-CONV layers on grid anchors: as many weights, and two lengthscales."""
    model = lenet()
    for place in (0, 3):
        conv = model[place]
        assert isinstance(conv, nn.Conv2d)
        model[place] = SparseConv2d.from_conv(conv, anchors="grid")
    return model


def digits(n_data: int = N_DATA) -> Batches:
    """Some of the 1,797 embedded handwritten digits, enlarged to 28 x 28.

    More than there are begin again, a pixel further to the right each time.
    """
    images, labels = load_digits()
    rounds = range(-(-n_data // len(images)))
    large = nn.functional.interpolate(images[:, None], size=28, mode="bilinear")
    shifted = torch.cat([large.roll(by, -1) for by in rounds])[:n_data]
    return Batches(shifted, labels.repeat(len(rounds))[:n_data])


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """The plain optimizer, on the weights."""
    return torch.optim.Adam(named_weights(model).values(), lr=1e-3)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """The unit of all costs: forward, backward and Adam step on every batch."""
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def trained(
    batches: Batches,
    make: Callable[[], nn.Sequential] = lenet,
    n_epochs: int = TRAINING_EPOCHS,
) -> nn.Sequential:
    """A LeNet after plain training; its lengthscales stay as they are."""
    torch.manual_seed(0)
    model = make()
    optimizer = optimizer_for(model)
    for _ in range(n_epochs):
        epoch(model, optimizer, batches)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the training data that the model classifies correctly."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(batches.dataset)
