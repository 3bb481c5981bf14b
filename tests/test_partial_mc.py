"""Convolutions on samples of a continuous group: what they are, and what holds in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError
from margeq.layers import (
    GroupSampler,
    ImplicitKernel,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    redraw,
)
from margeq.layers.kernel import disk
from tests.group_samples import Arc, Points

F64 = torch.float64


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def two_layers(first, second, channels=(2, 4, 4), size=7, n=8, **options):
    """Lifting, a rectifier, and a convolution between samples."""
    samplers = GroupSampler(first, n), GroupSampler(second, n)
    i, c, o = channels
    options = {"padding": size // 2, **options}
    return nn.Sequential(
        MonteCarloLiftingConv2d(i, c, size, outputs=samplers[0], **options),
        nn.ReLU(),
        MonteCarloGroupConv2d(c, o, size, inputs=samplers[0], outputs=samplers[1], **options),
    )


# --- the filters


def by_matrices(layer, size):
    """Filters from products of matrices, element by element, pixel by pixel."""
    turned = [matrix(*element[:2]) for element in zip(*layer.outputs(), strict=True)]
    inputs = list(zip(*layer.inputs(), strict=True))
    total = sum(float(weight) for *_, weight in inputs)
    half, found = (size - 1) / 2, []
    for h in turned:
        for angle, mirror, weight in inputs:
            relative = h.inverse() @ matrix(angle, mirror)
            sign = torch.linalg.det(relative)
            for row in range(size):
                for column in range(size):
                    x = torch.tensor([column - half, row - half])
                    z = torch.cat([h.inverse() @ x / half, relative[:, 1].flip(0)])
                    # the second column of R M is (-sin, cos), whatever the mirror
                    z[3] = -z[3]
                    z = torch.cat([z, sign[None]]) if layer.has_mirrors else z
                    inside = float(x.norm() <= half + 1e-6)
                    found.append(layer.kernel(z) * inside * float(weight) / total)
    features = torch.stack(found).unflatten(0, (len(turned), len(inputs), size, size))
    filters = torch.einsum("oib,hgyxb->ohigyx", layer.weight, features)
    return filters.flatten(2, 3).flatten(0, 1)


def matrix(angle, mirror):
    cos, sin = math.cos(float(angle)), math.sin(float(angle))
    return torch.tensor([[cos * float(mirror), -sin], [sin * float(mirror), cos]])


@pytest.mark.parametrize("mirrors", [None, [1.0, -1.0, -1.0]])
def test_filters_are_the_kernel_at_relative_elements(mirrors):
    inputs = GroupSampler(Points([0.3, -2.0, 2.9], mirrors, [1.0, 2.0, 0.5]), 3)
    outputs = GroupSampler(Points([1.1, -0.4], mirrors and mirrors[1:]), 2)
    layer = MonteCarloGroupConv2d(2, 3, 5, inputs=inputs, outputs=outputs)
    torch.testing.assert_close(layer.filters(), by_matrices(layer, 5), rtol=1e-12, atol=1e-13)


def test_one_element_is_an_ordinary_convolution():
    outputs = GroupSampler(Points([0.0], has_rotations=False), 1)
    layer = MonteCarloLiftingConv2d(2, 3, 5, outputs=outputs, padding=2)
    x = torch.randn(2, 2, 8, 8)
    plain = nn.functional.conv2d(x, layer.filters(), layer.bias, padding=2)
    assert layer.mask is None
    assert bool((layer.filters() != 0).all())
    torch.testing.assert_close(layer(x)[:, :, 0], plain, rtol=0, atol=0)


def angle_by_remainder(relative):
    """The published coordinate of the relative angle, which jumps where it passes 0."""
    return (torch.remainder(relative, 2 * math.pi) / math.pi - 1)[..., None]


@pytest.mark.parametrize("angle", [0.0, math.pi, 1.0])
def test_filters_do_not_jump(angle):
    step = 1e-6
    before, after = (Points([angle + shift]) for shift in (-step / 2, step / 2))
    outputs = GroupSampler(Points([0.0]), 1)
    layer = MonteCarloGroupConv2d(1, 4, 7, inputs=GroupSampler(before, 1), outputs=outputs)
    first = layer.filters()
    layer.inputs = GroupSampler(after, 1)
    moved = float((layer.filters() - first).detach().abs().max())
    assert 0 < moved < 1e-6
    kernel, weight = ImplicitKernel(1), layer.weight[:, 0]
    ends = torch.stack([angle_by_remainder(p.elements[0][0]) for p in (before, after)])
    jump = float((kernel(ends).diff(dim=0) @ weight.mT).detach().abs().max())
    assert jump < 1e-5 or angle == 0.0
    assert jump > 1e-2 or angle != 0.0


# --- the size of the output


def published_gain(channels=32, size=7, n=8, omega_0=10.0, hidden=32):
    """Standard deviation times root of the fan-in of the published recipe."""
    angles = 2 * math.pi * torch.arange(n) / n
    axis = torch.linspace(-1, 1, size)
    y, x = (t.flatten() for t in torch.meshgrid(axis, axis, indexing="ij"))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    places = torch.stack([cos * x + sin * y, cos * y - sin * x], -1)[:, None].expand(-1, n, -1, -1)
    relative = angle_by_remainder(angles - angles[:, None])[:, :, None].expand(-1, -1, len(x), -1)
    value = torch.cat([places, relative], -1)
    for fan_in, out, bound in (
        (3, hidden, 1 / 3),
        (hidden, hidden, math.sqrt(6 / hidden) / omega_0),
    ):
        value = (omega_0 * (value @ ((2 * torch.rand(fan_in, out) - 1) * bound))).sin()
    last = (2 * torch.rand(hidden, channels) - 1) * math.sqrt(6 / hidden) / omega_0
    inside = x.square() + y.square() <= 1 + 1e-9
    return float((value @ last)[:, :, inside].std() * math.sqrt(channels * n * size**2))


def test_filters_start_with_unit_gain():
    inputs, outputs = GroupSampler(Arc(), 8).eval(), GroupSampler(Arc(), 8).eval()
    layer = MonteCarloGroupConv2d(32, 16, 7, inputs=inputs, outputs=outputs, omega_0=10.0)
    values = 8 * layer.filters().unflatten(1, (32, 8)).flatten(3)[..., disk(7)]
    gain = float(values.std().detach()) * layer.fan_in("weight") ** 0.5
    assert abs(gain - 1) < 0.03
    assert published_gain() > 5


def test_lifted_noise_has_unit_variance():
    layer = MonteCarloLiftingConv2d(4, 64, 7, outputs=GroupSampler(Arc(), 8))
    y = layer(torch.randn(4, 4, 24, 24)).detach()
    assert abs(float(y.square().mean().sqrt()) - 1) < 0.05


@pytest.mark.parametrize("omega_0", [None, 10.0])
def test_the_number_of_samples_does_not_change_the_output(omega_0):
    x, scales = torch.randn(1, 1, 6, 6), {}
    sizes = {"channels": (1, 2, 2), "size": 3 if omega_0 is None else 5}
    models = [two_layers(Arc(), Arc(), **sizes, omega_0=omega_0, hidden=16) for _ in range(3)]
    for n in (4, 8, 16):
        found = []
        for draw in range(300):
            model = models[draw % len(models)]
            model[0].outputs.n_samples = model[2].outputs.n_samples = n
            redraw(model)
            with torch.no_grad():
                found.append(model(x).square().mean().sqrt())
        scales[n] = float(torch.stack(found).mean())
    assert abs(scales[4] / scales[16] - 1) < 0.1
    assert abs(scales[8] / scales[16] - 1) < 0.03


def test_a_smaller_part_of_the_group_does_not_change_the_size():
    layer = MonteCarloGroupConv2d(
        8, 16, 5, inputs=GroupSampler(Arc(), 8), outputs=GroupSampler(Arc(), 8)
    ).eval()
    x = torch.randn(2, 8, 1, 12, 12).expand(-1, -1, 8, -1, -1)
    sizes = []
    for width in (1.0, 0.5, 0.01):
        layer.inputs.distribution.width.data.fill_(width)
        sizes.append(float(layer(x).detach().square().mean().sqrt()))
    assert max(sizes) < 1.3 * min(sizes)


# --- equivariance


@pytest.mark.parametrize(("n", "mirrors"), [(4, False), (8, False), (4, True), (12, True)])
def test_even_grids_are_exactly_equivariant(n, mirrors):
    arcs = Arc(1.0, mirrors), Arc(1.0, mirrors)
    model = two_layers(*arcs, n=n * (1 + mirrors), omega_0=10.0).eval()
    x = torch.randn(2, 2, 9, 9)
    y = model(x).detach()
    # y points down, so that the rotation of x towards y turns pictures clockwise
    turned = model(x.rot90(-1, (2, 3))).detach()
    split = y.unflatten(2, (-1, n))
    expected = split.roll(n // 4, 3).rot90(-1, (4, 5)).flatten(2, 3)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    if mirrors:
        # M R(a) = R(-a) M, and the angles lie at cell centres around 0
        flipped = split.flip(2).flip(3).flip(5).flatten(2, 3)
        torch.testing.assert_close(model(x.flip(3)).detach(), flipped, rtol=1e-12, atol=1e-12)


def mean_difference(width, n, draws=300):
    """Mean over draws of what a quarter turn changes in the mean over elements and positions."""
    model = two_layers(Arc(width), Arc(width), n=n, channels=(1, 3, 3), size=5)
    x = torch.randn(1, 1, 8, 8)
    differences = []
    for _ in range(draws):
        means = []
        for picture in (x, x.rot90(1, (2, 3))):
            redraw(model)
            with torch.no_grad():
                means.append(model(picture).mean((0, 2, 3, 4)))
        differences.append(means[1] - means[0])
    found = torch.stack(differences)
    return float(found.mean(0).norm()), float((found.var(0).sum() / draws).sqrt())


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_whole_group_is_equivariant_in_expectation(n):
    mean, error = mean_difference(1.0, n)
    assert error > 0
    assert mean < 3 * error


def test_half_of_the_group_is_not():
    mean, error = mean_difference(0.5, n=8)
    assert mean > 5 * error


# --- samples


def test_evaluation_is_deterministic_and_training_redraws():
    model, x = two_layers(Arc(), Arc(), n=5), torch.randn(1, 2, 8, 8)
    trained = model(x)
    torch.testing.assert_close(model(x), trained, rtol=0, atol=0)
    assert trained.shape[2] == 5
    redraw(model, torch.Generator().manual_seed(1))
    other = model(x)
    assert float((other - trained).detach().abs().max()) > 1e-6
    redraw(model, torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), other, rtol=0, atol=0)
    model.eval()
    evaluated = model(x)
    redraw(model)
    torch.testing.assert_close(model(x), evaluated, rtol=0, atol=0)


def test_weights_count_samples():
    model, x = two_layers(Points([0.2, 1.0]), Points([0.0])), torch.randn(1, 2, 8, 8)
    repeated = Points([0.2, 1.0, 1.0])
    weighted = Points([0.2, 1.0], weights=[10.0, 20.0])
    found = []
    for points in (repeated, weighted):
        model[0].outputs = model[2].inputs = GroupSampler(points, 3)
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_width_through_every_sample():
    model, x = two_layers(Arc(), Arc(0.6), n=5), torch.randn(1, 2, 8, 8)
    width, direction = model[2].outputs.distribution.width, torch.randn(1, 4, 5, 8, 8)
    (slope,) = torch.autograd.grad((model(x) * direction).sum(), width)
    ends = []
    for step in (1e-6, -1e-6):
        tensors = {"2.outputs.distribution.width": width.detach() + step}
        y = torch.func.functional_call(model, tensors, (x,))
        ends.append((y.detach() * direction).sum())
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_evaluation_compiles_to_one_graph():
    model, x = two_layers(Arc(), Arc(), size=3, n=4).eval(), torch.randn(1, 2, 5, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


# --- hidden layers


@pytest.mark.parametrize("nonlinearity", ["siren", "relu", "leaky-relu", "swish"])
def test_features_have_unit_norm_and_move_with_the_hidden_layers(nonlinearity):
    kernel = ImplicitKernel(4, nonlinearity=nonlinearity, hidden=6)
    coordinates = 2 * torch.rand(50, 4) - 1
    features = kernel(coordinates)
    assert features.shape == (50, kernel.n_features)
    torch.testing.assert_close(features.square().sum(-1), torch.ones(50))
    assert float(features.detach().std(0).min()) > 1e-3
    for name in kernel.hyperparameter_names:
        parameter = getattr(kernel, name)
        if parameter is not None:
            (grad,) = torch.autograd.grad(kernel(coordinates)[:, 0].sum(), parameter)
            assert float(grad.abs().max()) > 0
    assert (kernel.omega_0 is None) == (nonlinearity != "siren")


def test_the_frequency_starts_at_what_pixels_show():
    outputs = GroupSampler(Arc(), 4)
    layers = [MonteCarloLiftingConv2d(1, 1, k, outputs=outputs) for k in (2, 3, 7)]
    assert [float(layer.kernel.omega_0.detach()) for layer in layers] == pytest.approx(
        [1.0, 1.0, 3.0]
    )


# --- errors


def test_errors_name_what_is_wrong():
    sampler = GroupSampler(Arc(), 4)
    trivial = GroupSampler(Points([0.0], has_rotations=False), 1)
    lifting = MonteCarloLiftingConv2d(2, 3, 3, outputs=sampler)
    group = MonteCarloGroupConv2d(2, 3, 3, inputs=sampler, outputs=sampler)
    with pytest.raises(DataError, match=r"pictures \[n, 2, y, x\]"):
        lifting(torch.zeros(1, 2, 4, 5, 5))
    with pytest.raises(DataError, match="same GroupSampler"):
        lifting(torch.zeros(1, 3, 5, 5))
    with pytest.raises(DataError, match=r"maps \[n, 2, S, y, x\]"):
        group(torch.zeros(1, 3, 4, 5, 5))
    with pytest.raises(DataError, match="same GroupSampler"):
        group(torch.zeros(1, 2, 5, 5, 5))
    with pytest.raises(ConfigError, match="ordinary convolution"):
        MonteCarloGroupConv2d(2, 3, 1, inputs=trivial, outputs=trivial)
    with pytest.raises(ConfigError, match="GroupSampler"):
        MonteCarloLiftingConv2d(2, 3, 3, outputs=Arc())
    with pytest.raises(ConfigError, match="in_channels=0"):
        MonteCarloLiftingConv2d(0, 3, 3, outputs=sampler)
    with pytest.raises(ConfigError, match="no distribution"):
        GroupSampler(nn.ReLU(), 4)
    with pytest.raises(ConfigError, match="n_samples=0"):
        GroupSampler(Arc(), 0)
    for options in ({"nonlinearity": "tanh"}, {"omega_0": 0.0}, {"hidden": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ImplicitKernel(2, **options)
