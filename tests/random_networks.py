"""Random small networks in float64: linear, convolutional and factored maps, tied weights too."""

from __future__ import annotations

import random

import torch
from torch import nn

from margeq.layers import FactoredLinear2d, Linear2d
from tests.oracles import MeanPool, net

_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Identity)


class Twice(nn.Module):
    """The same module two times, so that every weight in it is used twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def random_network(seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A network with three outputs, and the shape of one of its inputs."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers, features, shape = (_on_maps if seed % 4 else _on_vectors)(rng)
    head = nn.Linear(features, 3, bias=rng.random() < 0.5)
    return net(*layers, head), shape


def _on_vectors(rng: random.Random):
    shape = rng.choice([(4,), (2, 4)])  # one shared axis, or none
    layers: list[nn.Module] = [nn.Linear(4, 3), rng.choice(_ACTIVATIONS)()]
    if rng.random() < 0.5:
        layers.append(Twice(nn.Linear(3, 3, bias=rng.random() < 0.5)))
    if len(shape) > 1:
        layers.append(nn.Flatten())
    return layers, 3 * len(shape), shape


def _on_maps(rng: random.Random):
    channels, size, layers = 2, 4, []
    for _ in range(rng.choice([1, 2])):
        layer, channels, size = _map(rng, channels, size)
        layers += [layer, rng.choice(_ACTIVATIONS)()]
    if rng.random() < 0.5:
        return [*layers, MeanPool()], channels, (2, 4, 4)
    return [*layers, nn.Flatten()], channels * size**2, (2, 4, 4)


def _map(rng: random.Random, channels: int, size: int):
    kind = rng.choice(["conv", "grouped", "twice", "f_fc", "fc"])
    bias = rng.random() < 0.7
    if kind == "f_fc":
        return FactoredLinear2d(channels, 2, (size, size), (2, 2), bias=bias), 2, 2
    if kind == "fc":
        return Linear2d(channels, 2, (size, size), (2, 2), bias=bias), 2, 2
    padding_mode = rng.choice(["zeros", "circular"])
    if kind == "twice":
        same = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding_mode, bias=bias)
        return Twice(same), channels, size
    groups = 2 if kind == "grouped" else 1
    conv = nn.Conv2d(channels, 2, 3, padding=1, padding_mode=padding_mode, groups=groups, bias=bias)
    return conv, 2, size
