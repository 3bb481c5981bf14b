"""The rule of exact sizes is what is measured, for every stride, padding and pooling."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError, EquivarianceWarning
from margeq.groups import P2, P4, P4M, PM, Z2, C
from margeq.layers import GroupConv2d, LiftingConv2d, PerElement, PolyphaseSubsample
from margeq.layers.sizes import check_sizes, require_exact_sizes
from margeq.models.resnet import resnet44
from margeq.testing import equivariance_error
from tests.oracles import F64, Lambda, net

SIZES = range(5, 21)
ODD = {n for n in SIZES if n % 2}
EVEN = set(SIZES) - ODD


def conv(size, stride, padding, **options):
    return GroupConv2d(1, 1, size, group=P4M, stride=stride, padding=padding, **options)


def pool(make, *args, **options):
    return PerElement(make(*args, **options))


RULE = {
    "k3s1p1": (conv(3, 1, 1), set(SIZES)),
    "k4s1p1": (conv(4, 1, 1), set(SIZES)),
    "k3s2p1": (conv(3, 2, 1), ODD),
    "k3s2p0": (conv(3, 2, 0), ODD),
    "k5s2p2": (conv(5, 2, 2), ODD),
    "k1s2": (conv(1, 2, 0), ODD),
    "k3s2p1 circular": (conv(3, 2, 1, padding_mode="circular"), ODD),
    "k3s2p0 dilated": (conv(3, 2, 0, dilation=2), ODD),
    "k2s2": (conv(2, 2, 0), EVEN),
    "k4s2p0": (conv(4, 2, 0), EVEN),
    "k4s2p1": (conv(4, 2, 1), EVEN),
    "k2s2 dilated": (conv(2, 2, 0, dilation=2), ODD),
    "k3s3p1": (conv(3, 3, 1), {n for n in SIZES if n % 3 == 1}),
    "max k3s2": (pool(nn.MaxPool2d, 3, 2), ODD),
    "max k3s2p1": (pool(nn.MaxPool2d, 3, 2, 1), ODD),
    "max k3s2 dilated": (pool(nn.MaxPool2d, 3, 2, dilation=2), ODD),
    "max k2s2": (pool(nn.MaxPool2d, 2), EVEN),
    "max k2s2 ceil": (pool(nn.MaxPool2d, 2, ceil_mode=True), EVEN),
    "mean k2s2": (pool(nn.AvgPool2d, 2), EVEN),
    "mean k2s2 ceil": (pool(nn.AvgPool2d, 2, ceil_mode=True), EVEN),
    "mean k3s2p1 ceil": (pool(nn.AvgPool2d, 3, 2, 1, ceil_mode=True), ODD),
}


@pytest.mark.parametrize("name", RULE)
def test_rule_measurement_and_table_agree(name):
    layer, exact = net(RULE[name][0]), RULE[name][1]
    for n in SIZES:
        says = not check_sizes(layer, (1, 8, n, n), P4M)
        found = equivariance_error(layer, P4M, torch.randn(1, 1, 8, n, n, dtype=F64)).exact.max
        assert found < 1e-12 or found > 0.05, (n, found)
        assert says == (found < 1e-12) == (n in exact), n


def test_polyphase_needs_even_sizes_and_is_named_although_it_stops_the_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), PolyphaseSubsample(), nn.MaxPool2d(2))
    assert not check_sizes(model, (1, 8, 8), P4)
    (fault,) = check_sizes(model, (1, 7, 7), P4)
    assert (fault.layer, fault.kind, fault.extents) == ("1", "PolyphaseSubsample", (7, 7))
    assert "6 or 8 pixels" in fault.remedy


def test_other_failures_of_a_forward_come_through():
    with pytest.raises(DataError, match="LiftingConv2d"):
        check_sizes(LiftingConv2d(3, 2, 3, group=P4), (1, 8, 8), P4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_padding_has_to_be_the_same_at_both_ends(size):
    layer = nn.Conv2d(1, 1, size, padding="same", padding_mode="circular").double()
    layer.weight.data.fill_(1.0)  # commutes with everything but for the padding
    faults = check_sizes(layer, (1, 8, 8), P4)
    found = equivariance_error(layer, P4, torch.randn(1, 1, 8, 8, dtype=F64)).exact.max
    assert bool(faults) == (found > 1e-3) == (size % 2 == 0)
    assert all("pads" in fault.reason and "odd kernel_size" in fault.remedy for fault in faults)


@pytest.mark.parametrize("group", [Z2, PM, P2, P4, C(8), C(3)])
def test_only_axes_that_the_group_reverses_matter(group):
    wide = nn.MaxPool2d((3, 2), (2, 2))  # rows: odd only, columns: even only
    faults = {
        (rows, columns): bool(check_sizes(wide, (1, rows, columns), group))
        for rows in (8, 9)
        for columns in (8, 9)
        if group not in (P4, C(8)) or rows == columns
    }
    if group in (Z2, C(3)):
        assert not any(faults.values())
    elif group == PM:
        assert faults == {(8, 8): False, (8, 9): True, (9, 8): False, (9, 9): True}
    elif group == P2:
        assert faults == {(8, 8): True, (8, 9): True, (9, 8): False, (9, 9): True}
    else:
        assert faults == {(8, 8): True, (9, 9): True}


def test_measured_faults_of_rows_and_columns_are_the_predicted_ones():
    layer = nn.MaxPool2d((3, 2), (2, 2))
    for group in (Z2, PM, P2):
        for rows in (8, 9):
            for columns in (8, 9):
                found = equivariance_error(layer, group, torch.randn(2, 3, rows, columns))
                faults = check_sizes(layer, (3, rows, columns), group)
                assert bool(faults) == (found.exact.max > 0.01)


@pytest.mark.parametrize(
    ("layer", "size", "remedy"),
    [
        (nn.Conv2d(1, 1, 3, 2, 1), 32, "maps of 31 or 33 pixels, or kernel_size=2 or 4"),
        (nn.Conv2d(1, 1, 3, 3, 1), 6, "4 or 7 pixels, or padding=0, or kernel_size=2 or 5"),
        (nn.Conv2d(1, 1, 5, 3, 1), 7, "6 or 9 pixels, or padding=2, or kernel_size=3 or 6"),
        (nn.MaxPool2d(2), 5, "maps of 4 or 6 pixels, or kernel_size=1 or 3"),
        (nn.MaxPool2d(2), 3, "maps of 2 or 4 pixels, or kernel_size=1 or 3"),
        (nn.Conv2d(1, 1, 2, 5, 3), 3, "maps of 1 or 6 pixels"),
    ],
)
def test_remedies_work(layer, size, remedy):
    (fault,) = check_sizes(layer, (1, size, size), P4)
    assert remedy in fault.remedy
    for way in fault.remedy.split(", or "):
        name, _, values = way.rpartition("=")
        for value in map(
            int, [w for w in values.replace("use maps of ", "").split() if w.isdigit()]
        ):
            arguments = {
                "kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding,
            }  # fmt: skip
            changed = arguments | ({name: value} if name else {})
            channels = (1, 1) if isinstance(layer, nn.Conv2d) else ()
            other = type(layer)(*channels, **changed)
            assert not check_sizes(other, (1, *(2 * [size if name else value])), P4), way


def test_windows_that_differ_between_axes_break_quarter_turns_only():
    layer = nn.AvgPool2d((1, 3), 1)
    assert not check_sizes(layer, (1, 6, 6), P2)
    (fault,) = check_sizes(layer, (1, 6, 6), P4)
    assert "rows than along columns" in fault.reason
    assert equivariance_error(layer, P2, torch.randn(1, 1, 6, 6)).exact.max < 1e-5


def test_quarter_turns_need_square_inputs():
    with pytest.raises(DataError, match=r"square maps, got input_shape=\(1, 6, 7\)"):
        check_sizes(nn.Identity(), (1, 6, 7), P4)
    assert not check_sizes(nn.Identity(), (1, 6, 7), P2)


def test_layers_are_named_in_their_order_and_once():
    shared = nn.MaxPool2d(3, 2, 1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Sequential(shared, nn.ReLU()), shared)
    faults = check_sizes(model, (1, 16, 16), P4)
    assert [(fault.layer, fault.extents[0]) for fault in faults] == [
        ("0", 16),
        ("1.0", 8),
        ("1.0", 4),
    ]
    again = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=2))
    twice = Lambda(lambda x: again(again(x)))
    twice.inner = again
    assert [fault.layer for fault in check_sizes(twice, (1, 8, 8), P4)] == ["inner.0"]


def test_resnet44_is_exact_at_33_and_not_at_32():
    model = resnet44(P4M, (1, 1, 1), head="pool").double()
    assert not check_sizes(model, (3, 33, 33), P4M)
    faults = check_sizes(model, (3, 32, 32), P4M)
    assert [(fault.layer, fault.extents) for fault in faults] == [
        ("stage2.0.conv1", (32, 32)),
        ("stage2.0.shortcut.0", (32, 32)),
        ("stage3.0.conv1", (16, 16)),
        ("stage3.0.shortcut.0", (16, 16)),
    ]
    with pytest.raises(ConfigError, match=r"not equivariant to P4M.*\n- stage2.0.conv1 \(Group"):
        require_exact_sizes(model, (3, 32, 32), P4M)
    with pytest.warns(EquivarianceWarning, match="31 or 33 pixels"):
        require_exact_sizes(model, (3, 32, 32), P4M, action="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_exact_sizes(model, (3, 33, 33), P4M)
    model.eval()
    errors = [
        equivariance_error(model, P4M, torch.randn(1, 3, n, n, dtype=F64)).exact.max
        for n in (32, 33)
    ]
    assert errors[0] > 1e-4 and errors[1] < 1e-12  # noqa: PT018


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(LiftingConv2d(1, 2, 3, group=P4), nn.BatchNorm3d(2), nn.Dropout())
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_sizes(model, (1, 8, 8), P4)
    assert [m.training for m in model] == [False, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_action_is_refused():
    with pytest.raises(ConfigError, match="action='ignore'"):
        require_exact_sizes(nn.Identity(), (1, 4, 4), P4, action="ignore")  # pyright: ignore[reportArgumentType]
