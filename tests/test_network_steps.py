"""Hyperparameters inside the network: what is refused, and what a single step does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from margeq.accumulation import InputCovCache, accumulate_with
from margeq.errors import ConfigError, NonFiniteError
from margeq.layers import SparseConv2d
from margeq.training.network import NetworkSteps, NetworkStepsOptions, collect_hyperparameters
from tests.network_problems import conv, fit, network, problem, smooth_net
from tests.oracles import F64, worst_difference

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

# --- what cannot work


class Detached(nn.Module):
    hyperparameter_names = ("gain",)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x):
        return x * self.gain.detach().exp()


def leaf(*values):
    return torch.tensor(values, dtype=F64)


@torch.inference_mode()
def inferred():
    return leaf(1.0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([leaf(1.0)], r"does not depend on 'hyperparameters\[0\]'"),
        ([leaf(1.0).requires_grad_(True) * 2], r"hyperparameters\[0\] is no floating-point leaf"),
        ([torch.tensor([1])], r"hyperparameters\[0\] is no floating-point leaf"),
        (["0.basis"], r"hyperparameters\[0\] is no floating-point leaf"),
        (leaf(1.0), "hyperparameters is a Tensor; pass a list"),
        (None, "hyperparameters is a NoneType; pass a list"),
        ({"eta": leaf(1.0)}, "hyperparameters is a dict; pass a list"),
        ([leaf(1.0).expand(3)], r"hyperparameters\[0\]' is expanded"),
        ([leaf(1.0, 2.0, 3.0).unfold(0, 2, 1)], r"hyperparameters\[0\]' is expanded"),
        ([inferred()], r"hyperparameters\[0\]' was made in torch\.inference_mode"),
        ([leaf(1.0, math.nan)], r"hyperparameters\[0\]' begins with 1 of 2 values NaN"),
    ],
)
def test_tensors_that_cannot_be_hyperparameters(tensors, message):
    model = smooth_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        fit(model, hyperparameters=tensors)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_declared_one_that_the_output_does_not_depend_on_is_named():
    model = smooth_net()
    model.insert(1, Detached())
    with pytest.raises(ConfigError, match=r"does not depend on '1\.gain'.*requires_grad_\(False\)"):
        fit(model)
    model[1].gain.requires_grad_(False)
    fit(model)
    assert float(model[1].gain) == 0.0


def test_duplicates_count_once_and_frozen_ones_stay():
    model = smooth_net()
    logs = model[0].basis.log_lengthscale
    assert list(collect_hyperparameters(model, [logs, logs])) == ["0.basis.log_lengthscale"]
    logs.requires_grad_(False)
    before = logs.detach().clone()
    result = fit(model)
    assert result.hyperparameters == {}
    assert torch.equal(logs, before)
    assert not logs.requires_grad


def test_curvature_without_factors_is_refused_unless_they_are_fixed():
    for curvature in ("ekfac", "diag", "full"):
        with pytest.raises(ConfigError, match=r"cannot move .*0\.basis\.log_lengthscale"):
            fit(smooth_net(), curvature=curvature)
    fit(smooth_net(), curvature="ekfac", hyper_solver="fixed")


def test_closed_form_alone_names_what_has_none():
    model = smooth_net()
    model[0] = SparseConv2d(1, 4, 3, lengthscale=0.5).double()
    with pytest.raises(ConfigError, match=r"'closed-form': \['0\.basis\.log_lengthscale'\]"):
        fit(model, network_gradient="closed-form")
    with pytest.raises(ConfigError, match=r"network_gradient='best': use one of"):
        fit(model, network_gradient="best")
    fit(model, network_gradient="auto")


# --- single steps


def steps(p, method, **kwargs):
    options = NetworkStepsOptions(method, **{"lr": 0.1, "n_steps": 20, **kwargs})
    return NetworkSteps(p.model, p.hyper, options)


def step(built, p, state=None):
    built.step(state or p.state(), p.prior, p.likelihood, p.batches, p.options, batch_fn=None)


def test_closed_form_steps_end_where_the_basis_can_still_be_inverted(monkeypatch):
    p = problem(network(conv(anchors="grid", lengthscale=1.0), nn.Tanh()), 9, 2, 6, 6)
    upwards = torch.ones(1, dtype=F64)
    monkeypatch.setattr("margeq.training.network.closed_form_gradient", lambda *_: upwards)
    outputs, built, logs = p.model(p.x), steps(p, "closed-form"), p.model[0].basis.log_lengthscale
    for _ in range(3):
        step(built, p)
    assert torch.linalg.cond(p.model[0].basis()).max() < 1e7
    assert 1.0 < logs.item() < 3.0
    torch.testing.assert_close(p.model(p.x), outputs, rtol=1e-7, atol=1e-7)


def test_both_kinds_of_steps_see_the_same_state(monkeypatch):
    """With learned anchors: the visited ones are differentiated after the moves, at their state."""
    p = problem(network(conv(anchors="grid", learn_anchors=True), nn.Tanh()), 9, 2, 6, 6)
    seen = []

    def look(model, loader, state, *args, **kwargs):
        seen.append(worst_difference(state, p.state()))
        return {"0.basis.anchors": torch.zeros_like(p.model[0].basis.anchors)}

    monkeypatch.setattr("margeq.training.network.network_gradient", look)
    step(steps(p, "auto"), p)
    assert seen[0] <= 1e-8


@pytest.mark.parametrize("method", ["exact", "closed-form"])
def test_a_gradient_that_is_not_finite_is_named(method):
    p = problem(network(conv(anchors="grid"), nn.Tanh()), 9, 2, 6, 6)
    built, state = steps(p, method), p.state()
    with torch.no_grad():
        p.model[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"gradient of '0\.basis\.log_lengthscale'"):
        step(built, p, state)


def test_no_input_factor_of_a_basis_comes_from_the_cache():
    p = problem(network(conv(), nn.Tanh(), conv(channels=(3, 2))), 9, 2, 6, 6)
    cache = InputCovCache()

    def state():
        return accumulate_with(p.model, p.batches, p.likelihood, p.options, cache=cache)

    assert worst_difference(state(), p.state()) == 0.0
    with torch.no_grad():
        p.model[0].basis.log_lengthscale += 0.5
    assert worst_difference(state(), p.state()) == 0.0
