"""Pooling and normalisation of maps on samples, in which each element counts with its weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError, DataError
from margeq.layers import (
    GroupSampler,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    PlanarSubset,
    SampleBatchNorm,
    SampleInstanceNorm,
    SamplePool,
)
from tests.group_samples import Points


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# --- elements of weight 0 change nothing


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_elements_of_weight_0_change_nothing(reduction, training):
    subset = PlanarSubset(True, True, width=0.9, mirror=0.0)
    sampler = GroupSampler(subset, 8)
    model = nn.Sequential(
        MonteCarloLiftingConv2d(1, 3, 5, outputs=sampler),
        SampleBatchNorm(3, sampler), SampleInstanceNorm(sampler),
        MonteCarloGroupConv2d(3, 3, 3, inputs=sampler, outputs=sampler),
        SampleBatchNorm(3, sampler), SamplePool(sampler, reduction),
    ).train(training)  # fmt: skip
    x, copied = torch.randn(3, 1, 9, 9), copy.deepcopy(model)
    maps = model[0](x)
    with torch.no_grad():
        assert copied[0](x).shape[2] * 2 == maps.shape[2] == 8
        torch.testing.assert_close(model(x), copied(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x).detach(), copied(x).detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        kept = copied(x)
    torch.testing.assert_close(model(x).detach(), kept, rtol=1e-12, atol=1e-12)
    for found, known in zip(model.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_equal_weights_normalise_as_usual(training):
    sampler = GroupSampler(Points([0.0, 1.0, 2.0]), 3)
    ours, plain = SampleBatchNorm(4, sampler).train(training), nn.BatchNorm3d(4).train(training)
    for layer in (ours, plain):
        nn.init.constant_(layer.weight, 1.7)
        nn.init.constant_(layer.bias, -0.4)
    for _ in range(2):
        x = 3.0 + 2.0 * torch.randn(5, 4, 3, 6, 6)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)
    for found, known in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)
    instance = SampleInstanceNorm(sampler).train(training)
    torch.testing.assert_close(instance(x), nn.InstanceNorm3d(4)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [SampleInstanceNorm, lambda s: SampleBatchNorm(2, s)])
def test_normalisation_counts_repeated_elements(make):
    x = torch.randn(4, 2, 2, 5, 5)
    weighted = make(GroupSampler(Points([0.0, 1.0], weights=[1.0, 3.0]), 2))
    repeated = make(GroupSampler(Points([0.0, 1.0, 1.0, 1.0]), 4))
    expected = repeated(x[:, :, [0, 1, 1, 1]])[:, :, :2]
    torch.testing.assert_close(weighted(x), expected, rtol=1e-10, atol=1e-10)


# --- pooling


def test_pools_weight_elements():
    x = torch.tensor([1.0, 4.0, 3.0, 9.0]).reshape(1, 1, 4, 1)
    cases = {
        (1.0, 1.0, 1.0, 1.0): (9.0, 17 / 4), (2.0, 2.0, 2.0, 0.0): (4.0, 8 / 3),
        (0.85, 0.85, 0.15, 0.15): (0.7 * 4 + 0.3 * 9, (0.85 * 5 + 0.15 * 12) / 2),
        (0.5, 0.1, 0.2, 0.0): ((0.3 + 0.2 * 3 + 0.3 * 4) / 0.8, (0.5 + 0.4 + 0.6) / 0.8),
    }  # fmt: skip
    for weights, expected in cases.items():
        sampler = GroupSampler(Points([0.0] * 4, weights=list(weights)), 4)
        found = [float(SamplePool(sampler, reduction)(x)) for reduction in ("max", "mean")]
        assert found == pytest.approx(expected)


class Half(PlanarSubset):
    """Reflections that are in or out as they are told."""

    inclusion = 1.0

    def sample(self, n_samples, generator=None):
        angles, mirrors, _ = self.quadrature(n_samples)
        z = self.inclusion + (self.mirror - self.mirror.detach())
        half = (z / 2).expand(len(angles) // 2)
        return angles, mirrors, torch.cat([1.0 - half, half])


@pytest.mark.parametrize("inclusion", [0.0, 1.0])
def test_straight_through_gradient_of_a_maximum_is_the_difference_of_both_choices(inclusion):
    subset = Half(True, True, width=1.0, mirror=0.5)
    subset.inclusion = inclusion
    pool, x = SamplePool(GroupSampler(subset, 8)), torch.randn(6, 2, 8, 3)
    maxima = x[:, :, :4].amax(2), x.amax(2)
    y, direction = pool(x), torch.randn(6, 2, 3)
    torch.testing.assert_close(y.detach(), maxima[int(inclusion)])
    mirror = subset.mirror
    (grad,) = torch.autograd.grad((y * direction).sum(), subset.raw_mirror)
    (scale,) = torch.autograd.grad(mirror, subset.raw_mirror)
    rise = ((maxima[1] - maxima[0]) * direction).sum()
    torch.testing.assert_close(grad, rise * scale)


# --- errors


def test_errors_name_what_is_wrong():
    sampler = GroupSampler(Points([0.0, 1.0]), 2)
    with pytest.raises(ConfigError, match="reduction='sum'"):
        SamplePool(sampler, "sum")
    with pytest.raises(ConfigError, match="GroupSampler"):
        SamplePool(Points([0.0]))
    for layer in (SamplePool(sampler), SampleInstanceNorm(sampler), SampleBatchNorm(3, sampler)):
        with pytest.raises(DataError, match="same GroupSampler"):
            layer(torch.zeros(1, 3, 4, 5, 5))
