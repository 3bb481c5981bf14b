"""Layers without weights on maps of groups: each commutes with the group and with shifts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError
from margeq.groups import P2, P4, P4M, PM, Z2, C, FiniteGroup, S
from margeq.groups.planar import stencil
from margeq.layers import (
    GroupPool,
    Lift,
    MergeGroup,
    PerElement,
    PolyphaseSubsample,
    RestrictGroup,
    SplitGroup,
)

F64 = torch.float64
SHIFTS = [(0, 0), (1, 0), (3, 5)]


def turn(f, group, u):
    """``(T_u f)(x) = f(u^-1 x)`` for maps ``[..., y, x]``."""
    height, width = f.shape[-2:]
    return f.flatten(-2)[..., stencil(group, height, width)[u]].unflatten(-1, (height, width))


def act(f, group, u):
    """``(L_u f)(g, x) = f(u^-1 g, u^-1 x)`` for maps ``[n, c, g, y, x]``."""
    moved = torch.stack(
        [f[:, :, group.compose(int(group.inverse[u]), g)] for g in range(group.order)], 2
    )
    return turn(moved, group, u)


def shifted(f, shift):
    return f.roll(shift, (-2, -1))


def random_map(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)


# --- pooling over the group


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("group", [P4, PM, P4M])
def test_pooled_maps_turn_and_shift_with_the_input(group, reduction):
    pool, f = GroupPool(group, reduction), random_map(2, 3, group.order, 4, 4)
    for u, shift in product(range(group.order), SHIFTS):
        moved = pool(shifted(act(f, group, u), shift))
        expected = shifted(turn(pool(f), group, u), shift)
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_pooling_reduces_the_group_axis_alone():
    f = random_map(2, 3, 4, 5, 6)
    assert torch.equal(GroupPool(P4)(f), torch.maximum(f[:, :, :2], f[:, :, 2:]).amax(2))
    mean = sum(f[:, :, g] for g in range(4)) / 4
    torch.testing.assert_close(GroupPool(P4, "mean")(f), mean, rtol=1e-12, atol=1e-12)
    assert GroupPool(S(3))(random_map(2, 3, 6)).shape == (2, 3)


# --- restriction to a subgroup


PAIRS = [(P4M, P4), (P4M, PM), (P4M, P2), (P4, P2), (P4, Z2), (P4M, P4M)]


@pytest.mark.parametrize(("group", "subgroup"), PAIRS, ids=str)
def test_restricted_maps_are_maps_of_the_subgroup(group, subgroup):
    restrict, f = RestrictGroup(group, subgroup), random_map(2, 3, group.order, 4, 4)
    y = restrict(f)
    assert y.shape == (2, 3 * group.order // subgroup.order, subgroup.order, 4, 4)
    for k, shift in product(range(subgroup.order), SHIFTS):
        in_group = group.elements_of(subgroup)[k]
        moved = restrict(shifted(act(f, group, in_group), shift))
        assert torch.equal(moved, shifted(act(y, subgroup, k), shift))


@pytest.mark.parametrize(("group", "subgroup"), PAIRS, ids=str)
def test_restriction_only_sorts_the_axis_by_right_cosets(group, subgroup):
    f = random_map(1, 2, group.order, 1, 1)
    y = RestrictGroup(group, subgroup)(f)
    cosets, elements = group.cosets(subgroup), group.elements_of(subgroup)
    for channel, (number, coset) in product(range(2), enumerate(cosets.tolist())):
        for k, element in enumerate(elements):
            source = group.compose(element, coset[0])
            place = channel * len(cosets) + number
            assert torch.equal(y[:, place, k], f[:, channel, source])


def test_restriction_has_no_state_and_follows_the_module():
    layer = RestrictGroup(P4M, P4)
    assert layer.state_dict() == {}
    assert layer.to("meta").cosets.device.type == "meta"


# --- lifting, merging, splitting, one element at a time


def test_lifted_maps_act_as_the_picture_does():
    x = random_map(2, 3, 4, 4)
    for u, shift in product(range(P4M.order), SHIFTS):
        moved = Lift(P4M)(shifted(turn(x, P4M, u), shift))
        assert torch.equal(moved, shifted(act(Lift(P4M)(x), P4M, u), shift))


def test_lifted_elements_do_not_share_memory():
    x = random_map(1, 1, 2, 2)
    lifted = Lift(P4)(x)
    lifted[:, :, 0].zero_()
    assert torch.equal(lifted[:, :, 1], random_map(1, 1, 2, 2))


def test_merged_channels_split_into_the_same_map():
    f = random_map(2, 3, 4, 5, 6)
    merged = MergeGroup()(f)
    assert merged.shape == (2, 12, 5, 6)
    assert torch.equal(merged[:, 4 * 2 + 1], f[:, 2, 1])
    assert torch.equal(SplitGroup(P4)(merged), f)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1)], ids=str)
def test_pooling_per_element_commutes_with_the_group(pool):
    layer, f = PerElement(pool), random_map(2, 3, 8, 6, 6)
    y = layer(f)
    by_hand = torch.stack([pool(f[:, :, g]) for g in range(8)], 2)
    torch.testing.assert_close(y, by_hand, rtol=1e-12, atol=1e-12)
    for u in range(P4M.order):
        torch.testing.assert_close(
            layer(act(f, P4M, u)), act(y, P4M, u), rtol=1e-12, atol=1e-12
        )  # fmt: skip


def test_layers_name_themselves_and_both_shapes():
    four = torch.zeros(2, 3, 5, 5)
    for layer in (GroupPool(P4, "mean"), RestrictGroup(P4, P2)):
        name = type(layer).__name__
        with pytest.raises(DataError, match=rf"{name}\(.*\[n, c, 4, \*space\].*\(2, 3, 5, 5\)"):
            layer(four)
    with pytest.raises(
        DataError, match=r"SplitGroup\(P4\).*\[n, c \* 4, \*space\].*\(2, 3, 5, 5\)"
    ):
        SplitGroup(P4)(four)
    for layer in (MergeGroup(), PerElement(nn.Identity()), GroupPool(C(3))):
        with pytest.raises(DataError, match=rf"{type(layer).__name__}.*got \(2, 3\)"):
            layer(torch.zeros(2, 3))
    with pytest.raises(DataError, match=r"Lift.*got \(3,\)"):
        Lift(P4)(torch.zeros(3))


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="'sum': use 'max' or 'mean'"):
        GroupPool(P4, "sum")
    with pytest.raises(ConfigError, match="P4M is no subgroup of P4"):
        RestrictGroup(P4, P4M)
    with pytest.raises(ConfigError, match=r"PerElement: Conv2d.*keeps the number of channels"):
        PerElement(nn.Conv2d(8, 6, 1))(torch.zeros(1, 2, 4, 3, 3))


# --- one phase for channels and elements


def is_some_shift(y, reference):
    shifts = product(range(y.shape[-2]), range(y.shape[-1]))
    return min(float((y - shifted(reference, s)).abs().max()) for s in shifts) == 0.0


@pytest.mark.parametrize("size", [4, 6])
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 1), (3, 2)])
@pytest.mark.parametrize("group", [P4, P4M])
def test_polyphase_commutes_with_the_group_and_shifts(group: FiniteGroup, shift, size):
    pool, f = PolyphaseSubsample(), random_map(6, 2, group.order, size, size)
    y = pool(f)
    for u in range(group.order):
        moved, expected = pool(shifted(act(f, group, u), shift)), act(y, group, u)
        assert all(is_some_shift(a, b) for a, b in zip(moved, expected, strict=True))
        if shift == (0, 0):
            assert torch.equal(moved, expected)


def test_polyphase_takes_one_phase_per_sample_for_all_elements():
    pool, f = PolyphaseSubsample(), random_map(8, 2, 4, 6, 6)
    y = pool(f)
    assert torch.equal(y, torch.cat([pool(one[None]) for one in f]))
    phases = [f[..., a::2, b::2] for a in (0, 1) for b in (0, 1)]
    largest = torch.stack([phase.square().flatten(1).sum(1) for phase in phases]).argmax(0)
    assert len(largest.unique()) > 1  # the samples disagree, and each has its own
    for n, number in enumerate(largest.tolist()):
        assert torch.equal(y[n], phases[number][n])


def test_polyphase_of_each_element_alone_is_no_map_of_the_group():
    """Why the norm runs over the elements jointly: they would choose apart."""
    f = random_map(4, 2, 4, 6, 6)
    apart = torch.stack([PolyphaseSubsample()(f[:, :, g]) for g in range(4)], 2)
    assert float((apart - PolyphaseSubsample()(f)).abs().max()) > 0.1


def test_polyphase_refuses_odd_maps_of_groups():
    with pytest.raises(DataError, match="even sizes, got a map of 5 x 4"):
        PolyphaseSubsample()(torch.zeros(1, 2, 4, 5, 4))
