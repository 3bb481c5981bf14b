"""Multiplications of networks beyond those of the published tables."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from margeq.errors import UnsupportedLayerError
from margeq.groups import P4
from margeq.layers import (
    GroupConv2d,
    GroupPool,
    IrrepGroupConv2d,
    PartialGroupConv2d,
    SparseConv2d,
    SparseFactoredLinear2d,
    SparseGroupConv2d,
)
from margeq.models import count_macs, ella, rotmnist_cnn
from margeq.models.planar_layers import SeparableConv2d

PICTURE = (1, 28, 28)


def test_multiplications_of_a_mixer():
    channels, sides = [3, 2, 4, 4, 8, 8, 16, 16, 32], [8, 8, 4, 4, 2, 2, 1, 1, 1]
    expected = 32 * 128 + 128 * 10
    for (c, d), (x, y) in zip(pairwise(channels), pairwise(side**2 for side in sides), strict=True):
        expected += 16 * c * d * (x + y) + (16 + 4) * 9 * c * d * x
    assert count_macs(ella("f_fc+conv+gconv", width=2, size=8), (3, 8, 8)) == expected


def test_counting_leaves_the_model_as_it_was():
    model = rotmnist_cnn("gc-p4", 2)
    model.norm3.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, PICTURE)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert model.norm2.training
    assert not model.norm3.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calls_of_a_shared_layer_all_count():
    layer = nn.Linear(3, 3)
    assert count_macs(nn.Sequential(layer, nn.ReLU(), layer), (3,)) == 18
    assert count_macs(layer, (5, 3)) == 45
    conv = SeparableConv2d(2, 2, 3, padding=1)
    twice = nn.Sequential(conv, nn.MaxPool2d(2), conv)
    assert count_macs(twice, (2, 4, 4), "paper") == (16 + 4) * (4 + 18)


def test_sparsified_and_transposed_layers():
    conv = SparseConv2d(2, 6, 3, padding=1, groups=2)
    assert count_macs(conv, (2, 4, 5)) == 6 * 9 * 20  # as the filters that it convolves with
    maps = SparseFactoredLinear2d(2, 3, (4, 4), (2, 2), anchors=(5, 2))
    assert count_macs(maps, (2, 4, 4)) == 2 * 16 * 5 + 6 * (5 + 2) + 3 * 4 * 2
    up = nn.ConvTranspose2d(2, 3, 2, stride=2)
    assert count_macs(nn.Sequential(up, nn.GroupNorm(1, 3)), (2, 4, 4)) == 2 * 3 * 4 * 16
    full, *others = (
        kind(2, 3, 3, group=P4) for kind in (GroupConv2d, SparseGroupConv2d, IrrepGroupConv2d)
    )
    counts = {count_macs(layer, (2, 4, 6, 6)) for layer in (full, *others)}
    assert counts == {2 * 3 * 16 * 9 * 16}


def test_unknown_costs_are_refused():
    with pytest.raises(UnsupportedLayerError, match=r"0 \(PartialGroupConv2d\)"):
        count_macs(nn.Sequential(PartialGroupConv2d(1, 1, 3, group=P4)), (1, 4, 8, 8))
    assert count_macs(GroupPool(P4), (1, 4, 8, 8)) == 0
