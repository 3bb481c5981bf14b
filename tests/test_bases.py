"""The basis of sparsified layers against numpy, its limits and gradients; the layers as modules."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from margeq.bases import grid, interpolation, place_anchors
from margeq.errors import ConfigError
from margeq.layers import SparseConv2d, SparseFactoredLinear2d
from margeq.layers.basis import AnchorBasis
from tests.oracles import F64, relative_error

KERNELS = pytest.mark.parametrize("kernel", ["rbf", "exponential"])
NOISE = 0.01


# --- the regression mean


def covariance(a, b, lengthscale, kernel):
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    if kernel == "rbf":
        return np.exp(-(distance**2) / (2 * lengthscale**2))
    return np.exp(-distance / lengthscale)


def positions(*shape):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index.reshape(-1, len(shape)) - (np.array(shape) - 1) / 2


@KERNELS
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (7,), (2, 3, 2)], ids=str)
def test_basis_is_the_regression_mean(kernel, shape):
    lengthscales = [0.4, 1.0, 2.5]
    anchors = place_anchors(0.5, shape, seed=3)
    logs = torch.tensor(lengthscales, dtype=F64).log()
    found = interpolation(grid(shape), anchors, logs, kernel)
    for psi, scale in zip(found, lengthscales, strict=True):
        known = covariance(anchors.numpy(), anchors.numpy(), scale, kernel)
        known += NOISE**2 * np.eye(len(anchors))
        cross = covariance(anchors.numpy(), positions(*shape), scale, kernel)
        expected = torch.from_numpy(np.linalg.solve(known, cross))
        assert relative_error(psi, expected) <= 1e-12


@KERNELS
def test_basis_on_the_grid_damps_each_direction_by_its_share_of_noise(kernel):
    psi = AnchorBasis((3, 3), anchors="grid", kernel=kernel, lengthscale=1.7).double()()[0]
    values, vectors = np.linalg.eigh(covariance(positions(3, 3), positions(3, 3), 1.7, kernel))
    expected = vectors * (values / (values + NOISE**2)) @ vectors.T
    assert relative_error(psi.detach(), torch.from_numpy(expected)) <= 1e-6  # l is a float32


@KERNELS
@pytest.mark.parametrize("anchors", ["grid", 0.5, 1], ids=str)
def test_long_lengthscales_make_filters_constant(kernel, anchors):
    basis = AnchorBasis((3, 4), anchors=anchors, kernel=kernel, lengthscale=1e9).double()
    expected = torch.full((1, basis.n_anchors, 12), 1 / (basis.n_anchors + NOISE**2), dtype=F64)
    tolerance = 1e-10 if kernel == "rbf" else 1e-4  # the root reaches its limit more slowly
    assert relative_error(basis().detach(), expected) <= tolerance


@KERNELS
def test_short_lengthscales_leave_pixels_to_themselves(kernel):
    psi = AnchorBasis((3, 3), anchors="grid", kernel=kernel, lengthscale=1e-6).double()()
    assert relative_error(psi.detach(), torch.eye(9, dtype=F64)[None] / (1 + NOISE**2)) <= 1e-15


@KERNELS
def test_derivatives_in_lengthscales_and_anchors(kernel):
    anchors = place_anchors(4, (3, 3), seed=1).requires_grad_()
    logs = torch.tensor([-0.4, 0.3], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, logs: interpolation(grid((3, 3)), z, logs, kernel), (anchors, logs)
    )


@KERNELS
@pytest.mark.parametrize("log_lengthscale", [-1e3, -13.8, 13.8, 20.7, 1e3])
def test_values_and_derivatives_stay_finite_at_extreme_lengthscales(kernel, log_lengthscale):
    basis = AnchorBasis((3, 3), anchors=grid((3, 3))[1:], learn_anchors=True, kernel=kernel)
    with torch.no_grad():
        basis.log_lengthscale.fill_(log_lengthscale)
    psi = basis()
    psi.square().sum().backward()
    for tensor in (psi, basis.log_lengthscale.grad, basis.anchors.grad):
        assert torch.isfinite(tensor).all()


@KERNELS
def test_lengthscales_per_filter_are_a_stack_of_layers(kernel):
    options = {"basis": kernel, "padding": 1, "padding_mode": "circular"}
    stack = SparseConv2d(2, 3, 3, per_filter=True, **options).double()
    with torch.no_grad():
        stack.basis.log_lengthscale.copy_(torch.tensor([-0.5, 0.1, 0.8]))
    x = torch.randn(2, 2, 5, 4, dtype=F64)
    for d, scale in enumerate(stack.lengthscale.detach()):
        one = SparseConv2d(2, 1, 3, lengthscale=float(scale), **options).double()
        with torch.no_grad():
            one.weight.copy_(stack.weight[d : d + 1])
            one.bias.copy_(stack.bias[d : d + 1])
            one.basis.log_lengthscale.copy_(scale.log())
        assert relative_error(stack(x)[:, d : d + 1].detach(), one(x).detach()) <= 1e-14


def test_penalty_of_lengthscales_is_a_normal_density_around_the_start():
    basis = AnchorBasis((3, 3), n_filters=2, lengthscale=2.0, lengthscale_spread=0.5)
    with torch.no_grad():
        basis.log_lengthscale.add_(torch.tensor([0.5, -1.0]))
    assert float(basis.log_hyperprior().detach()) == pytest.approx(-0.5 * (1 + 4), rel=1e-5)
    assert float(AnchorBasis((3, 3)).log_hyperprior()) == 0.0


# --- anchors


@pytest.mark.parametrize(
    ("share", "shape", "count"),
    [
        (0.5, (3, 3), 5),
        (0.5, (1,), 1),
        (0.01, (3, 3), 1),
        (1.0, (3, 3), 9),
        (0.8, (3, 3), 8),
        (0.28, (5, 5), 7),  # in floats, a little more than 7
        (0.07, (10, 10), 7),
        (12, (3, 3), 12),
    ],
)
def test_shares_of_the_pixels_round_up(share, shape, count):
    found = place_anchors(share, shape)
    assert found.shape == (count, len(shape))
    assert (found.abs() <= (torch.tensor(shape) - 1) / 2).all()


def test_random_anchors_fill_the_filter_and_follow_their_seed_alone():
    found = place_anchors(4000, (3, 5), seed=7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(place_anchors(4000, (3, 5), seed=7), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(place_anchors(4000, (3, 5), seed=8), found)
    # uniform: mean zero, variance (k - 1)^2 / 12, from 4,000 draws to five standard errors
    assert (found.mean(0) / torch.tensor([2.0, 4.0])).abs().max() < 5 / math.sqrt(12 * 4000)
    variance = found.var(0) / torch.tensor([4.0, 16.0])
    assert (12 * variance - 1).abs().max() < 5 * math.sqrt(0.8 / 4000)


def test_anchors_on_the_grid_or_given():
    assert torch.equal(place_anchors("grid", (2, 3)), torch.from_numpy(positions(2, 3)))
    given = torch.tensor([[0, 1], [1, 0]])
    found = place_anchors(given, (3, 3))
    assert found.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    given.zero_()
    assert found.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    "anchors",
    [0.0, -0.5, 1.5, math.nan, 0, -3, True, "grids", None, [[0.0, 1.0]], np.zeros((2, 2))],
    ids=str,
)
def test_other_anchors_are_refused(anchors):
    with pytest.raises(ConfigError, match="use 'grid', a share in"):
        place_anchors(anchors, (3, 3))


@pytest.mark.parametrize("shape", [(2,), (2, 3), (0, 2), (1, 2, 2)])
def test_anchors_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match=r"use \[M, 2\] positions"):
        place_anchors(torch.zeros(shape), (3, 3))


def test_anchors_nowhere_are_refused():
    with pytest.raises(ConfigError, match="have to be finite"):
        place_anchors(torch.tensor([[0.0, math.inf]]), (3, 3))


# --- as modules


def sparse_layers(**options):
    return (
        SparseConv2d(2, 3, 3, **options),
        SparseFactoredLinear2d(2, 3, (3, 3), (2, 2), **options),
    )


@pytest.mark.parametrize("options", [{}, {"learn_anchors": True}, {"per_filter": True}], ids=str)
def test_a_state_dict_carries_anchors_and_lengthscales(options):
    x = torch.randn(4, 2, 3, 3)
    for layer, other in zip(
        sparse_layers(seed=1, **options), sparse_layers(seed=2, lengthscale=3.0, **options),
        strict=True,
    ):  # fmt: skip
        copy = deepcopy(layer)
        assert not torch.equal(other(x), layer(x))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        wide = deepcopy(layer).double()
        assert wide(x.double()).dtype == F64
        assert relative_error(wide(x.double()).float().detach(), layer(x).detach()) <= 1e-5
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(torch.nan)
        assert torch.equal(copy(x), other(x))


@pytest.mark.parametrize("anchors", [0.5, "grid"])
def test_layers_on_the_meta_device_take_a_state_dict(anchors):
    x = torch.randn(4, 2, 3, 3)
    with torch.device("meta"):
        empty = sparse_layers(anchors=anchors, seed=2)
    for layer, filled in zip(empty, sparse_layers(anchors=anchors, seed=1), strict=True):
        tensors = [*layer.parameters(), *layer.buffers()]
        assert all(tensor.is_meta for tensor in tensors)
        assert layer(x.to("meta")).shape == filled(x).shape
        layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
        assert torch.equal(layer(x), filled(x))


def test_lengthscales_are_in_pixels():
    assert SparseConv2d(2, 3, 3, lengthscale=2.5).lengthscale.tolist() == pytest.approx([2.5])
    per_filter = SparseConv2d(2, 3, 3, lengthscale=2.5, per_filter=True)
    assert per_filter.lengthscale.tolist() == pytest.approx([2.5] * 3)
    assert per_filter.basis.lengthscale_spread == 1.0
    assert "n_anchors=5, n_pixels=9, n_filters=3" in repr(per_filter)
    identity = SparseConv2d(2, 3, 3, anchors="grid", basis="identity")
    assert identity.lengthscale.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengthscale": 0.0}, r"lengthscale=0.0: use a number of pixels from 1e-06 to 1e\+09"),
        ({"lengthscale": math.nan}, "lengthscale=nan"),
        ({"lengthscale": "long"}, "lengthscale='long'"),
        ({"lengthscale": 1e-5}, "no anchor reaches a pixel"),
        ({"lengthscale_spread": 0.0}, "lengthscale_spread=0.0 must be positive"),
        ({"lengthscale_spread": "wide"}, "lengthscale_spread='wide': use 'auto'"),
        ({"basis": "cubic"}, "basis='cubic': use one of"),
        ({"basis": "identity"}, "basis='identity' needs anchors='grid'"),
        ({"basis": "identity", "anchors": "grid", "learn_anchors": True}, "do not move"),
        ({"anchors": 1.5}, "anchors=1.5: use 'grid'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    for kind, *sizes in ((SparseConv2d, 3), (SparseFactoredLinear2d, (3, 3), (2, 2))):
        with pytest.raises(ConfigError, match=message):
            kind(2, 3, *sizes, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "wide"}, "SparseConv2d: .*'wide'"),
        ({"padding": -1}, "padding=-1 needs whole numbers of at least 0"),
        ({"padding_mode": "wrap"}, "padding_mode='wrap'"),
        ({"padding": "same", "stride": 2}, "SparseConv2d: padding='same'"),
        ({"kernel_size": (3, 0)}, r"kernel_size=\(3, 0\) needs"),
        ({"stride": 0}, "stride=0 needs"),
        ({"dilation": 0}, "dilation=0 needs"),
        ({"groups": 3}, "SparseConv2d: in_channels"),
        ({"anchors": (0.5, 0.5)}, r"anchors=\(0.5, 0.5\): use 'grid'"),
    ],
    ids=str,
)
def test_convolutions_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SparseConv2d(2, 3, **{"kernel_size": 3} | options)


def test_anchors_of_a_factored_map_come_in_pairs():
    with pytest.raises(ConfigError, match=r"anchors=\(0.5,\): a tuple is a pair"):
        SparseFactoredLinear2d(2, 3, (3, 3), (2, 2), anchors=(0.5,))
    with pytest.raises(ConfigError, match=r"shape \(2, 2\): use \[M, 1\] positions"):
        SparseFactoredLinear2d(2, 3, (3, 3), 4, anchors=torch.zeros(2, 2))


def test_a_basis_that_stands_still_is_computed_once():
    basis = AnchorBasis((3, 3), anchors="grid").requires_grad_(False)
    first = basis()
    assert basis() is first
    with torch.no_grad():
        basis.log_lengthscale += 0.5
    second = basis()
    assert not torch.equal(second, first)
    basis.anchors = torch.nn.Buffer(basis.anchors + 0.1)
    assert not torch.equal(basis(), second)
    basis.log_lengthscale.data = basis.log_lengthscale.data - 1.0
    third = basis()
    assert torch.equal(third, basis(basis.log_lengthscale).to(third.dtype))
    assert deepcopy(basis)() is not third
    basis.double()
    assert basis().dtype == torch.float64


def test_a_remembered_basis_never_enters_a_function_transform():
    basis = AnchorBasis((3, 3)).requires_grad_(False)
    plain = basis()
    other = {"log_lengthscale": basis.log_lengthscale + 0.3}
    called = torch.func.functional_call(basis, other, ())
    assert not torch.equal(called, plain)
    torch.testing.assert_close(basis(), plain)
    many = torch.stack([basis.log_lengthscale, basis.log_lengthscale + 0.3])
    stacked = torch.func.vmap(
        lambda logs: torch.func.functional_call(basis, {"log_lengthscale": logs}, ())
    )(many)
    torch.testing.assert_close(stacked, torch.stack([plain, called]))
    torch.testing.assert_close(basis(), plain)
