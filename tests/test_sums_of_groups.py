"""Sums over several groups (ELLA eq. 27): convolutions that commute with a subgroup only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.errors import ConfigError, DataError
from margeq.groups import P4, P4M, C, D
from margeq.groups.planar import stencil
from margeq.layers import GroupConv2d, Linear2d, MergeGroup, ResidualPathways, SubgroupConv2d
from margeq.layers.pathways import span_dimension
from margeq.paths import path_sums
from margeq.training.function_scale import function_scale
from tests.oracles import F64, relative_error

SUBGROUPS = {"z2": C(1), "c2": C(2), "c4": C(4), "d4": D(4)}
MIRRORED = {"pm": D(1), "pmm": D(2)}  # sorting by their cosets is not its own inverse
EACH = pytest.mark.parametrize("name", [*SUBGROUPS, *MIRRORED])
CIRCULAR = {"padding": 1, "padding_mode": "circular"}


def act(group, u, maps):
    """``(L_u f)(g, x) = f(u^-1 g, u^-1 x)`` of maps ``[n, c, g, y, x]``."""
    sources = stencil(group, *maps.shape[-2:])[u]
    return maps[:, :, group.relative[u]].flatten(3)[..., sources].view_as(maps)


def layer_of(name, channels=(1, 1), group=P4M, **options):
    subgroup, options = (SUBGROUPS | MIRRORED)[name], {"padding": 1, **options}
    return SubgroupConv2d(*channels, 3, group=group, subgroup=subgroup, **options).double()


def maps_of(n=2, channels=1, size=5):
    return torch.randn(n, channels, 8, size, size, dtype=F64)


def randomised(layer):
    """Frozen, with standard normal weights."""
    for parameter in layer.requires_grad_(False).parameters():
        parameter.normal_()
    return layer


@EACH
def test_commutes_with_the_subgroup_and_with_nothing_else(name):
    layer, x = randomised(layer_of(name, (2, 3))), maps_of(channels=2)
    inside = P4M.elements_of(layer.subgroup)
    for u in range(8):
        error = relative_error(layer(act(P4M, u, x)), act(P4M, u, layer(x)))
        assert (error < 1e-12) == (u in inside), f"element {u}: {error}"


@EACH
def test_commutes_with_shifts(name):
    layer, x = randomised(layer_of(name, **CIRCULAR)), maps_of()
    shift = ((1, 2), (-2, -1))
    assert relative_error(layer(x.roll(*shift)), layer(x).roll(*shift)) < 1e-12


def test_the_whole_group_is_the_group_convolution():
    layer = randomised(layer_of("d4", (2, 3)))
    full = GroupConv2d(2, 3, 3, group=P4M, padding=1).double()
    full.load_state_dict(layer.conv.state_dict())
    x = maps_of(channels=2)
    torch.testing.assert_close(layer(x), full(x), rtol=1e-12, atol=1e-12)


def test_shifts_alone_are_an_ordinary_convolution():
    layer, x = randomised(layer_of("z2")), maps_of()
    filters = layer.conv.weight.detach().view(8, 8, 3, 3)
    expected = nn.functional.conv2d(x[:, 0], filters, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x)[:, 0], expected, rtol=1e-12, atol=1e-12)


@EACH
def test_dense_filters_are_those_of_the_map(name):
    layer, x = randomised(layer_of(name, (2, 3), bias=False)), maps_of(channels=2)
    filters = layer.dense_filters().flatten(2, 3).flatten(0, 1)
    expected = nn.functional.conv2d(x.flatten(1, 2), filters, padding=1).view(2, 3, 8, 5, 5)
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


def span(name):
    """A basis of all filters of a layer, one row per weight."""
    layer = layer_of(name, bias=False)
    rows = []
    for index in range(layer.conv.weight.numel()):
        with torch.no_grad():
            layer.conv.weight.zero_().view(-1)[index] = 1.0
            rows.append(layer.dense_filters().flatten())
    return torch.stack(rows)


def test_spaces_are_nested():
    """V_D4 < V_C4 < V_C2 < V_Z2, each half of the next."""
    spans = {name: span(name) for name in SUBGROUPS}
    assert [torch.linalg.matrix_rank(s).item() for s in spans.values()] == [576, 288, 144, 72]
    for larger, smaller in (("z2", "c2"), ("c2", "c4"), ("c4", "d4")):
        # every weight appears equally often, so rows are orthogonal
        unit = spans[larger] / spans[larger].norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.mT, torch.eye(len(unit), dtype=F64))
        inside = spans[smaller] @ unit.mT @ unit
        torch.testing.assert_close(inside, spans[smaller], rtol=0, atol=1e-12)
        outside = spans[larger] @ torch.linalg.pinv(spans[smaller]) @ spans[smaller]
        assert relative_error(outside, spans[larger]) > 0.5


@pytest.mark.parametrize(
    ("group", "expected"),
    [(P4M, {"d4": 72, "c4": 144, "c2": 288, "z2": 576}), (P4, {"c4": 36, "c2": 72, "z2": 144})],
    ids=str,
)
def test_dimensions_order_the_paths(group, expected):
    paths = {name: layer_of(name, group=group) for name in expected}
    assert {name: span_dimension(path) for name, path in paths.items()} == expected
    layer = ResidualPathways(paths)
    assert layer.less_constrained() == tuple(expected)[1:]


def group_sum():
    """All subgroups, and any linear map."""
    paths = {name: layer_of(name, (1, 2)) for name in reversed(SUBGROUPS)}
    return ResidualPathways(paths | {"fc": Linear2d(1, 2, (8, 4, 4), (8, 4, 4))}).double()


def test_a_sum_of_paths_commutes_with_what_all_of_them_commute_with():
    model, x = randomised(group_sum()), maps_of(size=4)
    switched_off = []
    for name in ("fc", "z2", "c2", "c4"):
        model.switch_off(name)
        switched_off.append(name)
        left = next(group for group in SUBGROUPS if group in model.active)
        inside = P4M.elements_of(SUBGROUPS[left])
        for u in range(8):
            error = relative_error(model(act(P4M, u, x)), act(P4M, u, model(x)))
            assert (error < 1e-12) == (u in inside), f"without {switched_off}, element {u}"


def test_every_path_starts_at_unit_scale():
    model, x = group_sum(), torch.randn(100, 1, 8, 4, 4, dtype=F64)
    weights = dict(model.named_parameters())
    scale = function_scale(model, weights, x)
    for name in SUBGROUPS:
        assert scale.precision[f"paths.{name}.conv.weight"] == pytest.approx(72 / 25)
    assert set(path_sums(model)[""].less_constrained(scale.shapes)) == {"c4", "c2", "z2", "fc"}


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_the_evidence_finds_the_subgroup():
    x = maps_of(40, size=3)
    y = randomised(layer_of("c4", bias=False))(x).flatten(1) / 9.0
    model = nn.Sequential(
        ResidualPathways({n: layer_of(n, bias=False) for n in ("d4", "c4", "z2")}),
        MergeGroup(), nn.Flatten(),
    ).double()  # fmt: skip
    y = y + 0.05 * torch.randn(y.shape, dtype=F64)
    result = margeq.optimize_marglik(
        model, [(x, y)], likelihood="regression", n_epochs=60, marglik_frequency=10,
        n_epochs_burnin=10, optimizer_kwargs={"lr": 0.05}, restarts="symmetric",
    )  # fmt: skip
    shares = {row.path: row.function_share for row in result.effective_dimension().paths}
    assert shares["z2"] < 0.01
    assert shares["c4"] > 0.4  # the rest lies in what the whole group can do


def test_other_groups_and_maps_are_refused():
    with pytest.raises(ConfigError, match="no subgroup"):
        SubgroupConv2d(1, 1, 3, group=P4, subgroup=C(3))
    with pytest.raises(DataError, match="needs maps"):
        layer_of("c2")(torch.zeros(1, 1, 4, 5, 5, dtype=F64))
