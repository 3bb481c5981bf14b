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


def test_kernels_and_rows_to_half_a_level():
    torch.manual_seed(0)
    model = digit_network(3)
    found = {(p["layer"], p["path"]): p for p in path_pictures(model)}
    assert list(found) == [(f"layer{n}", path) for n in (1, 2, 3) for path in ("conv", "fc")]
    conv = found["layer2", "conv"]
    kernels = model.layer2.paths.conv[0].weight[:8, 0].double()
    assert conv["kind"] == "kernels"
    assert "tiedness" not in conv
    assert (decoded(conv) - kernels).abs().max() <= 0.51 / 127 * conv["largest"]
    assert conv["largest"] == pytest.approx(float(kernels.abs().max()))
    rows = found["layer1", "fc"]
    matrix = model.layer1.paths.fc.induced_weight()
    assert rows["kind"] == "rows"
    assert rows["independent"] == 1 / 64
    assert 0.0 < rows["tiedness"] < 0.1
    picked = decoded(rows)
    assert picked.shape == (8, 16, 16)
    first, last = (matrix[i, :256].reshape(16, 16).double() for i in (0, -1))
    assert (picked[0] - first).abs().max() <= 0.51 / 127 * rows["largest"]
    assert (picked[-1] - last).abs().max() <= 0.51 / 127 * rows["largest"]


def test_the_first_input_channel_of_several():
    layer = FactoredLinear2d(2, 3, (4, 6), (2, 3))
    (found,) = path_pictures(ResidualPathways({"fc": layer, "off": nn.Flatten(0)}))
    matrix = layer.induced_weight().double()
    assert found["size"] == [4, 6]
    close = (decoded(found)[0].flatten() - matrix[0, :24]).abs().max()
    assert close <= 0.51 / 127 * found["largest"]


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (SparseConv2d(2, 3, 5), lambda m: m.filters()[:, 0]),
        (LiftingConv2d(2, 3, 3, group=P4M),
         lambda m: (m.weight[:, 0] @ m.basis[0]).unflatten(1, (3, 3))),
        (GroupConv2d(2, 3, 3, group=P4M),
         lambda m: (m.weight[:, 0, 0] @ m.basis[0]).unflatten(1, (3, 3))),
    ],
)  # fmt: skip
def test_kernels_of_other_convolutions(layer, kernel):
    (found,) = path_pictures(nn.Sequential(layer, nn.Conv2d(2, 2, 1)))  # 1 x 1 shows nothing
    assert (found["layer"], found["path"]) == ("0", "")
    wanted = kernel(layer).double()
    assert (decoded(found) - wanted).abs().max() <= 0.51 / 127 * found["largest"]


def test_what_is_too_large_is_left_out():
    large = Linear2d(8, 8, (32, 32), (32, 32))  # 2^26 elements
    assert path_pictures(nn.Sequential(large)) == []
    assert path_pictures(nn.Sequential(nn.Conv2d(1, 1, 33))) == []
    many = nn.Sequential(*(Linear2d(1, 8, (32, 32), 1) for _ in range(12)))
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
