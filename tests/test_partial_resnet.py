"""The residual network on samples of a group: published sizes, samples, curvature."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from margeq.accumulation import accumulate
from margeq.adjoint import network_gradient
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.laplace import log_marginal_likelihood
from margeq.layers import GroupSampler, IdentityElement
from margeq.likelihoods import Categorical
from margeq.models.partial_resnet import PartialResNet
from margeq.parameters import named_hyperparameters, named_weights
from margeq.priors import GaussianPrior
from tests.group_samples import Arc, Points

PLANE = partial(IdentityElement, has_rotations=True)
SE2 = partial(Points, [2 * math.pi * (r - 3.5) / 8 for r in range(8)])
E2 = partial(Points, SE2().elements[0].tolist(), [1.0, -1.0] * 4)

# a cosine and a sine where the published filters have one angle, in five filters and in shortcuts
COORDINATE, SHORTCUT_COORDINATE = 5 * 32, 16

# of four convolutions, which a normalisation would take away
BIASES = 2 * 32 + 2 * 64


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("whole", "learned", "options", "published", "difference"),
    [
        # the frequency of seven filters, or of eight
        (PLANE, None, {}, 450_074, COORDINATE + SHORTCUT_COORDINATE + 7),
        (SE2, None, {}, 450_074, COORDINATE + SHORTCUT_COORDINATE + 7),
        (SE2, Arc, {}, 467_791, COORDINATE + 2 * SHORTCUT_COORDINATE + 8),
        (
            SE2,
            Arc,
            {"in_channels": 3},
            469_903,
            COORDINATE + 2 * SHORTCUT_COORDINATE + 8,
        ),
        # and five probabilities of mirrors, which the distributions here do not have
        (
            E2,
            partial(Arc, mirrors=True),
            {},
            467_988,
            COORDINATE + 2 * SHORTCUT_COORDINATE + 8 - 5,
        ),
    ],
    ids=["t2", "se2", "partial-se2", "partial-se2-colours", "partial-e2"],
)
def test_published_number_of_parameters(whole, learned, options, published, difference):
    assert size(PartialResNet(whole, 8, learned, **options)) == published + difference - BIASES


def small(learned=None, **options):
    torch.manual_seed(0)
    sizes = {"width": 2, "kernel_size": 3, "hidden": 3, "num_classes": 3, "pool_after": (0,)}
    return PartialResNet(
        partial(Points, [0.0, 2.0]), 2, learned, **{**sizes, "omega_0": 2.0, **options}
    )


@pytest.mark.parametrize("head", ["max", "mlp", "t2"])
@pytest.mark.parametrize("learned", [None, partial(Arc, 0.7)])
def test_training_redraws_and_evaluation_does_not(head, learned):
    model, x = small(learned, head=head, dropout=0.5), torch.randn(4, 1, 8, 8)
    assert model(x).shape == (4, 3)
    samplers = {m for m in model.modules() if isinstance(m, GroupSampler)}
    assert len(samplers) == (1 if learned is None else 6) + (learned is None and head == "t2")
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    if learned is not None:
        model.train()
        before = [sampler()[0].detach() for sampler in samplers]
        model(x)
        after = [sampler()[0].detach() for sampler in samplers]
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_whole_group_gives_invariant_outputs():
    whole = partial(Points, [math.pi * r / 2 for r in range(4)])
    torch.manual_seed(0)
    model = PartialResNet(whole, 4, width=3, kernel_size=3, hidden=4, omega_0=3.0).double().eval()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x.rot90(1, (2, 3))), model(x), rtol=1e-12, atol=1e-12)
    # the default start has no such symmetry with elements of a part of the group
    other = small(partial(Arc, 0.5)).double().eval()
    x = x[..., :8, :8]
    assert float((other(x.rot90(1, (2, 3))) - other(x)).detach().abs().max()) > 1e-3


def test_only_the_evidence_moves_filters_and_widths():
    model = small(partial(Arc, 0.7)).double().eval()
    inside, weights = named_hyperparameters(model), named_weights(model)
    widths = [name for name in inside if name.endswith("width")]
    assert len(widths) == 5
    assert sum(name.endswith("log_omega_0") for name in inside) == 8
    assert not any("kernel" in name or "distribution" in name for name in weights)
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 1])
    likelihood, prior = Categorical(), GaussianPrior(model)
    state, options = accumulate(model, [(x, y)]), KfacOptions()
    found = network_gradient(model, [(x, y)], state, prior, likelihood, inside, options)
    for name in ("block2.conv1.outputs.distribution.width", "block1.shortcut.kernel.log_omega_0"):
        tensor, ends = inside[name], []
        for step in (1e-5, -2e-5):
            tensor.data += step
            ends.append(log_marginal_likelihood(accumulate(model, [(x, y)]), prior, likelihood))
        tensor.data += 1e-5
        rise = float((ends[0] - ends[1]).detach()) / 2e-5
        assert abs(rise) > 1e-4
        assert float(found[name]) == pytest.approx(rise, rel=1e-4)


def test_errors_name_the_argument():
    with pytest.raises(ConfigError, match="head='mean'"):
        small(head="mean")
    with pytest.raises(ConfigError, match="pool_after"):
        small(pool_after=(3,))
    with pytest.raises(ConfigError, match="width=0"):
        small(width=0)
