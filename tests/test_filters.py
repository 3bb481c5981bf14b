"""Filter bases: rotated exactly where pixels allow it, and nearly so between pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from margeq.errors import ConfigError
from margeq.filters import rotated_basis
from margeq.groups import P2, P4, P4M, PM, C, D, S
from margeq.groups.planar import stencil
from tests.oracles import F64, relative_error

SMOOTH = ["band-limited", "siren"]
INEXACT = [*SMOOTH, "bilinear"]
SIZES = pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
NYQUIST = math.pi


def pixels(size):
    """Coordinates (x, y) of each pixel, row by row."""
    half = (size - 1) / 2
    return torch.tensor(
        [(col - half, row - half) for row in range(size) for col in range(size)], dtype=F64
    )


# --- between pixels: the centre pixel test


def random_fields(bandwidth, n_fields=200, n_waves=8):
    """Sums of plane waves of at most this angular frequency, as functions of points [X, 2]."""
    generator = torch.Generator().manual_seed(1)
    size, turn, phase, speed = torch.rand(
        4, n_fields, n_waves, 1, generator=generator, dtype=F64
    ).mul(2 * math.pi)
    speed = bandwidth * (speed / (2 * math.pi)).sqrt()
    waves = torch.cat([speed * turn.cos(), speed * turn.sin()], -1)
    return lambda points: ((size - math.pi) * (waves @ points.mT + phase).cos()).sum(1)


def centre_error(group, basis, bandwidth):
    """Rotated filters on a field, against the filters at rest on the field rotated exactly.

    Sums of squares over all functions are means over independent weights.
    """
    points, field = pixels(math.isqrt(basis.shape[-1])), random_fields(bandwidth)
    missed = seen = torch.zeros((), dtype=F64)
    for h in range(group.order):
        expected = field(points @ group.matrices[h].mT) @ basis[0].mT
        missed = missed + (field(points) @ basis[h].mT - expected).square().sum()
        seen = seen + expected.square().sum()
    return float((missed / seen).sqrt())


@pytest.mark.parametrize("group", [C(8), D(8), C(16)], ids=str)
@pytest.mark.parametrize(
    ("kind", "size", "slow", "medium", "fast"),
    [
        ("band-limited", 2, 0.001, 0.005, 0.04),
        ("band-limited", 3, 0.001, 0.005, 0.04),
        ("band-limited", 4, 0.02, 0.03, 0.06),
        ("band-limited", 5, 0.025, 0.025, 0.03),
        ("band-limited", 7, 0.02, 0.02, 0.03),
        ("siren", 2, 0.01, 0.02, 0.05),
        ("siren", 3, 0.01, 0.02, 0.05),
        ("siren", 4, 0.02, 0.03, 0.05),
        ("siren", 5, 0.025, 0.025, 0.03),
        ("siren", 7, 0.02, 0.02, 0.02),
        ("bilinear", 3, 0.42, 0.43, 0.47),
        ("bilinear", 5, 0.35, 0.36, 0.41),
        ("bilinear", 7, 0.30, 0.31, 0.34),
    ],
)
def test_a_rotated_filter_sees_what_the_filter_sees_of_a_rotated_field(
    group, kind, size, slow, medium, fast
):
    basis = rotated_basis(group, size, kind)
    for bandwidth, bound in ((NYQUIST / 8, slow), (NYQUIST / 4, medium), (NYQUIST / 2, fast)):
        assert centre_error(group, basis, bandwidth) < bound


@pytest.mark.parametrize("size", [3, 5, 7])
def test_interpolated_pixels_rotate_worst(size):
    errors = [centre_error(C(8), rotated_basis(C(8), size, kind), NYQUIST / 4) for kind in INEXACT]
    assert errors[2] > 4 * max(errors[:2])


@pytest.mark.parametrize("size", [3, 5, 7])
def test_sines_that_are_too_fast_for_the_pixels_do_not_rotate(size):
    speeds = [NYQUIST * share * (size - 1) / 2 for share in (0.25, 0.5, 1.0, 2.0)]
    bases = [rotated_basis(C(8), size, "siren", omega_0=s, n_features=32) for s in speeds]
    errors = [centre_error(C(8), basis, NYQUIST / 4) for basis in bases]
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert errors[3] > 0.5  # though half of the rotations are exact


# --- on pixels: exact


@SIZES
@pytest.mark.parametrize("group", [P2, P4, PM, P4M], ids=str)
@pytest.mark.parametrize("kind", ["pixels", *INEXACT])
def test_an_exact_group_moves_pixels(group, kind, size):
    basis = rotated_basis(group, size, kind)
    moved = torch.stack([basis[0][:, sources] for sources in stencil(group, size, size)])
    assert (basis - moved).abs().max() <= 1e-12


@SIZES
def test_filters_of_pixels_are_any_filters_moved(size):
    weight = torch.randn(size * size, dtype=F64)
    filters = torch.einsum("m,hmx->hx", weight, rotated_basis(P4M, size, "pixels"))
    assert torch.equal(filters, weight[stencil(P4M, size, size)])


# --- the functions


@SIZES
@pytest.mark.parametrize("kind", ["pixels", *INEXACT])
def test_weights_of_unit_variance_give_pixels_of_unit_variance(kind, size):
    basis = rotated_basis(P4M, size, kind)
    variance = basis.square().sum(1).mean(1)
    assert relative_error(variance, torch.ones(8, dtype=F64)) <= 1e-12


@SIZES
@pytest.mark.parametrize("kind", SMOOTH)
def test_variance_is_the_same_after_every_rotation(kind, size):
    variance = rotated_basis(D(8), size, kind).square().sum(1)
    assert relative_error(variance, variance[:1].expand(16, -1)) <= 1e-12


@SIZES
def test_rotations_mix_harmonics_by_orthogonal_matrices(size):
    group = D(8)
    basis = rotated_basis(group, size, "band-limited")
    # psi_h = mix[h] psi_e on every pixel, so that mix[g h] = mix[h] mix[g] (weights turn the other
    # way) and isotropic weights stay isotropic
    mix = torch.stack([torch.linalg.lstsq(basis[0].mT, moved.mT).solution.mT for moved in basis])
    eye = torch.eye(basis.shape[1], dtype=F64).expand_as(mix)
    assert relative_error(mix @ basis[0], basis) <= 1e-11
    assert relative_error(mix @ mix.mT, eye) <= 1e-11
    products = torch.einsum("hab,gbc->ghac", mix, mix)
    assert relative_error(mix[group.product], products) <= 1e-11


@SIZES
def test_harmonics_are_orthonormal_on_average_over_rotations(size):
    basis = rotated_basis(C(16), size, "band-limited")
    gram = torch.einsum("hax,hbx->ab", basis, basis) / 16
    count = basis.shape[1]
    assert relative_error(gram, torch.eye(count, dtype=F64) * size**2 / count) <= 1e-12


@SIZES
def test_harmonics_span_rings_times_cosines_and_sines(size):
    x, y = pixels(size).numpy().T
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    window = np.cos(np.pi * np.minimum(radius / (size + 1), 0.5))
    rows = []
    for ring in np.arange((size - 1) / 2, -0.1, -1.0):
        profile = window * np.exp(-((radius - ring) ** 2) / (2 * 0.6**2))
        rows.append(profile)
        for m in range(1, int(2 * ring) + 1):
            off_centre = profile * (radius > 0)
            rows += [off_centre * np.cos(m * angle), off_centre * np.sin(m * angle)]
    basis = rotated_basis(C(8), size, "band-limited")[3]
    expected = torch.from_numpy(np.linalg.pinv(rows) @ np.array(rows))
    assert len(rows) == len(basis)
    assert relative_error(torch.linalg.pinv(basis) @ basis, expected) <= 1e-10


@SIZES
def test_harmonics_stay_as_near_to_their_rings_as_they_can(size):
    radius = pixels(size).norm(dim=-1)
    rings = torch.arange((size - 1) / 2 % 1, size / 2, dtype=F64)
    profiles = (-((radius - rings[:, None]) ** 2) / (2 * 0.6**2)).exp()
    profiles = profiles * (math.pi * radius / (size + 1)).clamp_max(math.pi / 2).cos()
    overlap = profiles @ rotated_basis(C(8), size, "band-limited")[5, : len(rings)].mT
    # of all orthonormal rows, the nearest have a symmetric positive overlap
    assert relative_error(overlap, overlap.mT) <= 1e-12
    assert torch.linalg.eigvalsh(overlap).min() > 0


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_interpolated_pixels_stay_in_the_disk(size):
    outside = pixels(size).norm(dim=-1) > (size - 1) / 2 + 1e-9
    assert outside.any()
    assert not rotated_basis(C(16), size, "bilinear")[:, :, outside].any()


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("pixels", {1: 1, 2: 4, 3: 9, 4: 16, 5: 25, 7: 49}),
        ("band-limited", {1: 1, 2: 3, 3: 6, 4: 10, 5: 15, 7: 28}),
        ("siren", {1: 1, 2: 4, 3: 8, 4: 16, 5: 24, 7: 32}),
        ("bilinear", {1: 1, 2: 4, 3: 5, 4: 4, 5: 13, 7: 29}),
    ],
)
def test_functions_are_independent(kind, counts):
    found = {size: rotated_basis(P4, size, kind) for size in counts}
    assert {size: basis.shape[1] for size, basis in found.items()} == counts
    for basis in found.values():
        assert torch.linalg.matrix_rank(basis[0], rtol=1e-7) == basis.shape[1]


@pytest.mark.parametrize("kind", INEXACT)
def test_a_subgroup_has_the_same_functions(kind):
    whole = rotated_basis(D(8), 5, kind)
    for part in (P4, C(8), P4M):
        own = whole[list(D(8).elements_of(part))]
        assert relative_error(rotated_basis(part, 5, kind), own) <= 1e-12


def frequency(wave, axis):
    """From s(x + 1) + s(x - 1) = 2 cos(w) s(x), at the centre of each 7 x 7 function."""
    around = wave.movedim(axis, -1)[:, 3]
    return ((around[:, 2] + around[:, 4]) / (2 * around[:, 3])).arccos()


def test_sines_are_no_faster_than_asked():
    basis = rotated_basis(C(8), 7, "siren", omega_0=3.0, n_features=400, seed=2)
    window = (math.pi * pixels(7).norm(dim=-1) / 8).clamp_max(math.pi / 2).cos()
    inner = window > 1e-9
    waves = torch.where(inner, basis / torch.where(inner, window, 1.0), 0.0).unflatten(-1, (7, 7))
    for turned in waves:
        speed = torch.hypot(frequency(turned, 1), frequency(turned, 2))
        assert 0.98 < speed.max() <= 1.0 + 1e-9
        assert (speed < 0.5).double().mean() == pytest.approx(0.25, abs=0.06)  # uniform on a disk


def test_seed_chooses_the_sines():
    first, again, other = (rotated_basis(C(8), 3, "siren", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 0.1


def test_slow_sines_are_one_function():
    basis = rotated_basis(C(8), 5, "siren", omega_0=1e-9)
    assert torch.linalg.matrix_rank(basis.flatten(0, 1), rtol=1e-6) == 1


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.parametrize("group", [C(8), P4M], ids=str)
def test_one_pixel_has_one_function(group, kind):
    assert torch.equal(rotated_basis(group, 1, kind), torch.ones(group.order, 1, 1, dtype=F64))


@pytest.mark.parametrize("kind", ["pixels", *INEXACT])
def test_bases_are_in_double_precision(kind):
    assert rotated_basis(P4, 3, kind).dtype == F64


# --- refused


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((C(8), 3, "cubic"), {}, "kind='cubic': use one of 'pixels', 'bilinear'"),
        ((C(8), 3, "pixels"), {}, r"C\(8\) does not map pixels to pixels"),
        ((S(3), 3, "siren"), {}, "does not act on the plane"),
        ((C(8), 0, "siren"), {}, "kernel_size=0"),
        ((C(8), 2.5, "band-limited"), {}, "kernel_size=2.5"),
        ((C(8), 3, "siren"), {"omega_0": 0.0}, "omega_0=0.0"),
        ((C(8), 3, "siren"), {"omega_0": math.nan}, "omega_0=nan"),
        ((C(8), 3, "siren"), {"omega_0": "fast"}, "omega_0='fast'"),
        ((C(8), 3, "siren"), {"n_features": 7}, "n_features=7"),
        ((C(8), 3, "siren"), {"n_features": 0}, "n_features=0"),
    ],
)
def test_what_cannot_work_is_refused(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        rotated_basis(*arguments, **options)
