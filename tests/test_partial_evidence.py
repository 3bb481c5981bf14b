"""Evidence of networks with gates: gradients inside and at the ends, and both limits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from margeq.accumulation import accumulate
from margeq.curvature.options import KfacOptions
from margeq.groups import P4, P4M, D
from margeq.laplace import log_marginal_likelihood
from margeq.layers import GroupGate, PartialGroupConv2d
from margeq.likelihoods import Categorical
from margeq.parameters import named_hyperparameters
from margeq.priors import GaussianPrior
from margeq.shares import share_between
from tests.network_problems import by_double_backward, problem
from tests.oracles import F64
from tests.partial_networks import close, network, plain_network

# --- gradients


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        close(grad, expected[name], 1e-9)


@pytest.mark.parametrize("options", [{}, {"scale": "mean"}, {"kfac_approx": "reduce"}])
@pytest.mark.parametrize("group", [P4, D(2)], ids=repr)
def test_evidence_gradient_is_that_of_double_back_propagation(group, options):
    options = dict(options)
    how = KfacOptions(kfac_approx=options.pop("kfac_approx", "expand"))
    model = network(group, 2, width=0.6, mirror=0.3, **options)
    p = problem(model, 9, 1, 5, 5, options=how)
    assert len(p.hyper) == 3 * (1 + ("mirror" in repr(model[0].gate)))
    found = p.gradient()
    assert max(abs(float(grad)) for grad in found.values()) > 1e-3
    assert_same_gradients(found, by_double_backward(p))
    for name, tensor in p.hyper.items():
        kept = tensor.detach().clone()
        values = []
        for step in (1e-5, -1e-5):
            tensor.data = kept + step
            values.append(p.value())
        tensor.data = kept
        rise = (values[0] - values[1]) / 2e-5
        assert float(found[name]) == pytest.approx(rise, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_at_the_ends_only_gradients_that_lead_inside_count(width):
    inwards = -1.0 if width == 1.0 else 1.0
    passed = []
    for seed in range(6):
        torch.manual_seed(seed)
        gate = GroupGate(P4, width)
        model = network(P4, 2, gate=gate)
        p = problem(model, 9, 1, 5, 5)
        name = "0.gate.raw_width"
        raw = p.hyper[name]
        slope = 0.75 * 1.2 * raw.sigmoid() * (1 - raw.sigmoid())
        at_end, kept = p.value(), raw.detach().clone()
        found = float(p.gradient()[name])
        raw.data = raw_at(width + 1e-6 * inwards)
        rise = (p.value() - at_end) / 1e-6  # along the way inside
        raw.data = kept
        expected = max(rise, 0.0) * inwards * float(slope)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        passed.append(found != 0.0)
    assert len(set(passed)) == 2  # both cases were met


def raw_at(width):
    """Where :func:`share_between` gives this width."""
    target = ((width - 0.25) / 0.75 + 0.1) / 1.2
    raw = torch.logit(torch.tensor(target, dtype=F64))
    assert float(share_between(raw, 0.25, ascend=True)) == pytest.approx(width, abs=1e-12)
    return raw


# --- curvature


def state_of(model, x, **options):
    batch = [(x, torch.arange(len(x)) % 3)]
    return accumulate(model, batch, "classification", **options)


@pytest.mark.parametrize("options", [{}, {"kfac_approx": "reduce"}, {"curvature": "ekfac"}])
def test_at_the_smallest_width_the_evidence_is_that_of_plain_convolutions(options):
    torch.manual_seed(1)
    model = network(P4, 4, width=0.25)
    with torch.no_grad():  # filters between other elements have no curvature, but a prior
        for layer in (model[2], model[4]):
            layer.weight[:, :, 1:] = 0.0
    plain, x = plain_network(model, P4), torch.randn(7, 1, 5, 5, dtype=F64)
    krons = state_of(plain, x).kron.values()
    assert all(float(kron.grad_cov.diagonal(0, 1, 2).sum()) > 1e-4 for kron in krons)
    values = []
    for m in (model, plain):
        state, prior = state_of(m, x, **options), GaussianPrior(m, "layerwise", 1e-4)
        values.append(log_marginal_likelihood(state, prior, Categorical()))
    close(values[0], values[1], 1e-10)


def test_the_evidence_has_no_steps():
    torch.manual_seed(0)
    gate = GroupGate(P4M, 0.75, 0.0)
    model, x = network(P4M, 4, gate=gate), torch.randn(5, 1, 5, 5, dtype=F64)
    for kfac_approx in ("expand", "reduce"):
        values = []
        for width in (0.75 - 1e-8, 0.75 + 1e-8):
            gate.raw_width.data = raw_at(width)
            state = state_of(model, x, kfac_approx=kfac_approx)
            prior = GaussianPrior(model, "layerwise")
            values.append(log_marginal_likelihood(state, prior, Categorical()).item())
        assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_a_shared_gate_is_one_hyperparameter():
    gate = GroupGate(P4, 0.6)
    model = network(P4, 2, gate=gate)
    layers = [model[0], PartialGroupConv2d(2, 2, 3, group=P4, gate=gate, input_gate=gate).double()]
    shared = nn.Sequential(*layers, *model[-4:])
    assert set(named_hyperparameters(shared)) == {"0.gate.raw_width"}
    copied = copy.deepcopy(shared)
    assert copied[1].gate is copied[1].input_gate is copied[0].gate is not gate
    p = problem(shared, 9, 1, 5, 5)
    assert_same_gradients(p.gradient(), by_double_backward(p))
