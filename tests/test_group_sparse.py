"""The appendix of ELLA on maps of a group: fully connected, factored and sparsified layers."""

from __future__ import annotations

import math

import pytest
import torch

from margeq.bases import group_grid, place_anchors
from margeq.closed_form import closed_form_gradient, factor_cotangent, fixed_filters, moved
from margeq.errors import ConfigError
from margeq.groups import P2, P4, P4M, PM, C, D, S
from margeq.groups.planar import stencil
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    Linear2d,
    SparseFactoredLinear2d,
    SparseGroupConv2d,
)
from margeq.layers.basis import AnchorBasis
from margeq.likelihoods import Categorical
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net, relative_error

EXACT_GROUPS = pytest.mark.parametrize("group", [P2, P4, PM, P4M], ids=str)
SMOOTH = pytest.mark.parametrize("kernel", ["rbf", "exponential"])
CIRCULAR = {"padding": 1, "padding_mode": "circular"}


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def act(group, u, maps):
    """``(L_u f)(g, x) = f(u^-1 g, u^-1 x)`` of maps ``[n, c, g, y, x]``."""
    sources = stencil(group, *maps.shape[-2:])[u]
    return maps[:, :, group.relative[u]].flatten(3)[..., sources].view_as(maps)


def on_group(kernel="rbf", group=P4, size=3, lengthscales=None, **options):
    basis = AnchorBasis((size, size), group=group, kernel=kernel, **options)
    if lengthscales is not None:
        with torch.no_grad():
            basis.log_lengthscale.copy_(torch.tensor(lengthscales).log())
    return basis


# --- fully connected and factored maps, which take maps of any shape


def test_fully_connected_map_between_maps_of_a_group():
    """Eq. 21, and on maps of another group."""
    layer = Linear2d(2, 3, (4, 3, 3), (8, 2, 2))
    x = torch.randn(5, 2, 4, 3, 3)
    weight = layer.weight.view(3, 8, 2, 2, 2, 4, 3, 3)
    expected = torch.einsum("dhyxcgij,ncgij->ndhyx", weight, x) + layer.bias.view(3, 8, 2, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_factored_map_between_maps_of_a_group():
    """Eq. 24: elements and pixels on both sides."""
    layer = FactoredLinear2d(2, 3, (4, 3, 3), (4, 2, 2), bias=False)
    x = torch.randn(5, 2, 4, 3, 3)
    u, v = layer.weight_u.view(3, 2, 4, 3, 3), layer.weight_v.view(4, 2, 2, 3, 2)
    expected = torch.einsum("hyxdc,dcgij,ncgij->ndhyx", v, u, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


# --- points of a filter on a group


def test_distances_are_those_of_pixels_and_of_turns():
    points = group_grid(C(8), (3, 3)).unflatten(0, (8, 9))
    squares = (points[0, 4] - points[:, 4]).square().sum(1)  # the middle pixel in all poses
    angles = 2 * math.pi * torch.arange(8) / 8
    torch.testing.assert_close(squares, (2 * (angles / 2).sin()) ** 2, rtol=0, atol=1e-14)
    corner = (points[0, 0] - points[2, 8]).square().sum()
    assert float(corner) == pytest.approx(8.0 + 2.0, abs=1e-12)
    mirrored = group_grid(D(3), (1, 1))
    apart = (mirrored[:3, None] - mirrored[None, 3:]).square().sum(-1)
    torch.testing.assert_close(apart, torch.full((3, 3), 2.0), rtol=0, atol=1e-14)


@EXACT_GROUPS
def test_no_element_moves_two_points_apart(group):
    points = group_grid(group, (3, 3))
    distances = torch.cdist(points, points)
    sources = stencil(group, 3, 3)
    for u in range(group.order):
        places = (9 * group.relative[u][:, None] + sources[u]).flatten()
        torch.testing.assert_close(distances[places][:, places], distances, rtol=0, atol=1e-7)


def test_random_anchors_take_all_elements_in_turn():
    anchors = place_anchors(10, (3, 5), seed=1, group=P4)
    assert anchors.shape == (10, 6)
    matrices = math.sqrt(2) * anchors[:, 2:].unflatten(1, (2, 2))
    which = (matrices[:, None] - P4.matrices).abs().amax((2, 3)).argmin(1)
    assert sorted(which.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    torch.testing.assert_close(matrices, P4.matrices[which])
    assert (anchors[:, :2].abs() <= torch.tensor([1.0, 2.0])).all()
    assert not torch.equal(anchors, place_anchors(10, (3, 5), seed=2, group=P4))
    assert len(place_anchors(0.25, (3, 3), group=P4M)) == 18


def test_given_anchors_are_elements_with_positions():
    given = torch.tensor([[3.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    anchors = place_anchors(given, (3, 3), group=P4)
    torch.testing.assert_close(anchors[:, :2], given[:, 1:])
    torch.testing.assert_close(anchors[0, 2:].view(2, 2) * math.sqrt(2), P4.matrices[3])
    for wrong in ([[4.0, 0, 0]], [[-1.0, 0, 0]], [[0.5, 0, 0]]):
        with pytest.raises(ConfigError, match="elements of P4"):
            place_anchors(torch.tensor(wrong), (3, 3), group=P4)
    with pytest.raises(ConfigError, match=r"use \[M, 3\]"):
        place_anchors(torch.zeros(2, 2), (3, 3), group=P4)
    with pytest.raises(ConfigError, match="does not act on the plane"):
        place_anchors("grid", (3, 3), group=S(3))


# --- the basis


@SMOOTH
def test_basis_by_angles_and_pixels(kernel):
    """Against the regression mean written out, for groups of any angle and mirrors."""
    group, plane, turn = D(3), 1.3, 0.6
    given = torch.tensor([[0.0, 0.2, -0.7], [2.0, 1.0, 0.0], [4.0, -0.4, 0.3]])
    basis = on_group(kernel, group, anchors=given, lengthscales=[[plane, turn]])

    def point(index):
        angle = 2 * math.pi * (index % 3) / 3
        return index >= 3, angle

    def correlation(a, b):
        (mirror_a, angle_a), (mirror_b, angle_b) = point(int(a[0])), point(int(b[0]))
        chord = 2.0 if mirror_a != mirror_b else (2 * math.sin((angle_a - angle_b) / 2)) ** 2
        square = float((a[1:] - b[1:]).square().sum()) / plane**2 + chord / turn**2
        return math.exp(-0.5 * square) if kernel == "rbf" else math.exp(-math.sqrt(square))

    pixels = [
        torch.tensor([h, y, x], dtype=F64) for h in range(6) for y in (-1, 0, 1) for x in (-1, 0, 1)
    ]
    gram = torch.tensor([[correlation(a, b) for b in given] for a in given])
    across = torch.tensor([[correlation(a, b) for b in pixels] for a in given])
    expected = torch.linalg.solve(gram + 0.01**2 * torch.eye(3), across)
    torch.testing.assert_close(basis()[0], expected, rtol=1e-9, atol=1e-11)


@SMOOTH
def test_limits_of_the_lengthscale_along_the_group(kernel):
    """No turn is near another, or all are the same: the basis of the plane for each, or for all."""
    plane = AnchorBasis((3, 3), kernel=kernel, anchors="grid", lengthscale=0.9)()[0]
    apart = on_group(kernel, anchors="grid", lengthscales=[[0.9, 1e-4]])()[0]
    torch.testing.assert_close(
        apart, torch.kron(torch.eye(4), plane.contiguous()), rtol=0, atol=1e-12
    )
    anchors = torch.cat([torch.zeros(9, 1), AnchorBasis((3, 3), anchors="grid").anchors], 1)
    alike = on_group(kernel, anchors=anchors, lengthscales=[[0.9, 1e9]])()[0]
    torch.testing.assert_close(alike, plane.repeat(1, 4), rtol=0, atol=1e-7)


def test_both_lengthscales_begin_as_one_length_at_the_middle_of_the_sides():
    assert on_group(size=5, lengthscale=3.0).lengthscale.tolist() == [pytest.approx([3.0, 1.5])]
    assert on_group(size=1, lengthscale=3.0).lengthscale.tolist() == [pytest.approx([3.0, 3.0])]


@EXACT_GROUPS
def test_smoothing_commutes_with_the_group(group):
    basis = on_group(group=group, anchors="grid", lengthscales=[[1.1, 0.7]])()[0]
    filters = torch.randn(1, 2, group.order, 3, 3)

    def smoothed(f):
        return (f.flatten(2) @ basis).view_as(f)

    for u in range(group.order):
        torch.testing.assert_close(
            smoothed(act(group, u, filters)), act(group, u, smoothed(filters)), rtol=0, atol=1e-11
        )


def test_the_penalty_is_about_each_lengthscale():
    basis = on_group(n_filters=2, lengthscale_spread=0.5).requires_grad_(False)
    assert float(basis.log_hyperprior()) == 0.0
    with torch.no_grad():
        basis.log_lengthscale[1, 0] += 1.0
        basis.log_lengthscale[0, 1] -= 0.5
    assert float(basis.log_hyperprior()) == pytest.approx(-0.5 * (4.0 + 1.0))


# --- sparsified group convolution


@EXACT_GROUPS
@pytest.mark.parametrize("size", [2, 3])
def test_equivariant_for_all_elements(group, size):
    layer = SparseGroupConv2d(2, 3, size, group=group, anchors=5, padding_mode="zeros")
    x = torch.randn(2, 2, group.order, 5, 5)
    y = layer(x)
    for u in range(group.order):
        torch.testing.assert_close(
            layer(act(group, u, x)), act(group, u, y), rtol=1e-12, atol=1e-12
        )
    moved_x = SparseGroupConv2d(2, 3, 3, group=group, **CIRCULAR)
    shift = ((1, 2), (-2, -1))
    torch.testing.assert_close(
        moved_x(x.roll(*shift)), moved_x(x).roll(*shift), rtol=1e-12, atol=1e-12
    )


def test_filters_are_smooth_functions_of_the_relative_point():
    """Eq. 26: theta(h, g, x) = sum_m w_m Psi_m(h^-1 g, h^-1 x), by the basis at moved points."""
    layer = SparseGroupConv2d(1, 1, 3, group=P4M, anchors=6, bias=False)
    dense = layer.dense_filters()[0, :, 0].flatten(2)  # [h, g, x]
    sources = stencil(P4M, 3, 3)
    base = (layer.weight[0, 0] @ layer.smooth()[0]).view(8, 9)
    for h in range(8):
        expected = base[P4M.relative[h]][:, sources[h]]
        torch.testing.assert_close(dense[h], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("per_filter", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_identity_basis_is_the_group_convolution(per_filter, approx):
    options = {"group": P4, "groups": 2, **CIRCULAR}
    full = GroupConv2d(2, 4, 3, **options)
    sparse = SparseGroupConv2d(
        2, 4, 3, anchors="grid", basis="identity", per_filter=per_filter, **options
    )
    assert sparse.fan_in("weight") == full.fan_in("weight")
    with torch.no_grad():
        sparse.weight.copy_(full.weight.flatten(2))
        sparse.bias.copy_(full.bias)
    x = torch.randn(3, 2, 4, 5, 5)
    torch.testing.assert_close(sparse(x), full(x), rtol=1e-12, atol=1e-12)
    batch = x, torch.randint(8, (3,))
    ours, theirs = (kron_of(layer, batch, approx) for layer in (sparse, full))
    if not per_filter:
        torch.testing.assert_close(ours.grad_cov, theirs.grad_cov, rtol=1e-10, atol=1e-14)
    inputs = theirs.input_cov.repeat_interleave(len(ours.input_cov) // 2, 0)
    torch.testing.assert_close(ours.input_cov, inputs, rtol=1e-10, atol=1e-14)


def kron_of(layer, batch, approx="expand"):
    torch.manual_seed(3)
    model = net(layer, torch.nn.Flatten(), torch.nn.Linear(layer(batch[0])[0].numel(), 8))
    return accumulate(model, [batch], Categorical(), kfac_approx=approx).kron["0.weight"]


def test_curvature_is_that_of_the_group_convolution_between_the_basis():
    """A = (I x Psi) A_full (I x Psi)^T at equal filters."""
    sparse = SparseGroupConv2d(2, 3, 3, group=P4, anchors=5, **CIRCULAR)
    full = GroupConv2d(2, 3, 3, group=P4, **CIRCULAR)
    psi = sparse.smooth()[0]
    with torch.no_grad():
        full.weight.copy_((sparse.weight @ psi).unflatten(2, (4, 9)))
    x = torch.randn(3, 2, 4, 4, 4)
    batch = x, torch.randint(8, (3,))
    torch.testing.assert_close(sparse(x), full(x), rtol=1e-11, atol=1e-11)
    ours, theirs = kron_of(sparse, batch), kron_of(full, batch)
    blocks = torch.kron(torch.eye(2), psi.detach().contiguous())
    assert relative_error(ours.input_cov[0], blocks @ theirs.input_cov[0] @ blocks.mT) < 1e-11
    assert relative_error(ours.grad_cov, theirs.grad_cov) < 1e-11


def test_from_group_conv():
    conv = GroupConv2d(2, 4, 3, group=P4, groups=2, stride=2, padding=1)
    x = torch.randn(2, 2, 4, 7, 7)
    for options in ({"lengthscale": 0.7}, {"basis": "identity"}, {"per_filter": True}):
        layer = SparseGroupConv2d.from_group_conv(conv, anchors="grid", **options)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-9, atol=1e-9)
    for wrong in (
        torch.nn.Conv2d(1, 1, 3),
        GroupConv2d(1, 1, 3, group=P4, separability="pointwise"),
        GroupConv2d(1, 1, 3, group=C(8)),
        layer,
    ):
        with pytest.raises(ConfigError, match="from_group_conv takes"):
            SparseGroupConv2d.from_group_conv(wrong)


def test_filters_follow_lengthscales_without_gradients():
    layer = SparseGroupConv2d(1, 1, 3, group=P4, lengthscale=2.0)
    x = torch.randn(1, 1, 4, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.smooth.log_lengthscale[0, 1] -= 1.0
        assert relative_error(layer(x), before) > 0.01


def test_a_group_between_pixels_is_refused():
    with pytest.raises(ConfigError, match=r"use C\(1, 2, 4\)"):
        SparseGroupConv2d(1, 1, 3, group=C(8))


@SMOOTH
@pytest.mark.parametrize("per_filter", [False, True])
def test_closed_form_gradient_of_both_lengthscales(kernel, per_filter):
    """At fixed filters, against the central difference of the moved state and of a full pass."""
    model = net(
        SparseGroupConv2d(
            1, 2, 2, group=P2, anchors="grid", lengthscale=0.8, basis=kernel, per_filter=per_filter
        ),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 3),
    )
    x, y = data_for(model, Categorical(), 6, 1, 2, 3, 3)
    prior, likelihood = GaussianPrior(model), Categorical()
    name, logs = "0.smooth.log_lengthscale", model[0].smooth.log_lengthscale
    (candidate,) = fixed_filters(model, {name: logs})
    state = accumulate(model, [(x, y)], likelihood)
    kron, kept = state.kron["0.weight"], (logs.detach().clone(), model[0].weight.detach().clone())
    cotangent = factor_cotangent(candidate, kron, prior, likelihood)
    found = closed_form_gradient(candidate, kron, cotangent, prior)
    for axis in range(2):
        values = []
        for step in (1e-5, -1e-5):
            after = kept[0].clone()
            after[-1, axis] += step
            new = moved(candidate, state, after)
            values.append(
                [
                    float(log_marginal_likelihood(s, prior, likelihood))
                    for s in (new, accumulate(model, [(x, y)], likelihood))
                ]
            )
            with torch.no_grad():
                logs.copy_(kept[0])
                model[0].weight.copy_(kept[1])
        for plus, minus in zip(*values, strict=True):
            slope = (plus - minus) / 2e-5
            assert float(found[-1, axis]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


# --- sparsified factored maps


def test_sparse_factored_map_between_maps_of_a_group():
    """Eq. 25: both factors are smooth functions of element and pixel."""
    layer = SparseFactoredLinear2d(2, 3, (4, 3, 3), (4, 2, 2), group=P4, anchors=(7, 5))
    x = torch.randn(5, 2, 4, 3, 3)
    u = (layer.weight_u @ layer.basis_u()[0]).unflatten(2, (4, 3, 3))
    v = torch.einsum("mdc,mx->xdc", layer.weight_v, layer.basis_v()[0]).unflatten(0, (4, 2, 2))
    expected = torch.einsum("hyxdc,dcgij,ncgij->ndhyx", v, u, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    assert layer.span_dimension == 2 * 3 * 7 * 5


def test_identity_basis_is_the_factored_map():
    dense = FactoredLinear2d(2, 3, (4, 3, 3), (4, 2, 2))
    with torch.no_grad():
        dense.bias_v.zero_()
    options = {"group": P4, "anchors": "grid", "basis": "identity"}
    layer = SparseFactoredLinear2d.from_factored(dense, **options)
    x = torch.randn(5, 2, 4, 3, 3)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_elements_follow_the_group_and_not_their_index():
    """Elements 0 and 3 of P4 are a quarter apart as 0 and 1 are; on an axis they would be 3."""
    layer = SparseFactoredLinear2d(1, 1, (4, 1, 1), (4, 1, 1), group=P4, anchors="grid")
    psi = layer.basis_u()[0]
    for u in range(4):
        places = P4.relative[u]
        torch.testing.assert_close(psi[places][:, places], psi, rtol=0, atol=1e-12)


def test_pictures_may_be_lifted_or_come_out():
    layer = SparseFactoredLinear2d(1, 2, (3, 3), (6, 2, 2), group=D(3), lengthscale_spread=1.0)
    assert layer(torch.randn(2, 1, 3, 3)).shape == (2, 2, 6, 2, 2)
    assert layer.basis_u.lengthscale.shape == (1,)
    assert layer.basis_v.lengthscale.shape == (1, 2)


@pytest.mark.parametrize(
    ("in_shape", "out_shape"),
    [((3, 3), (3, 3)), ((4, 3, 3), (3, 3, 3)), ((4, 3, 3), 9), ((8, 3, 3), (4, 3, 3))],
)
def test_shapes_that_are_no_maps_of_the_group_are_refused(in_shape, out_shape):
    with pytest.raises(ConfigError, match=r"use \(4, y, x\)"):
        SparseFactoredLinear2d(1, 1, in_shape, out_shape, group=P4)
