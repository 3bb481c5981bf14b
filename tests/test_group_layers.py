"""Lifting and group convolutions as modules: state, caches, transforms, errors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from margeq.errors import ConfigError, DataError
from margeq.groups import P4, P4M, C, S
from margeq.layers import (
    GroupConv2d,
    IrrepGroupConv2d,
    LiftingConv2d,
    PairSeparableConv2d,
    SeparableGroupConv2d,
    SparseGroupConv2d,
)
from margeq.layers.window import Window

KINDS = ("full", "pointwise", "g", "gc", "depthwise", "dg")


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return GroupConv2d(2, 3, 3, group=P4, separability=request.param, padding=1).double()


@pytest.fixture
def x():
    return torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_has_a_name(kind):
    named = {"in_channels": 2, "out_channels": 3, "kernel_size": 3}
    layer = GroupConv2d(**named, group=P4, separability=kind, groups=1, padding=np.int64(0))
    assert layer(torch.zeros(1, 2, 4, 5, 5)).shape == (1, 3, 4, 3, 3)


def test_subclasses_do_not_turn_into_separable_layers():
    for kind in (SparseGroupConv2d, IrrepGroupConv2d, type("Own", (GroupConv2d,), {})):
        with pytest.raises((ConfigError, TypeError), match="separability"):
            kind(2, 3, 3, group=P4, separability="gc")


def test_separable_kinds_are_modules_of_their_own():
    types = {kind: type(GroupConv2d(2, 3, 3, group=P4, separability=kind)) for kind in KINDS}
    assert types.pop("full") is types.pop("pointwise") is GroupConv2d
    assert set(types.values()) == {SeparableGroupConv2d}


def test_filters_are_kept_until_the_weight_changes(layer, x):
    with torch.no_grad():
        before = layer(x)
        modules = [m for m in layer.modules() if hasattr(m, "kept_filters")]
        assert all(m.kept_filters() is m.kept_filters() for m in modules)
        for parameter in layer.parameters():
            parameter.data.mul_(2.0)  # leaves no version behind
        after = layer(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy.deepcopy(layer)(x))


def test_callers_may_write_to_filters(layer, x):
    with torch.no_grad():
        before = layer(x)
        for module in layer.modules():
            if hasattr(module, "filters"):
                module.filters().zero_()
        torch.testing.assert_close(layer(x), before)


def test_filters_made_under_an_automatic_cast_do_not_stay():
    for group, kind in ((P4, "full"), (C(8), "full"), (P4, "pointwise")):
        layer, x = (
            GroupConv2d(2, 3, 3, group=group, separability=kind),
            torch.ones(1, 2, group.order, 5, 5),
        )
        with torch.no_grad():
            expected = layer(x)
            layer._remembered = type(layer._remembered)()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                layer(x)
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("filters", ["pixels", "band-limited"])
def test_meta_layers_come_to_life_with_their_state(filters):
    source = GroupConv2d(2, 3, 3, group=P4, filters=filters)
    with torch.device("meta"):
        layer = GroupConv2d(2, 3, 3, group=P4, filters=filters)
        irreps = IrrepGroupConv2d(2, 3, 3, group=P4)
        assert LiftingConv2d(1, 2, 3, group=C(8)).weight.is_meta
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 2, 4, 5, 5)
    torch.testing.assert_close(layer(x), source(x))
    whole = IrrepGroupConv2d(2, 3, 3, group=P4)
    irreps.to_empty(device="cpu").load_state_dict(whole.state_dict())
    torch.testing.assert_close(irreps(x), whole(x))
    for given in (source, whole):
        empty = copy.deepcopy(given).to("meta")
        empty.load_state_dict(given.state_dict(), assign=True)
        torch.testing.assert_close(empty(x), given(x))


def test_bases_are_not_rounded_for_good():
    layer = LiftingConv2d(1, 2, 3, group=C(8))
    exact = layer.double().basis.clone()
    assert torch.equal(layer.half().double().basis, exact)


def test_kept_filters_do_not_shadow_other_weights(layer, x):
    with torch.no_grad():
        layer(x)
        zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        assert not torch.func.functional_call(layer, zeros, (x,)).any()


def test_filters_made_in_inference_mode_do_not_stay(layer, x):
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_state_is_the_same_in_both_modes_and_holds_weights_only(layer, x):
    names = set(layer.train().state_dict())
    with torch.no_grad():
        layer.eval()(x)
    assert set(layer.state_dict()) == names == {name for name, _ in layer.named_parameters()}


def test_survives_copies_and_pickles(layer, x):
    with torch.no_grad():
        layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
        assert other.group == layer.group


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_a_graph_break(layer, x, grad):
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_per_datum_by_transforms(layer, x):
    def value(weights, datum):
        return torch.func.functional_call(layer, weights, (datum[None],)).square().sum()

    weights = dict(layer.named_parameters())
    found = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(weights, x)
    value(weights, x[1]).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name][1], parameter.grad)


def test_initial_filters_have_unit_gain():
    torch.manual_seed(0)
    for kind in KINDS:
        y = GroupConv2d(32, 64, 5, group=P4, separability=kind)(torch.randn(4, 32, 4, 9, 9))
        assert 0.6 < float(y.detach().std()) < 1.6, kind
    for filters in ("pixels", "band-limited", "siren"):
        y = LiftingConv2d(32, 64, 5, group=P4, filters=filters)(torch.randn(4, 32, 9, 9))
        assert 0.6 < float(y.detach().std()) < 1.6, filters


def test_sizes_of_the_paper():
    def count(kind):
        layer = GroupConv2d(5, 7, 3, group=P4M, separability=kind, bias=False)
        return sum(p.numel() for p in layer.parameters())

    i, o, h, k = 5, 7, 8, 9
    assert count("full") == o * i * h * k
    assert count("pointwise") == o * i * k
    assert count("g") == o * i * (h + k)
    assert count("gc") == o * (i * h + k)
    assert count("depthwise") == i * k + o * i * h


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"group": S(3)}, "S(3)"),
        ({"separability": "gcc"}, "gcc"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (3, 3)}, "kernel_size"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": "same", "kernel_size": 2}, "same"),
        ({"padding_mode": "wrap"}, "wrap"),
        ({"groups": 2}, "in_channels"),
        ({"groups": 0}, "groups"),
        ({"groups": "2"}, "groups"),
        ({"groups": 2, "separability": "gc"}, "groups"),
        ({"separability": ["gc"]}, "separability"),
        ({"out_channels": 0}, "out_channels"),
        ({"filters": "pixels", "group": C(8)}, "C(8)"),
        ({"filters": "steerable"}, "steerable"),
    ],
)
def test_arguments_out_of_range(options, named):
    arguments = {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "group": P4} | options
    with pytest.raises(ConfigError, match=named.replace("(", r"\(").replace(")", r"\)")):
        GroupConv2d(**arguments)


def test_inputs_of_another_shape():
    with pytest.raises(DataError, match=r"\[n, 2, 4, y, x\].*\(1, 4, 2, 5, 5\)"):
        GroupConv2d(2, 3, 3, group=P4)(torch.zeros(1, 4, 2, 5, 5))
    with pytest.raises(DataError, match=r"\[n, 2, 4, y, x\]"):
        PairSeparableConv2d(2, 3, 3, group=P4)(torch.zeros(1, 2, 5, 5))
    with pytest.raises(DataError, match=r"\[n, 2, y, x\]"):
        LiftingConv2d(2, 3, 3, group=P4)(torch.zeros(1, 3, 5, 5))


def test_windows_cover_a_map_evenly():
    assert Window(3, step=2, padding=1).remainder(33) == 0
    assert Window(3, step=2, padding=1).remainder(32) == 1
