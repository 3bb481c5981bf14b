"""Small pictures of weights, and how near a free map is to a convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.groups import P4M
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    LiftingConv2d,
    Linear2d,
    ResidualPathways,
    SparseConv2d,
)
from margeq.models import digit_network
from margeq.pictures import path_pictures, tiedness


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def decoded(picture):
    rows = [list(bytes.fromhex(values)) for values in picture["values"]]
    levels = torch.tensor(rows, dtype=torch.float64) - 128.0
    return levels.reshape(-1, *picture["size"]) / 127.0 * picture["largest"]


def induced(conv, channels, shape):
    """The matrix of a linear map of feature maps."""
    size = channels * shape[0] * shape[1]
    eye = torch.eye(size, dtype=torch.float64).reshape(size, channels, *shape)
    with torch.no_grad():
        return conv.double()(eye).reshape(size, -1).T


@pytest.mark.parametrize("stride", [1, 2])
def test_a_circular_convolution_is_tied(stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride, 1, padding_mode="circular", bias=False)
    layer = Linear2d(2, 3, (8, 4), (8 // stride, 4 // stride))
    assert tiedness(layer, induced(conv, 2, (8, 4))) == pytest.approx(1.0, abs=1e-12)


def test_independent_weights_are_tied_by_chance():
    torch.manual_seed(0)
    layer = Linear2d(4, 4, (6, 6), (3, 3))
    found = [tiedness(layer, torch.randn(36, 144)) for _ in range(20)]
    assert sum(found) / 20 == pytest.approx(1 / 9, abs=0.005)  # 20 draws, deviation 0.001


def test_tiedness_is_the_share_of_a_projection():
    torch.manual_seed(1)
    layer = Linear2d(1, 2, (4, 4), (4, 4))
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False)
    tied, free = induced(conv, 1, (4, 4)), torch.randn(32, 16, dtype=torch.float64)
    # every translation of the input and the output, averaged
    moved = torch.zeros_like(free)
    for y in range(4):
        for x in range(4):
            turned = free.reshape(2, 4, 4, 4, 4).roll((y, x), (1, 2)).roll((y, x), (3, 4))
            moved += turned.reshape(32, 16) / 16
    rest = free - moved
    whole = tied + rest
    share = tied.square().sum() / whole.square().sum()
    assert tiedness(layer, whole) == pytest.approx(float(share), abs=1e-12)
    assert tiedness(layer, rest) == pytest.approx(0.0, abs=1e-12)


def test_maps_without_a_score():
    assert tiedness(Linear2d(1, 1, (4, 4), (4, 4)), torch.zeros(16, 16)) is None
    assert tiedness(Linear2d(1, 1, (4, 4), (3, 3)), torch.ones(9, 16)) is None
    assert tiedness(Linear2d(1, 1, (4, 4), 4), torch.ones(4, 16)) is None
    assert tiedness(Linear2d(1, 1, 4, 2), torch.ones(2, 4)) == pytest.approx(1.0)


def level(picture):
    """Half a level, and rounding."""
    return 0.51 / 127 * picture["largest"]


def largest(kernels):
    """Eight pictures, largest first."""
    kernels = kernels.reshape(-1, *kernels.shape[-2:]).double()
    return kernels[kernels.norm(dim=(1, 2)).argsort(descending=True)[:8]]


def at_identity(layer):
    return (layer.weight @ layer.basis[0]).unflatten(-1, (3, 3))


def test_the_largest_kernels_to_half_a_level():
    torch.manual_seed(0)
    model = digit_network(3)
    found = {(p["layer"], p["path"]): p for p in path_pictures(model)}
    assert list(found) == [(f"layer{n}", path) for n in (1, 2, 3) for path in ("conv", "fc")]
    conv = found["layer2", "conv"]
    kernels = largest(model.layer2.paths.conv[0].weight)
    assert conv["kind"] == "kernels"
    assert "tiedness" not in conv
    assert (decoded(conv) - kernels).abs().max() <= level(conv)
    assert conv["largest"] == pytest.approx(float(kernels.abs().max()))


def test_a_free_map_at_eight_places():
    torch.manual_seed(0)
    layer = FactoredLinear2d(2, 3, (4, 6), (2, 6))
    layer.weight_u[1, 1] *= 10.0
    (found,) = path_pictures(ResidualPathways({"fc": layer, "off": nn.Flatten(0)}))
    matrix = layer.induced_weight().double().reshape(3, 12, 2, 4, 6)
    assert found["kind"] == "rows"
    assert found["independent"] == 1 / 12
    assert 0.0 < found["tiedness"] < 0.5
    assert found["size"] == [4, 6]
    picked = decoded(found)
    assert picked.shape == (8, 4, 6)
    for number, place in ((0, 0), (1, 2), (-1, 11)):
        assert (picked[number] - matrix[1, place, 1]).abs().max() <= level(found)


def test_a_convolution_shows_one_picture_moved():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False)
    layer = Linear2d(2, 3, (4, 2), (4, 2))
    layer.weight.copy_(induced(conv, 2, (4, 2)))
    (found,) = path_pictures(nn.Sequential(layer))
    assert found["tiedness"] == pytest.approx(1.0)
    pictures = decoded(found)
    for place in range(8):
        moved = pictures[0].roll(divmod(place, 2), (0, 1))
        assert torch.equal(pictures[place], moved)


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (SparseConv2d(2, 3, 5), lambda m: m.filters()),
        (LiftingConv2d(2, 3, 3, group=P4M), at_identity),
        (GroupConv2d(2, 3, 3, group=P4M), at_identity),
    ],
)  # fmt: skip
def test_kernels_of_other_convolutions(layer, kernel):
    (found,) = path_pictures(nn.Sequential(layer, nn.Conv2d(2, 2, 1)))  # 1 x 1 shows nothing
    assert (found["layer"], found["path"]) == ("0", "")
    assert (decoded(found) - largest(kernel(layer))).abs().max() <= level(found)


def test_what_is_too_large_is_left_out():
    large = Linear2d(8, 8, (32, 32), (32, 32))  # 2^26 elements
    assert path_pictures(nn.Sequential(large)) == []
    assert path_pictures(nn.Sequential(nn.Conv2d(1, 1, 33))) == []
    many = nn.Sequential(*(Linear2d(1, 1, (32, 32), 8) for _ in range(12)))
    found = path_pictures(many)
    assert len(found) == 8  # 8 pictures of 32 x 32 each, 2^16 pixels together


def test_zeros_and_numbers_that_are_not_finite():
    conv = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(conv.weight)
    (found,) = path_pictures(nn.Sequential(conv))
    assert found["largest"] == 0.0
    assert set(found["values"]) == {"80" * 9}
    nn.init.constant_(conv.weight, float("nan"))
    assert path_pictures(nn.Sequential(conv)) == []
