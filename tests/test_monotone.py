"""Gates that pay for leaving more of a group than the gates before them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import margeq
from margeq.errors import ConfigError
from margeq.groups import P4, P4M
from margeq.laplace import log_marginal_likelihood
from margeq.layers import GroupGate, MonotoneGates, monotone_penalty
from margeq.parameters import log_hyperprior, named_hyperparameters
from tests.network_problems import by_double_backward, problem
from tests.oracles import F64
from tests.partial_networks import close, network

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def rising(values):
    """How much a list rises, counted by hand."""
    return sum(max(b - a, 0.0) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    "widths", [(0.5, 0.75), (0.75, 0.5), (0.3, 0.9, 0.4, 0.6), (1.0, 1.0, 0.25), (0.25, 0.25, 1.0)]
)
def test_only_rises_cost(widths):
    mirrors = [abs(1.0 - 1.3 * w) for w in widths]
    plain = [GroupGate(P4, w).double() for w in widths]
    both = [GroupGate(P4M, w, v).double() for w, v in zip(widths, mirrors, strict=True)]
    assert monotone_penalty(plain, 3.0).item() == pytest.approx(3.0 * rising(widths), abs=1e-6)
    expected = 1e-3 * (rising(widths) + rising(mirrors))
    assert monotone_penalty(both).item() == pytest.approx(expected, abs=1e-9)


def test_the_gradient_of_a_loss():
    gates = [
        GroupGate(P4M, *s, trained_by="loss").double() for s in ((0.4, 0.2), (0.7, 0.5), (0.6, 0.9))
    ]
    leaves = [p for gate in gates for p in gate.parameters()]
    found = torch.autograd.grad(monotone_penalty(gates, 2.0), leaves)
    for leaf, grad in zip(leaves, found, strict=True):
        kept, values = leaf.detach().clone(), []
        for step in (1e-6, -1e-6):
            leaf.data = kept + step
            values.append(monotone_penalty(gates, 2.0).item())
        leaf.data = kept
        assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)
    assert found[0].item() < 0 < found[2].item()  # the first grows, the second shrinks
    assert found[4].item() == 0.0  # the third is below the second


def test_a_loss_with_it_puts_gates_in_order():
    gates = nn.ModuleList(GroupGate(P4, w, trained_by="loss") for w in (0.4, 0.8, 0.6))
    sgd = torch.optim.SGD(gates.parameters(), lr=0.05)
    for _ in range(300):
        sgd.zero_grad()
        monotone_penalty(gates, 1.0).backward()
        sgd.step()
    widths = [float(gate.width.detach()) for gate in gates]
    assert rising(widths) < 0.02
    assert 0.4 < widths[0] < 0.8


# --- the evidence


def ordered(strength=7.0):
    model = MonotoneGates(network(P4M, 2), strength)
    for layer, shares in zip((0, 2, 4), ((0.4, 0.7), (0.6, 0.4), (0.55, 0.9)), strict=True):
        model.network[layer].gate.set_shares(*shares)
    return model


def test_the_evidence_contains_the_penalty():
    model = ordered()
    p, bare = problem(model, 9, 1, 5, 5), model.network
    assert p.hyper
    state, expected = p.state(), -7.0 * (0.2 + 0.5)
    assert state.log_hyperprior == pytest.approx(expected, rel=1e-9)
    assert float(log_hyperprior(model).detach()) == pytest.approx(expected, rel=1e-9)
    q = problem(bare, 9, 1, 5, 5)
    q.x, q.y, q.batches = p.x, p.y, p.batches
    assert p.value() - q.value() == pytest.approx(expected, rel=1e-9)
    close(model(p.x), bare(p.x))


def test_the_gradient_of_the_evidence():
    p = problem(ordered(), 9, 1, 5, 5)
    assert len(p.hyper) == 6
    found, expected = p.gradient(), by_double_backward(p)
    for name, tensor in p.hyper.items():
        close(found[name], expected[name], 1e-9)
        kept, values = tensor.detach().clone(), []
        for step in (1e-5, -1e-5):
            tensor.data = kept + step
            values.append(p.value())
        tensor.data = kept
        rise = (values[0] - values[1]) / 2e-5
        assert float(found[name]) == pytest.approx(rise, rel=1e-5, abs=1e-7)


def test_at_an_end_the_whole_gradient_decides_whether_it_leads_inside():
    """Data and penalty pull apart at width 1: only their sum can be told to lead inwards."""
    met = set()
    for seed in range(6):
        torch.manual_seed(seed)
        plain = network(P4, 2, width=0.6)
        plain[4].gate.set_shares(1.0)
        name = "4.gate.raw_width"
        p = problem(plain, 9, 1, 5, 5)
        raw = p.hyper[name]
        slope = float(0.75 * 1.2 * raw.sigmoid() * (1 - raw.sigmoid()))
        at_end, kept = p.value(), raw.detach().clone()
        plain[4].gate.set_shares(1.0 - 1e-6)
        outwards = (at_end - p.value()) / 1e-6  # nats per unit of width
        raw.data = kept
        for strength in (0.5 * abs(outwards), 2.0 * abs(outwards)):
            model = MonotoneGates(plain, strength)
            for tensor in p.hyper.values():
                tensor.requires_grad_(True)  # declared, until the problem is posed
            q = problem(model, 9, 1, 5, 5)
            q.x, q.y, q.batches = p.x, p.y, p.batches
            whole = outwards - strength
            expected = min(whole, 0.0) * slope
            found = float(q.gradient()[f"network.{name}"])
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
            met.add((outwards > 0, whole > 0))
    assert (True, True) in met
    assert (True, False) in met


def test_training_with_it_orders_the_gates():
    x = torch.randn(30, 1, 5, 5, dtype=F64)
    widths = {}
    for strength in (0.0, 1e3):
        torch.manual_seed(0)
        model = MonotoneGates(network(P4, 2), strength)
        for layer, width in zip((0, 2, 4), (0.5, 0.6, 0.7), strict=True):
            model.network[layer].gate.set_shares(width)
        result = margeq.optimize_marglik(
            model, [(x, torch.arange(30) % 3)], n_epochs=12, n_epochs_burnin=1, lr_hyp=0.2,
            marglik_frequency=1, restarts="current", seed=0, progress="none",
        )  # fmt: skip
        last = result.history.updates[-1].hyperparameters
        widths[strength] = [v[0] for v in last.values()]
    assert rising(widths[1e3]) < 0.5 * rising(widths[0.0])


def test_it_declares_nothing_of_its_own():
    model = ordered()
    bare = {f"network.{name}" for name in named_hyperparameters(model.network)}
    assert set(named_hyperparameters(model)) == bare
    assert {f"network.{name}" for name in model.network.state_dict()} == set(model.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: monotone_penalty([]), "0 gates have no order"),
        (lambda: monotone_penalty([GroupGate(P4)]), "1 gates have no order"),
        (lambda: MonotoneGates(nn.Linear(2, 2), 1.0), "MonotoneGates: 0 gates"),
        (lambda: monotone_penalty([GroupGate(P4)] * 2, -1.0), r"strength=-1\.0 must be"),
        (lambda: MonotoneGates(nn.Sequential(GroupGate(P4), GroupGate(P4)), float("inf")), "=inf"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_evidence_is_called_the_same_way():
    model, x = ordered(), torch.randn(4, 1, 5, 5, dtype=F64)
    batch = [(x, torch.arange(4) % 3)]
    state = margeq.laplace.accumulate(model, batch, "classification")
    prior = margeq.GaussianPrior(model, "layerwise")
    value = log_marginal_likelihood(state, prior, margeq.Categorical())
    assert torch.isfinite(value)
