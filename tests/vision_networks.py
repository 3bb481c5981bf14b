"""Networks that were not written for margeq: torchvision's, and a small U-Net."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import import_torchvision


def torchvision() -> ModuleType:
    try:
        return import_torchvision()
    except ModuleNotFoundError as error:
        pytest.skip(f"not installed: {error}")


def resnet18(num_classes: int = 10) -> nn.Module:
    """With the stem for small pictures: no stride and no pooling before the first block."""
    model = torchvision().models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small_resnet(num_classes: int = 4) -> nn.Module:
    """Blocks of torchvision with few channels."""
    block = torchvision().models.resnet.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        block(4, 4), block(4, 8, stride=2, downsample=shortcut),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


def vgg11(num_classes: int = 10) -> nn.Module:
    """torchvision's features, and the head of small pictures."""
    features = torchvision().models.vgg11(num_classes=num_classes).features
    return nn.Sequential(features, nn.Flatten(), nn.LazyLinear(num_classes))


def small_vgg(num_classes: int = 4) -> nn.Module:
    """Features as torchvision makes them, of few channels."""
    features = torchvision().models.vgg.make_layers([4, "M", 8, "M"])
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


class UNet(nn.Module):
    """Two levels: down by a stride, up by a transposed convolution, with one shortcut."""

    def __init__(self, width: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, width, 3, padding=1)
        self.read_out = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.first(x).relu()
        deep = self.middle(self.down(shallow).relu()).relu()
        both = torch.cat([shallow, self.up(deep)], 1)
        return self.read_out(self.last(both).relu()).mean((-2, -1))
