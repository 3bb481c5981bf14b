"""Networks on samples with learned parts of a group: sizes, evidence, and training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import margeq
from margeq.accumulation import accumulate
from margeq.adjoint import network_gradient
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.laplace import log_marginal_likelihood
from margeq.layers import (
    GroupSampler,
    IdentityElement,
    MonteCarloLiftingConv2d,
    PlanarSubset,
    SamplePool,
)
from margeq.likelihoods import Categorical
from margeq.models import PartialCNN13, PartialResNet
from margeq.parameters import named_hyperparameters, named_weights
from margeq.priors import GaussianPrior

F64 = torch.float64


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def subsets(model):
    return [module for module in model.modules() if isinstance(module, PlanarSubset)]


# --- published sizes

# of the residual network: a sine next to the cosine in five filters, and in each shortcut
SINES, SHORTCUT_SINES = 5 * 32, 16
# of four convolutions, which a normalisation would take away
BIASES = 2 * 32 + 2 * 64


@pytest.mark.parametrize(
    ("group", "options", "published", "difference"),
    [
        # one shortcut, and the frequency of seven filters
        ("T(2)", {}, 450_074, SINES + SHORTCUT_SINES + 7),
        ("SE(2)", {}, 450_074, SINES + SHORTCUT_SINES + 7),
        # two, and of eight; widths of distributions are published parameters
        ("SE(2)", {"partial": True}, 467_791, SINES + 2 * SHORTCUT_SINES + 8),
        (
            "SE(2)",
            {"partial": True, "in_channels": 3},
            469_903,
            SINES + 2 * SHORTCUT_SINES + 8,
        ),
        ("E(2)", {"partial": True}, 467_988, SINES + 2 * SHORTCUT_SINES + 8),
    ],
)
def test_published_number_of_parameters(group, options, published, difference):
    assert size(PartialResNet.on(group, 8, **options)) == published + difference - BIASES


@pytest.mark.parametrize(
    ("group", "learned", "published"), [("T(2)", False, 3_994_410), ("SE(2)", True, 3_994_418)]
)
def test_published_number_of_parameters_of_13_layers(group, learned, published):
    sines = 8 * 8  # one coordinate more for the 8 hidden units of 8 group convolutions
    frequencies = 9  # of all filters; the phases are published parameters
    assert size(PartialCNN13.on(group, 8, partial=learned)) == published + sines + frequencies


# --- small networks

SMALL = {"width": 2, "kernel_size": 3, "hidden": 3, "num_classes": 3, "omega_0": 2.0}
RESNET = {**SMALL, "pool_after": (0,)}
GROUPS = [
    ("T(2)", False), ("SE(2)", False), ("SE(2)", True), ("E(2)", False), ("E(2)", True),
    ("mirror", False), ("mirror", True),
]  # fmt: skip


@pytest.mark.parametrize("head", ["max", "mlp", "t2"])
@pytest.mark.parametrize(("group", "learned"), GROUPS)
def test_all_variants_train_and_predict(group, learned, head):
    torch.manual_seed(0)
    model = PartialResNet.on(
        group, 4, partial=learned, trained_by="loss", head=head, dropout=0.1, **RESNET
    )
    n_learned = 5 - (head != "max") if learned else 0
    assert sum(s.trained_by == "loss" for s in subsets(model)) == n_learned
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    before = [p.detach().clone() for s in subsets(model) for p in s.parameters()]
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = [p.detach() for s in subsets(model) for p in s.parameters()]
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for subset in subsets(model)[1:]:
        if subset.trained_by:
            subset.to_identity()
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.requires_grad_(False)(x), rtol=0, atol=0)


def test_the_identity_alone_costs_one_sample():
    model = PartialResNet.on("E(2)", 8, partial=True, **RESNET).eval()
    for subset in subsets(model):
        if subset.trained_by:
            subset.to_identity()
    with torch.no_grad():
        counts = [len(m().angles) for m in model.modules() if isinstance(m, GroupSampler)]
    assert counts == [8, 1, 1, 1, 1, 1]
    x = torch.randn(2, 1, 8, 8)
    found = model(x)  # with mirrors of weight 0
    with torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_13_layers_train():
    torch.manual_seed(0)
    model = PartialCNN13.on("E(2)", 4, partial=True, trained_by="loss", width=2, hidden=2)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    assert len(subsets(model)) == 9
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert sum(float(grad.abs().sum()) > 0 for name, grad in grads.items() if "raw_" in name) > 8
    optimizer.step()
    model.eval()
    assert model(x).shape == (4, 10)
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    convs = [m for m in model.features if hasattr(m, "kernel")]
    assert [c.out_channels for c in convs] == [2, 2] + 7 * [4]


@pytest.mark.parametrize("make", [PartialResNet, PartialCNN13])
def test_errors_name_the_group(make):
    with pytest.raises(ConfigError, match=r"T\(2\)"):
        make.on("T(2)", partial=True)
    with pytest.raises(ConfigError, match="group='O"):
        make.on("O(3)")


# --- evidence


class Problem:
    """A small network in float64 with data, and its evidence at present hyperparameters."""

    def __init__(self, group, seed=0):
        torch.manual_seed(seed)
        self.model = PartialResNet.on(group, 4, partial=True, **RESNET).double().eval()
        x, y = torch.randn(3, 1, 8, 8, dtype=F64), torch.tensor([0, 2, 1])
        self.batches, self.likelihood = [(x, y)], Categorical()
        self.prior = GaussianPrior(self.model)
        self.inside = named_hyperparameters(self.model)

    def evidence(self):
        state = accumulate(self.model, self.batches)
        return float(log_marginal_likelihood(state, self.prior, self.likelihood).detach())

    def gradient(self):
        state = accumulate(self.model, self.batches)
        return network_gradient(
            self.model, self.batches, state, self.prior, self.likelihood, self.inside, KfacOptions()
        )

    def rise(self, name, step=1e-5, sides=(1.0, -1.0)):
        tensor, ends = self.inside[name], []
        start = tensor.detach().clone()
        entry = (0,) * start.ndim
        for side in sides:
            tensor.data[entry] = start[entry] + side * step
            ends.append(self.evidence())
        tensor.data.copy_(start)
        return (ends[0] - ends[1]) / (step * (sides[0] - sides[1]))


@pytest.mark.parametrize("group", ["SE(2)", "E(2)"])
def test_evidence_gradients_are_central_differences(group):
    problem = Problem(group)
    names = [name for name in problem.inside if "raw_" in name]
    assert len(names) == 5 * (1 + (group == "E(2)"))
    names += ["block1.conv1.kernel.log_omega_0", "block2.shortcut.kernel.weight_1"]
    names += ["conv.kernel.bias_2", "last.kernel.weight_2"]
    found, scale = problem.gradient(), []
    for name in names:
        rise = problem.rise(name)
        assert float(found[name].flatten()[0]) == pytest.approx(rise, rel=1e-4, abs=1e-6), name
        scale.append(abs(rise))
    assert sum(value > 1e-3 for value in scale) >= 0.8 * len(names)


def test_evidence_gradient_at_whole_groups_is_the_one_from_inside_or_zero():
    problem = Problem("SE(2)")
    for subset in subsets(problem.model)[1:]:
        subset.to_whole()
        subset.raw_width.data.fill_(2.397895272798371)  # the kink itself, 1.2 sigmoid - 0.1 = 1
    found, inwards = problem.gradient(), 0
    for name in [name for name in problem.inside if "raw_" in name]:
        rise = problem.rise(name, 1e-6, (0.0, -1.0))
        expected = rise if rise < 0 else 0.0
        assert float(found[name]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        inwards += rise < 0
    assert 0 < inwards < 5


def test_evidence_does_not_see_mirrors_of_weight_0():
    problem = Problem("E(2)")
    for subset in subsets(problem.model)[1:]:
        subset.set_shares(mirror=0.0)
    learned = problem.evidence(), problem.gradient()
    frozen = [s.raw_mirror.requires_grad_(False) for s in subsets(problem.model)[1:]]
    problem.inside = named_hyperparameters(problem.model)
    assert len(frozen) == 5
    assert problem.evidence() == pytest.approx(learned[0], rel=1e-12)
    for name, gradient in problem.gradient().items():
        torch.testing.assert_close(learned[1][name], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("group", ["SE(2)", "E(2)"])
def test_evidence_trains_a_network(group):
    torch.manual_seed(0)
    model = PartialResNet.on(group, 4, partial=True, **RESNET)
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    result = margeq.optimize_marglik(
        model, [(x[:6], y[:6]), (x[6:], y[6:])], n_epochs=3, n_epochs_burnin=0,
        marglik_frequency=1, restarts=["current"], seed=0, progress="none",
    )  # fmt: skip
    assert result.log_marginal_likelihood < 0
    first, *_, last = (update.hyperparameters for update in result.history.updates)
    moved = [name for name in first if first[name] != last[name]]
    assert sum("raw_" in name for name in moved) == 5 * (1 + (group == "E(2)"))
    assert sum("omega_0" in name for name in moved) == 8
    assert not any("kernel" in name or "raw_" in name for name in named_weights(model))


def test_own_distributions_still_work():
    model = PartialResNet(partial(IdentityElement, True), 1, **RESNET)
    assert model(torch.randn(4, 1, 8, 8)).shape == (4, 3)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_every_step_of_training_sees_other_samples():
    sampler = GroupSampler(PlanarSubset.whole(True, False), 4)
    model = nn.Sequential(
        MonteCarloLiftingConv2d(1, 2, 3, outputs=sampler),
        SamplePool(sampler),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    )
    seen = set()

    def remember(module, inputs, output):
        if module.training:
            seen.add(float(output.angles[0]))

    sampler.register_forward_hook(remember)
    x, y = torch.randn(6, 1, 5, 5), torch.arange(6) % 2
    margeq.optimize_marglik(
        model, [(x[:3], y[:3]), (x[3:], y[3:])], n_epochs=2, n_epochs_burnin=1,
        marglik_frequency=1, hyper_solver="fixed", seed=0, progress="none",
    )  # fmt: skip
    assert len(seen) == 4 + 1  # of the first look, before any step
