"""The LeNet that all costs are measured on, real digits, and one plain training epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from margeq.data import load_digits

__all__ = ["BATCH", "N_DATA", "TRAINING_EPOCHS", "Batches", "accuracy", "digits", "epoch", "lenet"]

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


def digits() -> Batches:
    """1,024 of the embedded handwritten digits, enlarged to 28 x 28."""
    images, labels = load_digits()
    large = nn.functional.interpolate(images[:N_DATA, None], size=28, mode="bilinear")
    return Batches(large, labels[:N_DATA])


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """The plain optimizer."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """The unit of all costs: forward, backward and Adam step on every batch."""
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def trained(batches: Batches) -> nn.Sequential:
    """The LeNet after plain training."""
    torch.manual_seed(0)
    model = lenet()
    optimizer = optimizer_for(model)
    for _ in range(TRAINING_EPOCHS):
        epoch(model, optimizer, batches)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of the training data that the model classifies correctly."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(batches.dataset)
