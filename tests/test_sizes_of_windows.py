"""Windows in two and three dimensions: the rule of exact sizes is what is measured."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, EquivarianceWarning
from margeq.groups import P2, P4, PM, Z2, C, D
from margeq.layers import PerElement, check_sizes, require_exact_sizes
from margeq.layers.slides import has_unknown_window
from margeq.testing import equivariance_error
from tests.layer_cases import LAYER_CASES
from tests.oracles import F64

SIZES = range(5, 12)
ODD = {n for n in SIZES if n % 2}
EVEN = set(SIZES) - ODD
THIRD = {n for n in SIZES if n % 3 == 1}
ALL = set(SIZES)


def conv3d(*window, **options):
    """Filters that turn into themselves, so that only the window can break the symmetry."""
    conv = nn.Conv3d(1, 1, *window, **options)
    nn.init.ones_(conv.weight)
    return conv


PLANE = {
    "max": (nn.MaxPool3d((1, 2, 2)), EVEN),
    "max stride": (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), ODD),
    "max one stride": (nn.MaxPool3d((1, 3, 3), 1), ALL),
    "max dilated": (nn.MaxPool3d((1, 2, 2), (1, 2, 2), dilation=(1, 2, 2)), ODD),
    "mean": (nn.AvgPool3d((1, 2, 2), ceil_mode=True), EVEN),
    "mean stride": (nn.AvgPool3d((1, 3, 3), (1, 3, 3), (0, 1, 1)), THIRD),
    "power": (nn.LPPool3d(2, (1, 2, 2)), EVEN),
    "conv": (conv3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), ODD),
    "conv same": (conv3d((1, 4, 4), padding="same", padding_mode="circular"), set()),
    "conv circular": (conv3d((1, 2, 2), (1, 2, 2), padding_mode="circular"), EVEN),
    "power 2d": (PerElement(nn.LPPool2d(2, 2)), EVEN),
    "power 2d stride": (PerElement(nn.LPPool2d(2, 3, 2, ceil_mode=True)), ODD),
    "zeros 2d": (PerElement(nn.ZeroPad2d((0, 1, 0, 1))), set()),
    "zeros both ends": (PerElement(nn.ZeroPad2d(2)), ALL),
    "zeros on maps": (nn.ZeroPad2d((1, 0, 0, 1)), set()),
    "crop": (PerElement(nn.ZeroPad2d(-1)), ALL),
    "reflect": (PerElement(nn.ReflectionPad2d((0, 1, 0, 1))), set()),
    "replicate 3d": (nn.ReplicationPad3d((1, 1, 1, 1, 0, 0)), ALL),
    "circular 3d": (nn.CircularPad3d((1, 0, 1, 0, 0, 0)), set()),
    "all elements": (nn.MaxPool3d((4, 2, 2), (7, 2, 2)), EVEN),
    "mean of elements": (nn.AvgPool3d((4, 1, 1)), ALL),
}  # fmt: skip


def measured(layer, group, *shape):
    """The largest error; of a pooled group axis, that of its picture."""
    pooled = nn.Sequential(layer, nn.Flatten(1, 2)) if pools_group(layer) else layer
    return equivariance_error(pooled.double(), group, torch.randn(shape, dtype=F64)).exact.max


def pools_group(layer):
    return isinstance(layer, nn.MaxPool3d | nn.AvgPool3d) and (
        not isinstance(layer.kernel_size, int) and layer.kernel_size[0] == 4
    )


@pytest.mark.parametrize("name", PLANE)
def test_windows_along_the_plane_are_judged_as_measured(name):
    layer, exact = PLANE[name]
    for n in SIZES:
        faults = check_sizes(layer, (1, 4, n, n), P4)
        assert all(fault.judged for fault in faults)
        found = measured(layer, P4, 1, 1, 4, n, n)
        assert (not faults) == (found < 1e-12) == (n in exact), (n, found, faults)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)),
        nn.AvgPool3d((3, 3, 3), 1, 1),
        conv3d(3, padding=1),
        conv3d(3, padding="same"),
        conv3d((1, 1, 1), (1, 1, 1), (1, 0, 0)),
        conv3d((1, 3, 3), (2, 1, 1), (0, 1, 1)),
        nn.ZeroPad3d((0, 0, 0, 0, 1, 1)),
        nn.LPPool3d(2, (2, 1, 1)),
        nn.MaxPool3d((4, 1, 1), 1, (1, 0, 0)),
    ],
    ids=str,
)
def test_windows_along_the_group_axis_are_faults_of_their_own(layer):
    faults = check_sizes(layer, (1, 4, 9, 9), P4)
    assert len(faults) == 1
    assert "along the group axis" in faults[0].reason
    with torch.no_grad():
        y = layer(torch.zeros(1, 1, 4, 9, 9))
    if y.shape[2] == 4:  # elsewhere it is no map of the group any more
        assert measured(layer, P4, 1, 1, 4, 9, 9) > 0.01
    # nothing is exact but the identity, or the axis is that of volumes
    assert not check_sizes(layer, (1, 3, 9, 9), C(3))
    assert not check_sizes(layer, (1, 6, 9, 9), P4)
    assert not check_sizes(layer, (1, 6, 9, 9), Z2)


def test_weights_of_all_elements_are_no_pooling():
    (fault,) = check_sizes(conv3d((4, 1, 1)), (1, 4, 9, 9), P4)
    assert "along the group axis" in fault.reason


def test_windows_may_have_both_kinds_of_faults():
    group_axis, plane = check_sizes(nn.MaxPool3d(2), (1, 4, 7, 7), P4)
    assert "along the group axis" in group_axis.reason
    assert "6 or 8 pixels" in plane.remedy


def test_one_dimension_is_that_of_columns():
    left = nn.ZeroPad1d((1, 0))
    assert check_sizes(left, (1, 4, 6), PM)
    assert not check_sizes(nn.ZeroPad1d(1), (1, 4, 6), P2)
    (fault,) = check_sizes(nn.ZeroPad1d(1), (1, 6, 6), P4)
    assert "another window along rows" in fault.reason


class Mystery(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.kernel_size, self.parts = 2, nn.ModuleList(parts) if parts else None

    def forward(self, x):
        return x


UNKNOWN = [
    Mystery(), nn.Unfold(2),
    nn.FractionalMaxPool2d(2, 3),
]  # fmt: skip


@pytest.mark.parametrize("layer", UNKNOWN, ids=str)
def test_windows_without_a_rule_are_listed_as_such_and_warned_of(layer):
    (fault,) = check_sizes(layer, (1, 8, 8), P4)
    assert not fault.judged
    assert "cannot be judged" in str(fault)
    with pytest.warns(
        EquivarianceWarning, match=r"perhaps not equivariant to P4.*\n.*equivariance_"
    ):
        require_exact_sizes(layer, (1, 8, 8), P4)
    assert not check_sizes(layer, (1, 8, 8), Z2)
    with pytest.raises(ConfigError, match=r"^not equivariant to P4.*\n.*judged.*\n.*MaxPool2d"):
        require_exact_sizes(nn.Sequential(Mystery(), nn.MaxPool2d(3, 2)), (1, 8, 8), P4)


def test_modules_with_parts_are_judged_by_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_exact_sizes(Mystery(nn.Conv2d(1, 1, 3)), (1, 8, 8), P4)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_every_layer_with_a_rule_of_curvature_has_one_here(case):
    for module in case.make().modules():
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            assert not has_unknown_window(module), module


SPREADS = [
    ({}, P4, ""),
    ({"stride": 2, "padding": 1}, D(4), ""),
    ({"stride": 2, "output_padding": 1}, P4, "adds 1 pixels at the end of columns only"),
    ({"stride": 2, "output_padding": (0, 1)}, PM, "adds 1 pixels at the end of rows only"),
    ({"stride": 2, "output_padding": (1, 0)}, PM, ""),
    ({"stride": (1, 2)}, P4, "another window along rows than along columns"),
    ({"stride": (1, 2)}, P2, ""),
]


@pytest.mark.parametrize(("options", "group", "fault"), SPREADS)
def test_transposed_convolutions_are_judged_as_they_are_measured(options, group, fault):
    layer = nn.ConvTranspose2d(1, 1, 3, bias=False, **options).double()
    nn.init.ones_(layer.weight)  # which the group leaves as they are
    pictures = torch.randn(2, 1, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = " ".join(map(str, check_sizes(layer, (1, 6, 6), group)))
    assert fault in found if fault else not found
    if "another window" not in fault:  # maps are no squares then
        assert (equivariance_error(layer, group, pictures).exact.max > 1e-6) == bool(fault)


def test_transposed_convolutions_along_the_group_axis_mix_elements():
    mixing = nn.ConvTranspose3d(1, 1, (2, 3, 3))
    (fault,) = check_sizes(mixing, (1, 4, 6, 6), P4)
    assert "mixes elements" in str(fault)
    assert not check_sizes(nn.ConvTranspose3d(1, 1, (1, 3, 3)), (1, 4, 6, 6), P4)
