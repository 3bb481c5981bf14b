"""Eigenvalues of group-circulant factors by blocks are those of the whole factor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from margeq.adjoint import network_gradient
from margeq.curvature.factors import Factors
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.fourier import GroupCirculant, harmonics
from margeq.curvature.frames import PixelFrames
from margeq.curvature.io import InputRows
from margeq.curvature.options import KfacOptions
from margeq.errors import NonFiniteError, NumericalWarning
from margeq.groups import P2, P4, P4M, PM, Z2, C, D, FiniteGroup, S
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import GroupConv2d, LiftingConv2d, SparseConv2d
from margeq.likelihoods import Categorical
from margeq.linalg import psd_eigenvalues
from margeq.parameters import named_hyperparameters
from margeq.priors import GaussianPrior
from tests.oracles import F64, Lambda, MeanPool, data_for, net, relative_error

SOFTMAX = Categorical()
PIXEL_GROUPS = pytest.mark.parametrize("group", [Z2, P2, P4, PM, P4M, D(2)], ids=repr)


def quaternions():
    """The quaternions 1, i, j, k and their negatives; their irrep of dimension 2 is not real."""
    i = torch.tensor([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]], dtype=F64)
    j = torch.tensor([[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]], dtype=F64)
    units = [torch.eye(4, dtype=F64), i, j, i @ j]
    return FiniteGroup("Q8", torch.stack([sign * unit for unit in units for sign in (1, -1)]))


def head(layer):
    return net(layer, MeanPool(), nn.Tanh(), nn.Linear(layer.out_channels, 3))


def state_of(model, *shape, **options):
    batch = data_for(model, SOFTMAX, *shape)
    return accumulate(model, [batch], SOFTMAX, **options), batch


def assert_same_eigenvalues(kron):
    symmetry, dense = kron.symmetry, psd_eigenvalues(kron.input_cov, "weight")[0]
    assert symmetry is not None
    found = symmetry.eigenvalues(kron.input_cov, "weight")[0].sort(-1).values
    assert found.shape == dense.shape
    assert float((found - dense).abs().max() / dense.max()) < 1e-10


def without_symmetry(state):
    blocks = {name: replace(kron, symmetry=None) for name, kron in state.kron.items()}
    return replace(state, curvature=BlockCurvature(blocks))


# --- blocks


@pytest.mark.parametrize("group", [Z2, PM, C(5), P4, C(6), D(3), P4M, S(3), S(4)], ids=repr)
def test_harmonics_are_representations_that_are_real_where_they_can_be(group):
    found = harmonics(group)
    assert sum(times * rho.shape[-1] for rho, times in found) == group.order
    for rho, times in found:
        products = torch.einsum("gij,hjk->ghik", rho, rho)
        torch.testing.assert_close(rho[group.product], products, rtol=0.0, atol=1e-12)
        assert rho.is_complex() == (times > rho.shape[-1])


def test_representations_of_the_quaternion_kind_stay_complex():
    assert [
        (rho.shape[-1], rho.is_complex(), times) for rho, times in harmonics(quaternions())
    ] == [
        *4 * [(1, False, 1)],
        (2, True, 2),
    ]


@pytest.mark.parametrize("group", [C(5), D(3), S(4), quaternions()], ids=repr)
def test_eigenvalues_of_any_covariance_with_the_symmetry(group):
    length = 2 * group.order
    moves = torch.cat([group.product, group.product + group.order], 1)
    rows = torch.randn(7, 3, 3 * length, dtype=F64)
    moved = rows.unflatten(2, (3, length))[..., moves].movedim(-2, 0).flatten(-2)
    cov = torch.einsum("hnbi,hnbj->bij", moved, moved)
    symmetry = GroupCirculant.of(group, moves)
    assert symmetry is not None
    found = symmetry.eigenvalues(cov, "weight")[0].sort(-1).values
    expected = torch.linalg.eigvalsh(cov)
    assert relative_error(found, expected) < 1e-12
    assert float(found.min()) >= 0.0


@PIXEL_GROUPS
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_eigenvalues_by_blocks_are_those_of_the_whole_factor(group, size, blocks):
    layer = GroupConv2d(2, 2, size, group=group, groups=blocks)
    state, _ = state_of(head(layer), 3, 2, group.order, 4, 4)
    assert_same_eigenvalues(state.kron["0.weight"])


@pytest.mark.parametrize("approx", ["expand", "reduce/expand"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_means_and_samples_over_places_keep_the_symmetry(approx, fraction):
    layer = GroupConv2d(2, 2, 3, group=P4, padding=1)
    options = {"kfac_approx": approx, "position_fraction": fraction}
    state, _ = state_of(head(layer), 3, 2, 4, 4, 4, **options)
    assert_same_eigenvalues(state.kron["0.weight"])


@pytest.mark.parametrize("approx", ["reduce", "expand/reduce"])
def test_means_over_frames_do_not(approx):
    layer = GroupConv2d(2, 2, 3, group=P4, padding=1)
    state, _ = state_of(head(layer), 3, 2, 4, 4, 4, kfac_approx=approx)
    assert state.kron["0.weight"].symmetry is None


@pytest.mark.parametrize(
    "layer",
    [
        LiftingConv2d(2, 2, 3, group=P4),
        GroupConv2d(2, 2, 3, group=P4, separability="pointwise"),
        GroupConv2d(2, 2, 3, group=C(3)),
    ],
    ids=["lifting", "pointwise", "band-limited"],
)
def test_other_layers_have_no_known_symmetry(layer):
    shape = (2, 4, 4) if isinstance(layer, LiftingConv2d) else (2, layer.order, 4, 4)
    state, _ = state_of(head(layer), 3, *shape)
    assert state.kron["0.weight"].symmetry is None


def test_an_action_with_a_fixed_point_has_no_circulant():
    corner_to_corner = LiftingConv2d(1, 1, 2, group=P4).pixel_index()
    about_the_middle = LiftingConv2d(1, 1, 3, group=P4).pixel_index()
    assert PixelFrames(corner_to_corner, P4).symmetry is not None
    assert PixelFrames(about_the_middle, P4).symmetry is None
    assert PixelFrames(corner_to_corner).symmetry is None


# --- guards


def circulant():
    moves = P4.product
    symmetry = GroupCirculant.of(P4, moves)
    assert symmetry is not None
    return symmetry


def of_spectrum(*values):
    """A covariance on P4 with the eigenvalues of the trivial, the sign and the complex irreps."""
    turn = torch.tensor(values, dtype=F64)
    first = torch.fft.ifft(turn).real
    return first[P4.relative][None]


def test_noise_is_measured_against_the_largest_eigenvalue_of_all_blocks():
    cov = of_spectrum(1.0, 1e-3, 1e-9, 1e-3)
    values, clamped = circulant().eigenvalues(cov, "weight", resolution=1e-6)
    assert clamped == 0
    expected = torch.tensor([0.0, 1e-3, 1e-3, 1.0], dtype=F64)
    torch.testing.assert_close(values.sort().values[0], expected, rtol=0.0, atol=1e-14)


def test_negative_eigenvalues_are_counted_as_often_as_they_appear():
    with pytest.warns(NumericalWarning, match="2 negative eigenvalues of the factor of 'weight'"):
        values, clamped = circulant().eigenvalues(of_spectrum(1.0, -0.5, 0.2, -0.5), "weight")
    assert clamped == 2
    assert float(values.min()) == 0.0


def test_not_a_number_is_refused():
    cov = of_spectrum(1.0, 1.0, 1.0, 1.0)
    cov[0, 0, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="'weight'"):
        circulant().eigenvalues(cov, "weight")


# --- evidence


@PIXEL_GROUPS
def test_evidence_is_that_of_the_whole_factor(group):
    model = head(GroupConv2d(2, 3, 3, group=group, padding=1))
    state, _ = state_of(model, 4, 2, group.order, 4, 4)
    prior = GaussianPrior(model)
    found = log_marginal_likelihood(state, prior, SOFTMAX)
    expected = log_marginal_likelihood(without_symmetry(state), prior, SOFTMAX)
    assert float((found - expected).abs()) < 1e-10 * float(expected.abs())


def test_gradient_inside_the_network_is_that_of_the_whole_factor():
    lift = Lambda(lambda x: torch.stack([x, x.tanh(), x.square(), -x.roll(1, -1)], 2))
    smooth = SparseConv2d(1, 2, 3, padding=1)
    group = GroupConv2d(2, 2, 3, group=P4, padding=1)
    model = net(smooth, lift, group, MeanPool(), nn.Tanh(), nn.Linear(2, 3))
    state, batch = state_of(model, 3, 1, 4, 4)
    prior, hyper = GaussianPrior(model), named_hyperparameters(model)
    assert hyper
    assert state.kron["2.weight"].symmetry is not None

    def gradient(state):
        return network_gradient(model, [batch], state, prior, SOFTMAX, hyper, KfacOptions())

    expected = gradient(without_symmetry(state))
    for name, value in gradient(state).items():
        assert float(value.abs().max()) > 1e-4
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


# --- sums


def p4_kron(scale=1.0, symmetry=True):
    layer = head(GroupConv2d(1, 2, 2, group=P4))
    state, _ = state_of(layer, 2, 1, 4, 3, 3)
    kron = state.kron["0.weight"]
    kron = replace(kron, input_cov=scale * kron.input_cov)
    return kron if symmetry else replace(kron, symmetry=None)


def test_sums_keep_a_common_symmetry_only():
    assert_same_eigenvalues(p4_kron() + p4_kron(2.0))
    assert (p4_kron() + p4_kron(symmetry=False)).symmetry is None
    other = replace(p4_kron(), symmetry=GroupCirculant.of(C(2), C(2).product))
    assert (p4_kron() + other).symmetry is None


def test_symmetries_are_equal_if_group_and_orbits_are():
    one, swapped = circulant(), GroupCirculant(P4, P4.product[:, 1:2])
    assert one == GroupCirculant.of(C(4), C(4).product)
    assert one != swapped
    assert one != GroupCirculant(D(2), one.orbits)
    assert one != "P4"


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_running_sums_lose_a_symmetry_that_one_term_lacks(missing):
    sums, cov = Factors(), torch.eye(4, dtype=F64)[None]
    for term in range(3):
        sums.add_inputs(cov, 1, None if term == missing else circulant())
    assert sums.symmetry is None
    sums = Factors()
    for _ in range(3):
        sums.add_inputs(cov, 1, circulant())
    assert sums.symmetry == circulant()


def test_sums_from_an_earlier_pass_and_over_batches_keep_the_symmetry():
    taken, first = Factors(), Factors()
    first.add_inputs(torch.eye(4, dtype=F64)[None], 1, circulant())
    taken.take_inputs(first)
    assert taken.symmetry == circulant()
    model = head(GroupConv2d(2, 2, 3, group=P4, padding=1))
    x, y = data_for(model, SOFTMAX, 6, 2, 4, 4, 4)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert_same_eigenvalues(accumulate(model, batches, SOFTMAX).kron["0.weight"])


def test_rows_with_frames_expand_to_rows_with_the_symmetry():
    layer = GroupConv2d(2, 2, 2, group=P4M)
    moves = (P4M.product[:, :, None] * 4 + layer.pixel_index()[:, None]).flatten(1)
    frames = PixelFrames(moves, P4M)
    rows = InputRows(torch.randn(3, 1, 1, 64, dtype=F64), 8, n_frames=8, frames=frames)
    cov = torch.einsum("ntbi,ntbj->bij", *2 * [rows.expanded().rows])
    symmetry = frames.symmetry
    assert symmetry is not None
    found = symmetry.eigenvalues(cov, "weight")[0].sort(-1).values
    assert relative_error(found, torch.linalg.eigvalsh(cov)) < 1e-12
