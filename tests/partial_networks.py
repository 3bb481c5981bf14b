"""Networks of gated layers, and what they are with gates that leave the identity alone."""

from __future__ import annotations

import torch
from torch import nn

from margeq.layers import GroupPool, LiftingConv2d, PartialGroupConv2d, PartialLiftingConv2d
from tests.oracles import F64, Lambda, net


def close(found, expected, tol=1e-12):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def gated_layers(group, channels, **options):
    """Three of them, each of which knows the gate before it."""
    first = PartialLiftingConv2d(1, channels, 3, group=group, padding=1, **options)
    layers = [first, nn.ReLU()]
    for _ in range(2):
        before = layers[-2].gate
        options = {k: v for k, v in options.items() if k != "gate"} | {"input_gate": before}
        layers += [PartialGroupConv2d(channels, channels, 3, group=group, padding=1, **options)]
        layers += [nn.ReLU()]
    return layers


def network(group, channels=4, head=3, **options):
    end = [
        GroupPool(group, "mean"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, head),
    ]
    return net(*gated_layers(group, channels, **options), *end)


def plain_network(gated, group):
    """Ordinary convolutions with the filters of the identity, as a gate of it scales them."""
    scale = group.order**0.5
    layers = []
    for layer in (gated[0], gated[2], gated[4]):
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, dtype=F64)
        filters = layer.weight if isinstance(layer, LiftingConv2d) else layer.weight[:, :, 0]
        conv.weight = nn.Parameter(filters.detach().reshape(conv.weight.shape).clone())
        conv.bias = nn.Parameter(layer.bias.detach().clone())
        layers += [conv, Lambda(lambda y: y * scale), nn.ReLU()]
    mean = Lambda(lambda y: y.mean((-2, -1)) / group.order)
    head = nn.Linear(*gated[-1].weight.T.shape).double()
    head.load_state_dict(gated[-1].state_dict())
    return nn.Sequential(*layers, mean, head).double()
