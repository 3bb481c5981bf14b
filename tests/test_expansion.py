"""Layers of a group as layers of its subgroups: the same outputs, to 1e-12 in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P2, P4, P4M, PM, Z2, C, D
from margeq.layers import (
    GroupConv2d,
    LiftingConv2d,
    MergeGroup,
    PairSeparableConv2d,
    RestrictGroup,
    SeparableGroupConv2d,
)
from margeq.layers.expansion import expand_to, to_conv2d
from margeq.testing import equivariance_error
from tests.oracles import F64, net

KINDS = ["full", "pointwise", "depthwise", "dg", "g", "gc"]
PAIRS = [
    (P4M, P4), (P4M, D(2)), (P4M, P2), (P4M, PM), (P4M, Z2), (P4M, P4M), (P4, P2), (D(2), PM),
    (C(8), P4), (C(8), P2), (C(8), Z2), (D(8), P4M), (D(3), PM),
]  # fmt: skip
ON_PAIRS = pytest.mark.parametrize(("group", "subgroup"), PAIRS, ids=repr)
WINDOWS = [
    {},
    {"padding": 1},
    {"padding": "same", "bias": False},
    {"padding": 2, "stride": 2, "padding_mode": "circular"},
    {"padding": 1, "stride": 3, "padding_mode": "reflect"},
    {"padding": 1, "dilation": 2, "padding_mode": "replicate"},
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make(group, kind, channels=(2, 4), size=3, **options):
    if kind == "lifting":
        return net(LiftingConv2d(*channels, size, group=group, **options))[0]
    return net(GroupConv2d(*channels, size, group=group, separability=kind, **options))[0]


def assert_expanded(layer, subgroup):
    group = layer.group
    restrict, lifts = RestrictGroup(group, subgroup), isinstance(layer, LiftingConv2d)
    elements = () if lifts else (group.order,)
    x = torch.randn(2, layer.in_channels, *elements, 7, 7, dtype=F64)
    expanded = expand_to(layer, subgroup)
    y = expanded(x if lifts else restrict(x))
    torch.testing.assert_close(y, restrict(layer(x)), rtol=1e-12, atol=1e-12)
    conv = to_conv2d(layer)
    assert {type(m) for m in conv.modules()} <= {nn.Conv2d, nn.Sequential}
    merged = conv(x if lifts else MergeGroup()(x))
    torch.testing.assert_close(merged, MergeGroup()(layer(x)), rtol=1e-12, atol=1e-12)
    return expanded


@ON_PAIRS
@pytest.mark.parametrize("kind", ["lifting", *KINDS])
def test_outputs_are_those_of_the_group(group, subgroup, kind):
    assert_expanded(make(group, kind, padding=1), subgroup)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", ["lifting", *KINDS])
def test_windows_go_along(kind, window):
    assert_expanded(make(P4M, kind, **window), PM)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", ["lifting", *KINDS])
def test_kernels_of_all_sizes(kind, size):
    assert_expanded(make(P4M, kind, size=size, padding=size // 2), P4)


@pytest.mark.parametrize("kind", ["lifting", "full", "pointwise"])
@pytest.mark.parametrize(("groups", "channels"), [(2, (4, 6)), (3, (3, 6)), (3, (3, 3))])
def test_blocks_of_channels_stay_blocks(kind, groups, channels):
    for subgroup in (P4, P2, Z2):
        layer = make(P4M, kind, channels, groups=groups)
        expanded = assert_expanded(layer, subgroup)
        depthwise = kind == "pointwise" and channels == (3, 3)
        cosets = P4M.order // subgroup.order
        assert expanded.window.groups == groups * (cosets if depthwise else 1)


@pytest.mark.parametrize("filters", ["bilinear", "band-limited", "siren"])
@pytest.mark.parametrize("kind", ["lifting", *KINDS])
def test_interpolated_filters_become_pixels(filters, kind):
    expanded = assert_expanded(make(C(8), kind, size=5, filters=filters, padding=2), P4)
    assert all(m.filter_kind == "pixels" for m in expanded.modules() if hasattr(m, "filter_kind"))


def test_free_weights():
    layer = make(P4M, "full", (2, 3))
    numbers = [expand_to(layer, k).weight.numel() for k in (P4M, P4, D(2), P2, PM, Z2)]
    assert numbers == [432, 864, 864, 1728, 1728, 3456]


def test_the_kind_of_the_new_layer():
    assert isinstance(expand_to(make(P4M, "lifting"), P4), LiftingConv2d)
    pairs = make(P4M, "g").pairs
    assert isinstance(pairs, PairSeparableConv2d)
    assert expand_to(pairs, P4).separability == "full"
    assert expand_to(make(P4M, "pointwise"), P4).separability == "pointwise"
    chain = make(P4M, "dg")
    expanded = expand_to(chain, P4)
    assert isinstance(chain, SeparableGroupConv2d)
    assert type(expanded) is nn.Sequential
    assert [name for name, _ in expanded.named_children()] == ["plane", "elements", "channels"]
    assert expanded.plane.window.groups == 4
    assert to_conv2d(chain).plane.groups == 16


def test_expansions_follow_each_other():
    layer = make(P4M, "full")
    direct, by_way = expand_to(layer, P2), expand_to(expand_to(layer, P4), P2)
    f = torch.randn(1, 2, 8, 5, 5, dtype=F64)
    through = RestrictGroup(P4, P2)(RestrictGroup(P4M, P4)(f))
    expected = RestrictGroup(P4, P2)(RestrictGroup(P4M, P4)(layer(f)))
    torch.testing.assert_close(by_way(through), expected, rtol=1e-12, atol=1e-12)
    assert direct.weight.shape == by_way.weight.shape


def test_a_changed_weight_breaks_the_group_but_not_the_subgroup():
    expanded = expand_to(make(P4M, "full", padding=1), P4)
    expanded.weight.add_(0.1 * torch.randn_like(expanded.weight))
    f = torch.randn(1, 4, 4, 6, 6, dtype=F64)
    assert equivariance_error(expanded, P4, f).exact.max < 1e-12


@pytest.mark.parametrize("kind", ["full", "depthwise"])
def test_the_given_layer_and_the_random_state_stay(kind):
    layer = make(P4M, kind).eval().float()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in layer.state_dict().items()}
    for new in (expand_to(layer, P4), to_conv2d(layer)):
        assert not any(module.training for module in new.modules())
        for parameter in new.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad
            parameter.fill_(float("nan"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in layer.state_dict().items())
    assert torch.isfinite(layer(torch.randn(1, 2, 8, 5, 5))).all()


@pytest.mark.parametrize("kind", ["lifting", *KINDS])
@pytest.mark.parametrize("subgroup", [P4M, PM, C(3)], ids=repr)
def test_other_groups_are_refused(kind, subgroup):
    with pytest.raises(ConfigError, match=r"no subgroup of P4|moves pixels between pixels"):
        expand_to(make(P4, kind), subgroup)


def test_subgroups_between_pixels_and_other_layers_are_refused():
    with pytest.raises(ConfigError, match=r"C\(8\) cannot be expanded to C\(8\), which moves"):
        expand_to(make(C(8), "full"), C(8))
    for convert in (to_conv2d, lambda layer: expand_to(layer, Z2)):
        with pytest.raises(ConfigError, match="Conv2d cannot be expanded to Z2"):
            convert(nn.Conv2d(1, 1, 3))


@pytest.mark.parametrize("separability", ["full", "gc"])
def test_expansion_is_a_method_too(separability):
    layer = GroupConv2d(2, 2, 3, group=P4M, separability=separability)
    torch.testing.assert_close(layer.expand_to(P4).state_dict(), expand_to(layer, P4).state_dict())


def trains(layer):
    return {name.rpartition(".")[2]: p.requires_grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("convert", [to_conv2d, lambda layer: expand_to(layer, P4)])
@pytest.mark.parametrize("kind", ["lifting", *KINDS])
def test_frozen_weights_stay_frozen(kind, convert):
    layer = make(P4M, kind)
    assert all(p.requires_grad for p in convert(layer.requires_grad_(True)).parameters())
    assert not any(p.requires_grad for p in convert(layer.requires_grad_(False)).parameters())


@pytest.mark.parametrize("convert", [to_conv2d, lambda layer: expand_to(layer, P4)])
def test_weights_and_biases_freeze_apart(convert):
    layer = make(P4M, "full")
    layer.weight.requires_grad_(False)
    assert trains(convert(layer)) == {"weight": False, "bias": True}
    pairs = make(P4M, "g").pairs
    pairs.weight.requires_grad_(False)
    pairs.bias.requires_grad_(False)
    assert trains(convert(pairs)) == {"weight": True, "bias": False}
