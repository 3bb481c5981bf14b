"""Distributions on groups: overlaps, samples that move with their parameters, entropies."""

from __future__ import annotations

import math

import pytest
import torch

from margeq.errors import ConfigError
from margeq.group_distributions import Bernoulli, Interval, Product
from margeq.shares import from_share, share_between
from tests.oracles import F64


def scalar(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_gradient(function, value, step=1e-6):
    """Autograd is the central difference, to 1e-6."""
    leaf = scalar(value)
    (found,) = torch.autograd.grad(function(leaf), leaf)
    rise = (function(scalar(value + step)) - function(scalar(value - step))).detach() / (2 * step)
    assert abs(float(rise)) > 1e-3  # not of a constant
    assert float(found) == pytest.approx(float(rise), abs=1e-6)


def mirror(v, **options):
    probability = torch.stack([torch.ones((), dtype=F64), torch.as_tensor(v, dtype=F64)])
    return Bernoulli(torch.tensor([1.0, -1.0], dtype=F64), probability, **options)


# --- intervals on a grid


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("position", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_overlaps_are_those_of_a_fine_grid_and_sum_to_the_width(n, position):
    width = 1 / n + position * (1 - 1 / n)
    found = Interval(scalar(width)).overlaps(n).detach()
    assert float(found.sum()) / n == pytest.approx(width, abs=1e-14)
    fine = (torch.arange(4000, dtype=F64) + 0.5) / 4000 - 0.5  # places in a cell, in cells
    angles = 2 * math.pi * (torch.arange(n)[:, None] + fine) / n
    inside = torch.atan2(angles.sin(), angles.cos()).abs() <= width * math.pi
    torch.testing.assert_close(found, inside.double().mean(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("width", [0.3, 0.55, 0.8, 0.97])
@pytest.mark.parametrize("n", [4, 5, 8])
def test_gradient_of_overlaps(n, width):
    assert_gradient(
        lambda u: (Interval(u).overlaps(n) * torch.arange(1, n + 1).double().cos()).sum(), width
    )


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_at_both_ends_the_gradient_is_the_one_from_inside(n):
    for width, step in ((1.0, -1e-7), (1 / n, 1e-7)):
        u = scalar(width)
        jacobian = torch.autograd.functional.jacobian(lambda t: Interval(t).overlaps(n), u)
        rise = (Interval(scalar(width + step)).overlaps(n) - Interval(u).overlaps(n)) / step
        torch.testing.assert_close(jacobian, rise.detach(), atol=1e-6, rtol=0)
        assert float(jacobian.sum()) == pytest.approx(n)


def test_cells_that_touch_are_those_with_weight_or_a_derivative():
    for width in (0.25, 0.26, 0.74):
        assert Interval(width).touches(4).tolist() == [True, True, False, True]
    assert Interval(0.75).touches(4).all()
    assert int(Interval(scalar(1 / 7)).touches(7).sum()) == 3


def test_support():
    turns = torch.tensor([0.0, 1.5, 1.6, -1.5, 3.0, 2 * math.pi - 1.0], dtype=F64)
    assert Interval(0.5).contains(turns).tolist() == [True, True, False, True, False, True]
    logs = torch.tensor([0.6, 0.8, -0.6, 2 * math.pi], dtype=F64)
    assert Interval(1.0, math.log(2)).contains(logs).tolist() == [True, False, True, False]
    assert mirror(0.0).touches().tolist() == [True, False]


# --- samples and quadrature

FAMILIES = {
    "rotations": lambda u: Interval(u),
    "dilations": lambda u: Interval(u, extent=math.log(3.0)),
    "rotations-and-dilations": lambda u: Product((Interval(u), Interval(u / 2, extent=1.5))),
    "rotations-and-mirror": lambda u: Product((Interval(u), mirror(0.3))),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["sample", "quadrature"])
def test_every_node_moves_with_the_width(family, mode):
    def mean(u):
        how = {"generator": generator(3)} if mode == "sample" else {}
        nodes = getattr(FAMILIES[family](u), mode)(5, **how)
        points = nodes.points.reshape(len(nodes.points), -1)
        return (torch.cos(1.0 + points).prod(1) * nodes.weights).sum()

    assert_gradient(mean, 0.6)


def test_a_sample_of_rotations_scales_with_the_width():
    u = scalar(0.7)
    points = Interval(u).sample(6, generator()).points
    jacobian = torch.autograd.functional.jacobian(
        lambda t: Interval(t).sample(6, generator()).points, u
    )
    torch.testing.assert_close(jacobian, (points / u).detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(points.diff(), torch.full((5,), 0.7 * math.pi / 3, dtype=F64))


def test_samples_cover_the_interval_evenly():
    draws = generator()
    points = torch.cat([Interval(scalar(0.4)).sample(4, draws).points for _ in range(4000)])
    share = torch.histc(points.detach() / (0.4 * math.pi), 16, -1.0, 1.0) / len(points)
    assert Interval(0.4).contains(points).all()
    torch.testing.assert_close(share, torch.full((16,), 1 / 16, dtype=F64), atol=5e-3, rtol=0)


def test_quadrature_of_a_product_is_exact_for_what_each_factor_integrates():
    nodes = Product((Interval(scalar(0.5).detach()), mirror(0.25))).quadrature(2000)
    angle, sign = nodes.points.unbind(1)
    assert float(nodes.weights.sum()) == pytest.approx(1.0)
    # E cos = sin(pi / 2) / (pi / 2), E sign = (1 - .25) / (1 + .25)
    expected = 2 / math.pi * 0.6
    assert float((angle.cos() * sign * nodes.weights).sum()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("probability", [0.2, 0.7])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_straight_through_inclusions(probability, temperature):
    v = scalar(probability)
    many = Bernoulli(torch.zeros(200_000, dtype=F64), v.expand(200_000), temperature)
    found = many.inclusions(generator())
    assert set(found.detach().round(decimals=12).tolist()) == {0.0, 1.0}
    assert float(found.detach().mean()) == pytest.approx(probability, abs=4e-3)
    (gradient,) = torch.autograd.grad(found.mean(), v)
    noise = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000

    def relaxed(p):
        return ((math.log(p / (1 - p)) + noise.logit()) / temperature).sigmoid().mean()

    rise = (relaxed(probability + 1e-5) - relaxed(probability - 1e-5)) / 2e-5
    assert float(gradient) == pytest.approx(float(rise), rel=0.02)


def test_inclusions_are_certain_at_the_ends_and_survive_any_temperature():
    for temperature in (1.0, 1e-9, -20.0):
        p = torch.tensor([0.0, 1.0], dtype=F64).repeat(20_000).requires_grad_(True)
        found = Bernoulli(torch.zeros_like(p), p, temperature).inclusions(generator())
        assert torch.equal(found.detach().round(decimals=12), p.detach())
        assert torch.autograd.grad(found.sum(), p)[0].isfinite().all()


def test_random_inclusions_average_to_the_quadrature():
    draws = generator()
    product = Product((Interval(scalar(0.5)), mirror(0.3)))
    mean = sum(product.sample(2, draws).weights.detach() for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, product.quadrature(2).weights.detach(), atol=0.01, rtol=0)


# --- entropies


def test_entropies():
    u, v = scalar(0.3), scalar(0.2)
    rotations = math.log(2 * 0.3 * math.pi)
    choice = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert Interval(u).entropy().item() == pytest.approx(rotations)
    assert mirror(v).entropy().item() == pytest.approx(choice)
    assert Product((Interval(u), mirror(v))).entropy().item() == pytest.approx(rotations + choice)
    assert float(mirror(0.0).entropy()) == 0.0
    assert_gradient(lambda t: Product((Interval(t), mirror(t))).entropy(), 0.3)


# --- a number between two ends


@pytest.mark.parametrize("low", [0.0, 0.25])
def test_shares_reach_both_ends_exactly(low):
    for dtype in (torch.float32, F64):
        for share in (low, 1.0):
            raw = torch.tensor(from_share(share, low), dtype=dtype)
            assert float(share_between(raw, low, ascend=True)) == share
    raw = scalar(from_share(0.6, low))
    assert share_between(raw, low, ascend=True).item() == pytest.approx(0.6)
    assert_gradient(lambda t: share_between(t, low, ascend=True), raw.item())
    with pytest.raises(ConfigError, match=r"1\.5 must lie between"):
        from_share(1.5, low)


@pytest.mark.parametrize("ascend", [True, False])
def test_only_gradients_that_lead_back_pass_the_ends(ascend):
    outwards = 1.0 if ascend else -1.0
    for share, sign in ((1.0, 1.0), (0.25, -1.0)):
        raw = scalar(from_share(share, 0.25))
        for direction in (1.0, -1.0):
            value = share_between(raw, 0.25, ascend=ascend) * direction * sign * outwards
            (grad,) = torch.autograd.grad(value, raw)
            assert (float(grad) == 0.0) == (direction == 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Interval(0.0),
        lambda: Interval(1.2),
        lambda: Interval(0.5, extent=0.0),
        lambda: Interval(0.5).overlaps(0),
        lambda: Interval(0.5).sample(1.5),
        lambda: Bernoulli(torch.zeros(2), torch.zeros(3)),
        lambda: Product(()),
    ],
)
def test_what_is_refused(make):
    with pytest.raises(ConfigError):
        make()
