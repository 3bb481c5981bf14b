"""Tables of groups are on the CPU whatever the default device; buffers of layers follow them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from margeq.curvature.fourier import _harmonics, harmonics
from margeq.groups import (
    P4,
    P4M,
    C,
    D,
    FiniteGroup,
    S,
    act,
    invariants,
    irreps,
    regular,
    standard,
    stencil,
    trivial,
)
from margeq.groups.action import _as_exact
from margeq.groups.finite import _symmetric
from margeq.groups.irreps import _irreps
from margeq.groups.planar import _cyclic, _dihedral, _stencil
from margeq.layers import (
    EquivariantLinear,
    GroupPool,
    LiftingConv2d,
    RestrictGroup,
    SubgroupConv2d,
    check_sizes,
)
from margeq.testing import equivariance_error
from tests.oracles import F64


@pytest.fixture
def _nothing_kept():
    """Tables that were made before, on the usual device, are made again."""
    for cached in (_stencil, _irreps, _harmonics, _as_exact):
        cached.cache_clear()


def tables(group):
    yield from (group.matrices, group.product, group.inverse, group.relative)
    yield group.cosets(C(1) if group.matrices.shape[1] == 2 else S(4))
    yield from irreps(group)
    yield from (matrices for matrices, _ in harmonics(group))
    for rep in (regular(group), standard(group), trivial(group)):
        yield rep.matrices
        yield from (rep.dual().matrices, (rep + 2 * rep).matrices, invariants(rep))


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize(("make", "size"), [(_cyclic, 11), (_dihedral, 9), (_symmetric, 4)])
def test_tables_of_groups_are_on_the_cpu(make, size):
    with torch.device("meta"):
        found = list(tables(make.__wrapped__(size)))
    assert all(table.device.type == "cpu" for table in found)
    for one, other in zip(found, tables(make(size)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize("group", [P4, P4M, C(8)])
def test_maps_move_where_they_are(group):
    x, f = torch.randn(1, 1, 5, 5), torch.randn(1, 1, group.order, 5, 5)
    with torch.device("meta"):
        moved = [act(x, group, 1, "picture"), act(f, group, 1, "map", shift=(1, 0))]
        size = stencil(P4, 3, 3)
    assert torch.equal(moved[0], act(x, group, 1, "picture"))
    assert torch.equal(moved[1], act(f, group, 1, "map", shift=(1, 0)))
    assert not size.is_meta


@pytest.mark.usefixtures("_nothing_kept")
def test_models_on_the_cpu_are_judged_under_another_default_device():
    model = nn.Sequential(LiftingConv2d(1, 2, 3, group=P4), nn.MaxPool3d((1, 3, 3), 2), nn.Tanh())
    pooled = nn.Sequential(LiftingConv2d(1, 2, 3, group=C(8)), GroupPool(C(8)), nn.Dropout(0.5))
    x = torch.randn(2, 1, 8, 8)
    with torch.device("meta"):
        (fault, _) = check_sizes(model, (1, 8, 8), P4)
        found = equivariance_error(pooled.eval(), C(8), x, per_layer=True)
        drawn = equivariance_error(pooled.train(), P4, x, n_draws=3)
    assert fault.layer == "1"
    assert found.exact.max < 1e-5 < found.approximate.max
    assert 0.0 < drawn.exact.max < 10.0


# --- layers


def restrict():
    return RestrictGroup(P4M, D(1)).double(), torch.randn(2, 3, 8, 4, 4, dtype=F64)


def subgroup():
    layer = SubgroupConv2d(3, 2, 3, group=P4M, subgroup=D(1))
    return layer.double(), torch.randn(2, 3, 8, 4, 4, dtype=F64)


def equivariant():
    layer = EquivariantLinear(standard(P4M) * standard(P4M), regular(P4M), 3, 2)
    return layer.double(), torch.randn(2, 3, 4, dtype=F64)


LAYERS = pytest.mark.parametrize("make", [restrict, subgroup, equivariant])


@LAYERS
def test_buffers_have_values_after_to_empty(make):
    layer, x = make()
    for start in ("cpu", "meta"):
        empty = copy.deepcopy(layer).to(start).to_empty(device="cpu")
        for buffer in empty.buffers():
            assert buffer.is_cpu
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("make", [restrict, equivariant])
def test_layers_made_on_another_default_device_take_assigned_weights(make):
    layer, x = make()
    with torch.device("meta"):
        other, _ = make()
        assert all(tensor.is_meta for tensor in other.state_dict().values())
        assert all(buffer.is_meta for buffer in other.buffers())
        assert other(x.to("meta")).is_meta
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(nn.Sequential(other)(x), layer(x))
    with torch.device("meta"):
        assert torch.equal(layer(x), other(x))


def test_assigned_weights_bring_their_precision():
    layer, x = equivariant()
    single = EquivariantLinear(layer.rep_in, layer.rep_out, 3, 2)
    single.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(single(x), layer(x))


@LAYERS
def test_copies_and_saved_layers_are_the_same(make):
    layer, x = make()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.state_dict().keys() == layer.state_dict().keys()


@LAYERS
def test_layers_trace_in_one_graph(make):
    layer, x = make()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_restricted_maps_stay_where_they_are():
    layer, x = restrict()
    assert layer.to("meta").cosets.is_meta
    assert torch.equal(layer(x), restrict()[0](x))


def test_a_group_made_elsewhere_is_the_same_group():
    with torch.device("meta"):
        group = FiniteGroup("mine", P4.matrices)
    assert group == P4
    assert torch.equal(group.product, P4.product)
