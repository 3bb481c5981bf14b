"""Sparsified layers: what they equal, what a projection does to their curvature, their symmetry."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError
from margeq.laplace import accumulate
from margeq.layers import FactoredLinear2d, SparseConv2d, SparseFactoredLinear2d
from margeq.likelihoods import Categorical
from margeq.models import ella
from margeq.parameters import named_weights
from margeq.training.function_scale import function_scale
from tests.oracles import F64, MeanPool, data_for, net, relative_error

SOFTMAX = Categorical()
LENGTHSCALES = pytest.mark.parametrize("per_filter", [False, True], ids=["layer", "filter"])
APPROXIMATIONS = pytest.mark.parametrize("approx", ["expand", "reduce"])
CIRCULAR = {"padding": 1, "padding_mode": "circular"}


def spread_lengthscales(layer):
    """Another lengthscale for each filter."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "log_lengthscale" in name:
                parameter.add_(torch.linspace(-0.5, 0.7, len(parameter)))
    return layer


def with_head(layer, shape):
    features = layer.double()(torch.zeros(1, *shape, dtype=F64)).numel()
    return net(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def krons(model, batch, approx="expand"):
    return accumulate(model, [batch], SOFTMAX, kfac_approx=approx).kron


def sandwich(psi, matrix):
    """``(I x Psi) A (I x Psi)^T`` by an explicit block-diagonal matrix."""
    blocks = torch.kron(torch.eye(matrix.shape[-1] // psi.shape[-1], dtype=F64), psi.contiguous())
    return blocks @ matrix @ blocks.mT


# --- S-CONV with anchors on the grid is a convolution

GEOMETRIES = {
    **{mode: {"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate")},
    "circular": CIRCULAR,
    "stride": {"stride": (2, 1), **CIRCULAR},
    "dilation": {"dilation": (1, 2), "padding": (1, 2), "padding_mode": "reflect"},
    "groups": {"groups": 2, **CIRCULAR},
    "depthwise": {"groups": 4, "padding": 1, "padding_mode": "replicate"},
    "same": {"kernel_size": (4, 2), "padding": "same", "padding_mode": "circular"},
    "valid": {"kernel_size": (2, 3), "padding": "valid", "bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_identity_basis_is_a_convolution(geometry):
    options = {"kernel_size": 3} | geometry
    conv = with_head(nn.Conv2d(4, 8, **options), (4, 6, 5))
    layer = SparseConv2d(4, 8, anchors="grid", basis="identity", **options)
    sparse = nn.Sequential(layer.double(), *conv[1:])
    with torch.no_grad():
        layer.weight.copy_(conv[0].weight.flatten(2))
        if conv[0].bias is not None:
            layer.bias.copy_(conv[0].bias)
    batch = data_for(conv, SOFTMAX, 3, 4, 6, 5)
    y = conv[0](batch[0])
    assert relative_error(layer(batch[0]).detach(), y.detach()) <= 1e-14
    column = torch.randn_like(y)
    (own,) = torch.autograd.grad(layer(batch[0]), [layer.weight], column)
    (expected,) = torch.autograd.grad(y, [conv[0].weight], column)
    assert relative_error(own, expected.flatten(2)) <= 1e-14
    for approx in ("expand", "reduce"):
        found, plain = krons(sparse, batch, approx), krons(conv, batch, approx)
        assert set(found) == set(plain)
        for name, kron in plain.items():
            assert relative_error(found[name].grad_cov, kron.grad_cov) <= 1e-14
            assert relative_error(found[name].input_cov, kron.input_cov) <= 1e-14
            assert found[name].n_shared == kron.n_shared


@pytest.mark.parametrize("basis", ["rbf", "exponential"])
def test_short_lengthscales_on_the_grid_give_a_convolution_up_to_the_noise(basis):
    conv = nn.Conv2d(2, 3, 3, bias=False, **CIRCULAR).double()
    layer = SparseConv2d(
        2, 3, 3, bias=False, anchors="grid", basis=basis, lengthscale=1e-2, **CIRCULAR
    ).double()
    with torch.no_grad():
        layer.weight.copy_(conv.weight.flatten(2))
    x = torch.randn(2, 2, 5, 5, dtype=F64)
    assert relative_error(layer(x).detach() * (1 + 1e-4), conv(x).detach()) <= 1e-12


# --- the factors are those of the ordinary layer with the induced weights, projected


@APPROXIMATIONS
@LENGTHSCALES
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_factors_of_s_conv_are_projected_factors_of_conv(approx, per_filter, groups):
    layer = SparseConv2d(4, 6, 3, groups=groups, per_filter=per_filter, **CIRCULAR).double()
    sparse = with_head(spread_lengthscales(layer), (4, 4, 5))
    conv = nn.Conv2d(4, 6, 3, groups=groups, **CIRCULAR).double()
    conv.load_state_dict({"weight": layer.filters(), "bias": layer.bias})
    model = nn.Sequential(conv, *sparse[1:])
    batch = data_for(model, SOFTMAX, 4, 4, 4, 5)
    found, plain = krons(sparse, batch, approx), krons(model, batch, approx)
    own, dense, psi = found["0.weight"], plain["0.weight"], layer.basis().detach()
    if per_filter:
        expected_a = [sandwich(p, dense.input_cov[d * groups // 6]) for d, p in enumerate(psi)]
        expected_b = dense.grad_cov.diagonal(dim1=1, dim2=2).reshape(6, 1, 1)
    else:
        expected_a = [sandwich(psi[0], a) for a in dense.input_cov]
        expected_b = dense.grad_cov
    assert relative_error(own.input_cov, torch.stack(expected_a)) <= 1e-12
    assert relative_error(own.grad_cov, expected_b) <= 1e-12
    assert own.n_shared == dense.n_shared
    assert relative_error(found["0.bias"].to_dense(), plain["0.bias"].to_dense()) <= 1e-12


def induced_factored(layer):
    """The F-FC layer with the factors that a sparsified one stands for."""
    dense = FactoredLinear2d(3, 4, (3, 3), (2, 3)).double()
    psi_u, psi_v = (b().expand(4, -1, -1) for b in (layer.basis_u, layer.basis_v))
    u = torch.einsum("dcm,dmx->dcx", layer.weight_u, psi_u)
    v = torch.einsum("mdc,dmy->ydc", layer.weight_v, psi_v)
    biases = {"bias_u": layer.bias_u, "bias_v": torch.zeros(6)}
    dense.load_state_dict({"weight_u": u, "weight_v": v, **biases})
    return dense


@LENGTHSCALES
def test_factors_of_s_fc_are_projected_factors_of_f_fc(per_filter):
    layer = SparseFactoredLinear2d(3, 4, (3, 3), (2, 3), per_filter=per_filter).double()
    sparse = with_head(spread_lengthscales(layer), (3, 3, 3))
    model = nn.Sequential(induced_factored(layer), *sparse[1:])
    batch = data_for(model, SOFTMAX, 5, 3, 3, 3)
    assert relative_error(layer(batch[0]).detach(), model[0](batch[0]).detach()) <= 1e-12
    found, plain = krons(sparse, batch), krons(model, batch)
    u, v = (found[f"0.weight_{name}"] for name in "uv")
    dense_u, dense_v = (plain[f"0.weight_{name}"] for name in "uv")
    psi_u, psi_v = (b().detach().expand(4, -1, -1) for b in (layer.basis_u, layer.basis_v))
    if per_filter:  # one block per (d, c)
        projected = torch.einsum("dmx,cxz,dnz->dcmn", psi_u, dense_u.input_cov, psi_u)
        expected_b = dense_u.grad_cov.diagonal(dim1=1, dim2=2).mT.reshape(12, 1, 1)
        assert relative_error(u.input_cov, projected.flatten(0, 1)) <= 1e-12
        assert relative_error(u.grad_cov, expected_b) <= 1e-12
    else:
        assert relative_error(u.input_cov, psi_u[0] @ dense_u.input_cov @ psi_u[0].mT) <= 1e-12
        assert relative_error(u.grad_cov, dense_u.grad_cov) <= 1e-12
    assert relative_error(v.input_cov, dense_v.input_cov) <= 1e-12
    assert relative_error(v.grad_cov, psi_v @ dense_v.grad_cov @ psi_v.mT) <= 1e-12
    assert relative_error(found["0.bias_u"].to_dense(), plain["0.bias_u"].to_dense()) <= 1e-12


@LENGTHSCALES
def test_s_fc_is_its_induced_weight(per_filter):
    layer = SparseFactoredLinear2d(3, 4, (3, 3), (2, 3), bias=False, per_filter=per_filter)
    layer = spread_lengthscales(layer).double()
    x = torch.randn(5, 3, 3, 3, dtype=F64)
    expected = x.flatten(1) @ layer.induced_weight().mT
    assert relative_error(layer(x).flatten(1).detach(), expected.detach()) <= 1e-12


def test_the_weight_of_a_large_s_fc_is_never_formed():
    layer = SparseFactoredLinear2d(64, 64, (32, 32), (32, 32), anchors=20)
    assert 4 * (64 * 1024) ** 2 > 10e9  # bytes of the map as a matrix
    assert layer(torch.randn(2, 64, 32, 32)).isfinite().all()


# --- symmetry, and one datum at a time


@pytest.mark.parametrize("shift", [(1, 0), (2, 4), (5, 3)])
@pytest.mark.parametrize("kind", ["conv", "sparse", "per-filter"])
def test_circular_convolutions_commute_with_shifts(shift, kind):
    if kind == "conv":
        layer = nn.Conv2d(2, 3, 3, **CIRCULAR).double()
    else:
        layer = SparseConv2d(2, 3, 3, per_filter=kind == "per-filter", **CIRCULAR).double()
    x = torch.randn(4, 2, 6, 8, dtype=F64)
    moved, y = (t.detach() for t in (layer(x.roll(shift, (2, 3))), layer(x)))
    assert relative_error(moved, y.roll(shift, (2, 3))) <= 1e-12
    layer.padding_mode = "zeros"
    moved, y = (t.detach() for t in (layer(x.roll(shift, (2, 3))), layer(x)))
    assert relative_error(moved, y.roll(shift, (2, 3))) > 0.1


@pytest.mark.parametrize("kind", ["conv", "s_conv", "s_fc+s_conv"])
def test_predictions_do_not_depend_on_the_batch(kind):
    model = ella(kind, width=2, in_channels=1, size=16).double()
    x = torch.randn(6, 1, 16, 16, dtype=F64)
    alone = torch.cat([model(datum[None]) for datum in x]).detach()
    assert relative_error(model(x).detach(), alone) <= 1e-12
    if "s_fc" not in kind:
        moved = model(x.roll((3, 5), (2, 3))).detach()
        assert relative_error(moved, alone) <= 1e-12


# --- conversions


@LENGTHSCALES
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_is_converted_as_it_is(geometry, dtype, per_filter):
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3} | geometry).to(dtype)
    before = deepcopy(conv.state_dict())
    layer = SparseConv2d.from_conv(conv, anchors="grid", per_filter=per_filter)
    x = torch.randn(2, 4, 6, 7, dtype=dtype)
    tolerance = 1e-10 if dtype == F64 else 1e-5
    assert relative_error(layer(x).detach(), conv(x).detach()) <= tolerance
    assert {p.dtype for p in (*layer.parameters(), *layer.buffers())} == {dtype}
    assert all(torch.equal(conv.state_dict()[name], value) for name, value in before.items())


@LENGTHSCALES
def test_fewer_anchors_are_fitted_by_least_squares(per_filter):
    conv = nn.Conv2d(2, 3, 3).double()
    layer = SparseConv2d.from_conv(conv, anchors=0.5, per_filter=per_filter)
    residual = (conv.weight - layer.filters()).detach().flatten(2)
    assert residual.norm() > 0.1
    assert (residual @ layer.basis().detach().mT).abs().max() <= 1e-12
    assert torch.equal(layer.bias, conv.bias)


@pytest.mark.parametrize("lengthscale", [1.0, 30.0, 1e4])
def test_converted_filters_are_never_further_away_than_zero(lengthscale):
    """In float32, directions that the basis damps away are dropped instead of blown up."""
    conv = nn.Conv2d(2, 3, 3)
    layer = SparseConv2d.from_conv(conv, anchors="grid", lengthscale=lengthscale)
    assert relative_error(layer.filters().detach(), conv.weight.detach()) < 1.0


@LENGTHSCALES
def test_a_factored_map_is_converted(per_filter):
    dense = FactoredLinear2d(2, 3, (3, 3), (2, 2)).double()
    with torch.no_grad():
        dense.bias_u.normal_()
    x = torch.randn(4, 2, 3, 3, dtype=F64)
    layer = SparseFactoredLinear2d.from_factored(dense, anchors="grid", per_filter=per_filter)
    assert relative_error(layer(x).detach(), dense(x).detach()) <= 1e-10
    fitted = SparseFactoredLinear2d.from_factored(dense, anchors=(4, 2), per_filter=per_filter)
    psi_u, psi_v = (b().detach().expand(3, -1, -1) for b in (fitted.basis_u, fitted.basis_v))
    rest_u = dense.weight_u - torch.einsum("dcm,dmx->dcx", fitted.weight_u, psi_u)
    rest_v = dense.weight_v.permute(1, 2, 0) - torch.einsum("mdc,dmy->dcy", fitted.weight_v, psi_v)
    for rest, psi in ((rest_u.detach(), psi_u), (rest_v.detach(), psi_v)):
        assert rest.norm() > 0.1
        assert (rest @ psi.mT).abs().max() <= 1e-12


@pytest.mark.parametrize("other", [nn.Conv1d(1, 1, 3), nn.Linear(2, 2), SparseConv2d(1, 1, 3)])
def test_nothing_else_is_converted(other):
    name = type(other).__name__
    with pytest.raises(ConfigError, match=rf"ordinary nn\.Conv2d, not {name}"):
        SparseConv2d.from_conv(other)
    with pytest.raises(ConfigError, match=f"FactoredLinear2d, not {name}"):
        SparseFactoredLinear2d.from_factored(other)


def test_a_conversion_stays_on_its_device():
    with torch.device("meta"):
        conv, dense = nn.Conv2d(2, 3, 3), FactoredLinear2d(2, 3, (3, 3), (2, 2))
    for layer in (SparseConv2d.from_conv(conv), SparseFactoredLinear2d.from_factored(dense)):
        assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


# --- function scale

N_DATA, N_OUT = 2000, 2000
"""Data, and draws of the weights (one per output channel); seeds differ by up to 6 %."""


def unit_weights(layer):
    with torch.no_grad():
        for name in ("weight", "weight_u", "weight_v"):
            if hasattr(layer, name):
                getattr(layer, name).normal_()
    return layer


@LENGTHSCALES
def test_fan_in_of_s_conv_is_the_variance_of_its_output(per_filter):
    layer = SparseConv2d(4, N_OUT, 3, groups=2, bias=False, per_filter=per_filter)
    x = torch.randn(N_DATA, 4, 3, 3)
    with torch.no_grad():
        assert float(layer(x).var()) == pytest.approx(1.0, rel=0.1)  # as initialised
        variance = float(unit_weights(layer)(x).var())
    assert variance == pytest.approx(layer.fan_in("weight"), rel=0.1)


@LENGTHSCALES
def test_fan_in_of_s_fc_is_the_variance_of_its_factors(per_filter):
    layer = SparseFactoredLinear2d(2, N_OUT, (3, 3), 4, bias=False, per_filter=per_filter)
    x = torch.randn(N_DATA, 2, 3, 3)
    with torch.no_grad():
        assert float(layer(x).var()) == pytest.approx(1.0, rel=0.1)
        hidden = float(unit_weights(layer).hidden(layer.projected(x)).var())
        output = float(layer(x).var())
    assert hidden == pytest.approx(layer.fan_in("weight_u"), rel=0.1)
    assert output / hidden == pytest.approx(layer.fan_in("weight_v"), rel=0.1)


def test_starting_precisions_are_at_the_scale_of_the_function():
    conv = SparseConv2d(2, 3, 3, **CIRCULAR)
    s_fc = SparseFactoredLinear2d(3, 4, (4, 4), 1)
    model = nn.Sequential(conv, nn.ReLU(), s_fc, nn.ReLU(), MeanPool(), nn.Linear(4, 3))
    found = function_scale(model, named_weights(model), torch.randn(2, 2, 4, 4)).precision
    assert found["0.weight"] == pytest.approx(conv.fan_in("weight") / 2)
    assert found["2.weight_u"] == pytest.approx(s_fc.fan_in("weight_u"))
    assert found["2.weight_v"] == pytest.approx(s_fc.fan_in("weight_v") / 2)
    assert found["0.bias"] == found["2.bias_u"] == 1.0
