"""What is no group, no shape or no option is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError
from margeq.groups import (
    P4,
    P4M,
    C,
    D,
    FiniteGroup,
    Representation,
    S,
    act,
    irreps,
    is_exact,
    regular,
    standard,
    stencil,
    trivial,
)  # fmt: skip
from margeq.groups.action import maps_pixels_to_pixels
from margeq.layers import (
    GroupConv2d,
    GroupPool,
    Lift,
    RestrictGroup,
    SplitGroup,
    SubgroupConv2d,
    check_sizes,
    expand_to,
)  # fmt: skip
from margeq.models.planar_layers import PlanarLayers
from margeq.testing import equivariance_error

X = torch.zeros(1, 1, 5, 5)
ONES = torch.ones(1, 1, 1)

TAKES_GROUP = {
    "RestrictGroup": lambda g: RestrictGroup(g, P4),
    "GroupPool": GroupPool,
    "Lift": Lift,
    "SplitGroup": SplitGroup,
    "act": lambda g: act(X, g, 1, "picture"),
    "stencil": lambda g: stencil(g, 3, 3),
    "is_exact": is_exact,
    "maps_pixels_to_pixels": lambda g: maps_pixels_to_pixels(g, 0),
    "regular": regular,
    "standard": standard,
    "irreps": irreps,
    "Representation": lambda g: Representation(g, ONES),
    "check_sizes": lambda g: check_sizes(nn.Identity(), (1, 5, 5), g),
    "equivariance_error": lambda g: equivariance_error(nn.Identity(), g, X),
    "SubgroupConv2d": lambda g: SubgroupConv2d(1, 1, 3, group=g, subgroup=P4),
    "PlanarLayers": PlanarLayers,
}
TAKES_SUBGROUP = {
    "RestrictGroup": lambda g: RestrictGroup(P4M, g),
    "SubgroupConv2d": lambda g: SubgroupConv2d(1, 1, 3, group=P4M, subgroup=g),
    "expand_to": lambda g: expand_to(GroupConv2d(1, 1, 3, group=P4M), g),
    "method": lambda g: GroupConv2d(1, 1, 3, group=P4M, separability="gc").expand_to(g),
    "cosets": P4M.cosets,
    "has_subgroup": P4M.has_subgroup,
}


@pytest.mark.parametrize("wrong", ["P4", 4, None, [P4], P4.matrices], ids=type)
@pytest.mark.parametrize("name", TAKES_GROUP)
def test_what_is_no_group_is_refused(name, wrong):
    with pytest.raises(ConfigError, match=r"(?s)^group=.*: use a FiniteGroup such as margeq") as e:
        TAKES_GROUP[name](wrong)
    assert repr(wrong)[:40] in str(e.value)


@pytest.mark.parametrize("wrong", ["P4", 4, [P4]], ids=type)
@pytest.mark.parametrize("name", TAKES_SUBGROUP)
def test_what_is_no_subgroup_is_refused(name, wrong):
    with pytest.raises(ConfigError, match=r"^subgroup=.*: use a FiniteGroup such as margeq"):
        TAKES_SUBGROUP[name](wrong)


NAN, TWICE = torch.eye(2).repeat(2, 1, 1), torch.eye(2)
NAN[1, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trivial("P4"), "^of='P4': use a FiniteGroup"),
        (lambda: C([4]), r"C\(\[4\]\): use a whole number"),
        (lambda: D([4]), r"D\(\[4\]\): use a whole number"),
        (lambda: S([4]), r"S\(\[4\]\): use a whole number"),
        (lambda: C(4.0), r"C\(4.0\): use a whole number"),
        (lambda: C(True), r"C\(True\): use a whole number"),
        (lambda: FiniteGroup("x", [[1]]), r"x: matrices must be a real tensor, got \[\[1\]\]"),
        (lambda: FiniteGroup("x", NAN), "x: matrices have entries that are not finite"),
        (lambda: FiniteGroup("x", ONES * 1j), "x: matrices must be a real tensor"),
        (lambda: FiniteGroup("x", ONES[:0]), r"x: matrices \(0, 1, 1\) must be \[count, d, d\]"),
        (lambda: act(X, P4, "1", "picture"), "element='1' of P4"),
        (lambda: act(X, P4, 1.5, "picture"), "element=1.5 of P4"),
        (lambda: act(X, P4, -1, "picture"), "element=-1 of P4"),
        (lambda: act(X, P4, 1, "picture", shift=1), "shift=1: use whole numbers"),
        (lambda: act(X, P4, 1, "picture", shift=(1, 0.5)), r"shift=\(1, 0.5\): use whole"),
        (lambda: equivariance_error(nn.Identity(), P4, X, shifts=[1]), r"shifts=\[1\]: use pairs"),
        (lambda: equivariance_error(nn.Identity(), P4, X, shifts=3), "shifts=3: use pairs"),
        (lambda: equivariance_error(nn.Identity(), P4, X, shifts="ab"), "shifts='ab': use pairs"),
        (lambda: equivariance_error(nn.Identity(), S(3), X), r"S\(3\) does not act on the plane"),
        (lambda: check_sizes(nn.Identity(), (8,), P4), r"input_shape=\(8,\): use the shape of one"),
        (lambda: check_sizes(nn.Identity(), 8, P4), "input_shape=8: use the shape of one"),
        (lambda: check_sizes(nn.Identity(), (1, 8, "8"), P4), "use the shape of one datum"),
        (lambda: SubgroupConv2d(1.5, 1, 3, group=P4M, subgroup=P4), "in_channels=1.5 must be"),
        (lambda: SubgroupConv2d(1, "a", 3, group=P4M, subgroup=P4), "out_channels='a' must be"),
        (lambda: SubgroupConv2d(1, 1, 3, group=P4M, subgroup=P4, foo=1),
         r"unknown options \['foo'\]; use some of \('separability', 'stride', "),
        (lambda: SubgroupConv2d(1, 1, 3, group=P4M, subgroup=P4, separability="gc"),
         "SubgroupConv2d: separability='gc': use 'full' or 'pointwise'"),
        (lambda: SubgroupConv2d(1, 1, 3, group=P4M, subgroup=P4, separability=[]),
         r"SubgroupConv2d: separability=\[\]: use 'full'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_whole_numbers_of_any_type_are_the_same_group():
    assert C(torch.tensor(4).numpy()[()]) is P4
    assert D(4) is P4M


@pytest.mark.parametrize("separability", ["full", "pointwise"])
def test_kinds_that_are_taken_have_dense_filters(separability):
    layer = SubgroupConv2d(2, 1, 3, group=P4M, subgroup=P4, separability=separability)
    assert layer.dense_filters().shape == (1, 8, 2, 8, 3, 3)


def test_maps_that_cannot_be_turned_name_the_group_that_was_given():
    with pytest.raises(DataError, match=r"element 1 of P4 swaps rows.*got 5 x 6"):
        act(torch.zeros(1, 1, 5, 6), P4, 1, "picture")
    with pytest.raises(DataError, match=r"element 2 of C\(8\) swaps rows.*got 5 x 6"):
        act(torch.zeros(1, 1, 5, 6), C(8), 2, "picture")
