"""Every layer type keeps the contract; what each layer promises besides."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError
from margeq.layers import FactoredLinear2d, Linear2d, PolyphaseSubsample, ResidualPathways
from margeq.testing import check_layer
from tests.layer_cases import LAYER_CASES

F64 = torch.float64


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_layer_keeps_the_contract(case):
    check_layer(case)


# --- F-FC equals the block-diagonal formulation of the paper


def block_diagonal_f_fc(layer, x):
    """U and V as plain matrices that multiply block-diagonally expanded inputs."""
    n, channels, outputs = len(x), layer.in_channels, layer.out_channels
    lin_u = layer.weight_u.reshape(outputs, -1)  # [D, C X]
    lin_v = layer.weight_v.reshape(-1, outputs * channels)  # [Y, D C]
    mapped = []
    for datum in x.reshape(n, channels, -1):
        hidden = lin_u @ torch.block_diag(*datum[:, :, None]) + layer.bias_u[:, None]
        mapped.append((lin_v @ torch.block_diag(*hidden[:, :, None]) + layer.bias_v[:, None]).mT)
    return torch.stack(mapped).reshape(n, outputs, *layer.out_shape)


def test_f_fc_is_the_block_diagonal_formulation():
    layer = FactoredLinear2d(3, 4, (5, 2), (2, 3)).double()
    nn.init.normal_(layer.bias_u)
    nn.init.normal_(layer.bias_v)
    x = torch.randn(6, 3, 5, 2, dtype=F64)
    torch.testing.assert_close(layer(x), block_diagonal_f_fc(layer, x), rtol=1e-12, atol=1e-12)


# --- parameter counts of the paper's architecture, width 10

WIDTHS = [3, 10, 20, 20, 40, 40, 80, 80, 160]
SIZES = [32, 32, 16, 16, 8, 8, 4, 2, 1]
HEAD = 109_450


def paper_layers(kind):
    with torch.device("meta"):
        if kind is nn.Conv2d:
            return [nn.Conv2d(c, d, 3) for c, d in pairwise(WIDTHS)]
        steps = zip(pairwise(WIDTHS), pairwise(SIZES), strict=True)
        return [kind(c, d, (x, x), (y, y)) for (c, d), (x, y) in steps]


def count(layers):
    return sum(p.numel() for layer in layers for p in layer.parameters())


def test_weights_per_fully_connected_layer():
    found = [layer.weight.numel() for layer in paper_layers(Linear2d)]
    assert [round(n / 1e6, 2) for n in found[:6]] == [31.46, 52.43, 26.21, 13.11, 6.55, 3.28]
    assert found[6:] == [80 * 16 * 80 * 4, 80 * 4 * 160]


def test_weights_per_factored_layer():
    layers = paper_layers(FactoredLinear2d)
    assert [(layer.weight_u.numel(), layer.weight_v.numel()) for layer in layers] == [
        (30_720, 30_720),
        (204_800, 51_200),
        (102_400, 102_400),
        (204_800, 51_200),
        (102_400, 102_400),
        (204_800, 51_200),
        (102_400, 25_600),
        (51_200, 12_800),
    ]


@pytest.mark.parametrize(
    ("kinds", "total"),
    [
        ([Linear2d], 133_635_690),
        ([nn.Conv2d], 338_770),
        ([Linear2d, nn.Conv2d], 133_865_010),
        ([FactoredLinear2d], 1_542_625),
        ([FactoredLinear2d, nn.Conv2d], 1_771_945),
    ],
    ids=["fc", "conv", "fc+conv", "f_fc", "f_fc+conv"],
)
def test_parameters_of_the_whole_network(kinds, total):
    assert HEAD + sum(count(paper_layers(kind)) for kind in kinds) == total


@pytest.mark.parametrize("kind", [Linear2d, FactoredLinear2d])
def test_map_layers_refuse_wrong_sizes(kind):
    with pytest.raises(ConfigError, match="positive"):
        kind(2, 3, (4, 0), 1)
    with pytest.raises(DataError, match=r"\[n, 2, 4, 4\], got \(1, 2, 3, 3\)"):
        kind(2, 3, (4, 4), 1)(torch.zeros(1, 2, 3, 3))


# --- polyphase subsampling


def test_polyphase_choice_does_not_depend_on_the_batch():
    x = torch.randn(16, 3, 6, 8, dtype=F64)
    alone = torch.cat([PolyphaseSubsample()(one[None]) for one in x])
    assert torch.equal(PolyphaseSubsample()(x), alone)


def test_polyphase_chooses_by_norm_and_not_by_sign():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1::2, 0::2] = -3.0
    x[0, 0, 0::2, 1::2] = 2.0
    assert torch.equal(PolyphaseSubsample()(x), torch.full((1, 1, 2, 2), -3.0))


def is_some_shift(y, reference):
    shifts = [(i, j) for i in range(y.shape[-2]) for j in range(y.shape[-1])]
    return min((y - reference.roll(s, (-2, -1))).abs().max() for s in shifts) <= 1e-12


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (3, 2), (5, 7)])
def test_circular_convolution_and_polyphase_commute_with_shifts(shift):
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    x = torch.randn(5, 2, 6, 8, dtype=F64)
    y = PolyphaseSubsample()(conv(x))
    shifted = PolyphaseSubsample()(conv(x.roll(shift, (-2, -1))))
    assert all(is_some_shift(a, b) for a, b in zip(shifted, y, strict=True))
    torch.testing.assert_close(shifted.mean((2, 3)), y.mean((2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (1, 1, 4, 5)])
def test_polyphase_refuses_odd_sizes(shape):
    with pytest.raises(DataError, match=f"even sizes, got a map of {shape[2]} x {shape[3]}"):
        PolyphaseSubsample()(torch.zeros(shape))


# --- sums of paths


def pathways(reduction="mean"):
    paths = {"conv": nn.Conv2d(2, 3, 3, padding=1), "fc": Linear2d(2, 3, (4, 4), (4, 4))}
    return ResidualPathways(paths, reduction)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_pathways_sum_or_average_their_paths(reduction, factor):
    layer, x = pathways(reduction), torch.randn(2, 2, 4, 4)
    expected = factor * (layer.paths["conv"](x) + layer.paths["fc"](x))
    torch.testing.assert_close(layer(x), expected)


def test_path_switched_off_is_not_called_and_leaves_the_others_as_they_are():
    layer, x, calls = pathways("mean"), torch.randn(2, 2, 4, 4), []
    layer.paths["fc"].register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert len(calls) == 1
    layer.switch_off("fc")
    torch.testing.assert_close(layer(x), 0.5 * layer.paths["conv"](x))
    assert len(calls) == 1
    layer.switch_on("fc")
    layer(x)
    assert len(calls) == 2


def test_last_path_stays_on():
    layer = pathways()
    layer.switch_off("fc")
    layer.switch_off("fc")  # again: no error
    with pytest.raises(ConfigError, match="'conv' is the last one on"):
        layer.switch_off("conv")
    assert layer.active == ("conv",)


def test_state_dict_keeps_which_paths_are_off():
    layer, other = pathways(), pathways()
    layer.switch_off("conv")
    other.load_state_dict(layer.state_dict())
    assert other.active == ("fc",)


def test_pathways_refuse_what_cannot_work():
    mismatched = ResidualPathways({"a": nn.Linear(2, 3), "b": nn.Linear(2, 1)})
    with pytest.raises(ConfigError, match=r"path 'b' returns \(1, 1\)"):
        mismatched(torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="at least one path"):
        ResidualPathways({})
    with pytest.raises(ConfigError, match="'mean' or 'sum'"):
        ResidualPathways({"a": nn.Linear(1, 1)}, "max")
    with pytest.raises(ConfigError, match="no path 'x'; this layer has conv, fc"):
        pathways().switch_off("x")


def test_less_constrained_paths_span_more_maps():
    assert pathways().less_constrained() == ("fc",)
    factored = FactoredLinear2d(2, 3, (4, 4), (4, 4))
    layer = ResidualPathways({"f_fc": factored, "conv": nn.Conv2d(2, 3, 3, padding=1)})
    assert layer.less_constrained() == ("f_fc",)
    assert factored.span_dimension == 2 * 16 * 3 * 16
