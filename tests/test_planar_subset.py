"""A learned part of rotations and reflections: its elements, their gradients, and their weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError
from margeq.layers import (
    GroupSampler,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    PlanarSubset,
    SampleInstanceNorm,
    SamplePool,
    redraw,
)
from tests.group_samples import Points

F64 = torch.float64
KINDS = {"rotations": (True, False), "mirrors": (False, True), "both": (True, True)}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frozen(*args, **shares):
    return PlanarSubset(*args, **shares).requires_grad_(False)


# --- elements


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_group_has_all_its_samples(kind, n):
    subset = PlanarSubset.whole(*KINDS[kind])
    assert not list(subset.parameters())
    rotations, mirrors = KINDS[kind]
    n_angles = math.ceil(n / (1 + mirrors)) if rotations else 1
    for angles, signs, weights in (subset.quadrature(n), subset.sample(n, generator())):
        assert len(angles) == n_angles * (1 + mirrors)
        torch.testing.assert_close(weights, weights[:1].expand_as(weights))
        assert signs.tolist() == [1.0] * n_angles + [-1.0] * n_angles * mirrors
        first = angles[:n_angles]
        torch.testing.assert_close(angles, first.repeat(1 + mirrors))
        if rotations:
            torch.testing.assert_close(
                first.diff(), torch.full((n_angles - 1,), 2 * math.pi / n_angles)
            )
        else:
            assert first.tolist() == [0.0]


@pytest.mark.parametrize(("width", "count"), [(1.0, 8), (0.5, 4), (0.51, 5), (0.1, 2), (0.0, 1)])
def test_a_smaller_part_has_fewer_samples(width, count):
    subset = PlanarSubset(True, False, width=width)
    for mode in (subset.quadrature(8), subset.sample(8, generator())):
        assert len(mode[0]) == count
        assert float(mode[0].detach().abs().max()) <= width * math.pi
    both = frozen(True, True, width=width, mirror=0.0)
    assert len(both.quadrature(16)[0]) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ends_are_reached_exactly(kind, dtype):
    subset = PlanarSubset(*KINDS[kind]).to(dtype).requires_grad_(False)
    subset.to_identity()
    for found in (subset.quadrature(8), subset.sample(8, generator())):
        assert [values.tolist() for values in found] == [[0.0], [1.0], [1.0]]
    subset.to_whole()
    expected = PlanarSubset.whole(*KINDS[kind]).to(dtype)
    assert (float(subset.width), float(subset.mirror)) == (1.0, float(KINDS[kind][1]))
    for found, known in zip(subset.quadrature(8), expected.quadrature(8), strict=True):
        torch.testing.assert_close(found, known)


def test_setting_shares_changes_only_what_is_named():
    subset = PlanarSubset(True, True, width=0.3, mirror=0.6)
    subset.set_shares(mirror=0.25)
    assert subset.width.item() == pytest.approx(0.3)
    assert subset.mirror.item() == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="mirror=2"):
        subset.set_shares(width=0.5, mirror=2.0)
    assert subset.width.item() == pytest.approx(0.3)
    assert str(subset) == "PlanarSubset(width=0.3, mirror=0.25)"
    again = PlanarSubset(True, True, trained_by=None)
    again.load_state_dict(subset.state_dict())
    assert again.mirror.item() == subset.mirror.item()


def test_descriptions():
    def words(*args, **shares):
        return str(PlanarSubset(*args, **shares).learned_subset())

    assert words(True, False, width=1.0) == "all rotations"
    assert words(True, True, width=0.5, mirror=0.0) == "rotations within ±90°, reflections off"
    assert words(True, True, width=0.0, mirror=1.0) == "no rotations, reflections on"
    assert words(False, True, mirror=0.25) == "no rotations, reflections at 25%"


def test_quadrature_is_the_mean_of_samples():
    subset = frozen(True, True, width=0.6, mirror=0.3)
    draws, total = generator(), torch.zeros(2)
    for _ in range(3000):
        angles, signs, weights = subset.sample(8, draws)
        weights = weights / weights.sum()  # as layers use them
        total += torch.stack([(angles.cos() * weights).sum(), (signs * weights).sum()]) / 3000
    angles, signs, weights = subset.quadrature(4000)
    mean = torch.stack([(angles.cos() * weights).sum(), (signs * weights).sum()])
    # the sum of the signs has standard deviation 0.35, so 0.02 is three standard errors
    torch.testing.assert_close(total, mean, atol=0.02, rtol=0)


@pytest.mark.parametrize(("width", "mirror"), [(1.0, 0.5), (0.5, 0.3), (None, 0.5), (0.7, 1.0)])
def test_layers_say_on_average_what_they_say_in_evaluation(width, mirror):
    rotations = width is not None
    samplers = [
        GroupSampler(frozen(rotations, True, width=width or 1.0, mirror=mirror), 32)
        for _ in range(2)
    ]
    torch.manual_seed(1)
    lift = MonteCarloLiftingConv2d(1, 2, 5, outputs=samplers[0], omega_0=1.0)
    conv = MonteCarloGroupConv2d(2, 2, 3, inputs=samplers[0], outputs=samplers[1], omega_0=1.0)
    pool, x, draws = SamplePool(samplers[1], "mean"), torch.randn(1, 1, 7, 7), generator()
    found = []
    with torch.no_grad():
        for _ in range(600):
            for sampler in samplers:
                sampler.redraw(draws)
            found.append(pool(conv(lift(x))).flatten())
        lift.eval(), conv.eval(), pool.eval()
        expected = pool(conv(lift(x))).flatten()
    outputs = torch.stack(found)
    error = outputs.std(0) / len(found) ** 0.5
    # 4 standard errors of 600 draws, and what 16 midpoints leave of the integral
    assert ((outputs.mean(0) - expected).abs() < 4 * error + 2e-3 * expected.abs()).all()


@pytest.mark.parametrize(("mirrors", "n_samples"), [(True, 2), (False, 1)])
def test_one_angle_is_refused_where_a_width_is_learned(mirrors, n_samples):
    with pytest.raises(ConfigError, match=f"use at least {2 * n_samples}"):
        PlanarSubset(True, mirrors).quadrature(n_samples)
    assert len(PlanarSubset.whole(True, mirrors).quadrature(n_samples)[0]) == n_samples


# --- who trains it, and where it gets stuck


def test_owners():
    assert PlanarSubset(True, True).hyperparameter_names == ("raw_width", "raw_mirror")
    assert PlanarSubset(True, True, trained_by="loss").hyperparameter_names == ()
    assert len(list(PlanarSubset(True, True, trained_by="loss").parameters())) == 2


@pytest.mark.parametrize("owner", ["evidence", "loss"])
@pytest.mark.parametrize(("name", "end"), [("width", 1.0), ("mirror", 0.0), ("mirror", 1.0)])
def test_gradients_at_an_end_lead_inwards_only(owner, name, end):
    subset = PlanarSubset(True, True, trained_by=owner, **{name: end})
    raw = getattr(subset, f"raw_{name}")
    for mode in (subset.quadrature(16), subset.sample(16, generator())):
        found = []
        for sign in (1.0, -1.0):
            # of sin(angle) by position: odd, as is the angle in the width
            values = mode[0].sin() * mode[0].detach() if name == "width" else mode[2][8:]
            (grad,) = torch.autograd.grad(sign * values.sum(), raw, retain_graph=True)
            found.append(float(grad))
        assert sorted(g == 0.0 for g in found) == [False, True]
        inside = next(g for g in found if g != 0.0)
        step = inside if owner == "evidence" else -inside
        assert (step > 0) == (end == 0.0)


def test_mirrors_of_weight_0_are_left_out_unless_a_gradient_wants_them():
    subset = PlanarSubset(True, True, width=1.0, mirror=0.0)
    assert len(subset.quadrature(8)[0]) == 8
    with torch.no_grad():
        assert len(subset.quadrature(8)[0]) == 4
        assert len(subset.sample(8, generator())[0]) == 4
    subset.raw_mirror.requires_grad_(False)
    assert len(subset.quadrature(8)[0]) == 4
    half = frozen(True, True, width=1.0, mirror=0.5)
    lengths = {len(half.sample(8, generator(seed))[0]) for seed in range(20)}
    assert lengths == {4, 8}
    half.requires_grad_(True)
    assert {len(half.sample(8, generator(seed))[0]) for seed in range(20)} == {8}


@pytest.mark.parametrize(("end", "nearby"), [(0.0, 0.05), (1.0, 0.95)])
def test_a_certain_choice_has_the_gradient_of_one_nearby(end, nearby):
    # the loss wants the other choice; the same noise in both
    slopes = {}
    for probability in (end, nearby):
        subset = PlanarSubset(False, True, mirror=probability, trained_by="loss")
        (scale,) = torch.autograd.grad(subset.mirror * (2 * end - 1), subset.raw_mirror)
        total = 0.0
        for seed in range(200):
            weights = subset.sample(1, generator(seed))[2]
            share = (2 * end - 1) * weights[1]
            total += torch.autograd.grad(share, subset.raw_mirror)[0] / 200
        slopes[probability] = float(total / scale)
    assert slopes[end] == pytest.approx(slopes[nearby], rel=1e-6)
    assert slopes[end] > 0.1


# --- gradients of layers at a fixed draw


def network(first, second, n=8, size=5):
    samplers = GroupSampler(first, n), GroupSampler(second, n)
    return nn.Sequential(
        MonteCarloLiftingConv2d(1, 3, size, outputs=samplers[0], padding=2),
        SampleInstanceNorm(samplers[0]), nn.ReLU(),
        MonteCarloGroupConv2d(3, 3, size, inputs=samplers[0], outputs=samplers[1]),
        SampleInstanceNorm(samplers[1]),
        SamplePool(samplers[1], "mean"), nn.Flatten(),
    )  # fmt: skip


def assert_slope(model, x, raw):
    direction = torch.randn_like(model(x))
    (found,) = torch.autograd.grad((model(x) * direction).sum(), raw)
    ends = []
    for step in (1e-5, -2e-5):
        raw.data += step
        ends.append(float((model(x) * direction).sum().detach()))
    raw.data += 1e-5
    rise = (ends[0] - ends[1]) / 2e-5
    assert abs(rise) > 1e-3
    assert float(found) == pytest.approx(rise, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["rotations", "both"])
def test_width_gradient_through_layers_is_the_central_difference(kind, training):
    first, second = (PlanarSubset(*KINDS[kind], width=w) for w in (0.93, 0.57))
    model = network(first, second).train(training)
    x = torch.randn(2, 1, 8, 8)
    for subset in (first, second):
        assert_slope(model, x, subset.raw_width)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("kind", ["mirrors", "both"])
def test_mirror_gradient_through_layers_is_the_central_difference(kind, reduction):
    first, second = (PlanarSubset(*KINDS[kind], mirror=v) for v in (0.9, 0.3))
    model, x = network(first, second).eval(), torch.randn(2, 1, 8, 8)
    model[5] = SamplePool(model[3].outputs, reduction)
    for subset in (first, second):
        assert_slope(model, x, subset.raw_mirror)


# --- symmetry


def test_filters_do_not_jump_across_the_identity():
    def filters(shift):
        inputs = GroupSampler(Points([0.7 + shift], [1.0]), 1)
        torch.manual_seed(1)
        outputs = GroupSampler(PlanarSubset(True, True, width=0.0), 1).eval()
        return MonteCarloGroupConv2d(2, 2, 7, inputs=inputs, outputs=outputs).filters()

    for centre in (-0.7, -0.7 + math.pi):
        moved = (filters(centre + 5e-7) - filters(centre - 5e-7)).detach().abs().max()
        assert 0 < float(moved) < 1e-6


def two_layers(width, n, size=7):
    samplers = [GroupSampler(PlanarSubset(True, False, width=width), n) for _ in range(2)]
    return nn.Sequential(
        MonteCarloLiftingConv2d(1, 2, size, outputs=samplers[0], padding=size // 2),
        nn.ReLU(),
        MonteCarloGroupConv2d(
            2, 2, size, inputs=samplers[0], outputs=samplers[1], padding=size // 2
        ),
        SamplePool(samplers[1], "mean"),
    )


@pytest.mark.parametrize(("width", "whole"), [(1.0, True), (0.5, False)])
@torch.no_grad()
def test_only_the_whole_group_is_equivariant_in_expectation(width, whole):
    # 300 draws of each picture; the norm of the mean difference, in standard errors
    model, x, found = two_layers(width, 8), torch.randn(1, 1, 8, 8), []
    for _ in range(300):
        means = []
        for picture in (x, x.rot90(1, (2, 3))):
            redraw(model)
            means.append(model(picture).mean((0, 2, 3)))
        found.append(means[1] - means[0])
    differences = torch.stack(found)
    mean = float(differences.mean(0).norm())
    error = float((differences.var(0).sum() / len(found)).sqrt())
    assert mean < 3 * error if whole else mean > 5 * error


@torch.no_grad()
def test_the_number_of_samples_does_not_change_the_size():
    x, sizes = torch.randn(1, 1, 6, 6), {}
    models = [two_layers(0.8, 4, 5) for _ in range(3)]
    for n in (4, 8, 16):
        found = []
        for draw in range(300):
            model = models[draw % 3]
            model[0].outputs.n_samples = model[2].outputs.n_samples = n
            redraw(model)
            found.append(model[:3](x).square().mean().sqrt())
        sizes[n] = float(torch.stack(found).mean())
    assert abs(sizes[4] / sizes[16] - 1) < 0.1
    assert abs(sizes[8] / sizes[16] - 1) < 0.03


# --- errors


def test_errors_name_what_is_wrong():
    for options in ({"width": 1.5}, {"mirror": -0.1}, {"trained_by": "me"}, {"width": "all"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            PlanarSubset(True, True, **options)
    with pytest.raises(ConfigError, match="IdentityElement"):
        PlanarSubset(False, False)
