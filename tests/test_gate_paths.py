"""Gated convolutions as candidate paths beside fully connected, plain and group convolutions."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import margeq
from margeq.accumulation import accumulate
from margeq.errors import ConfigError
from margeq.groups import P2, P4, P4M, C
from margeq.laplace import log_marginal_likelihood
from margeq.layers import (
    GroupConv2d,
    GroupPool,
    LiftingConv2d,
    Linear2d,
    MergeGroup,
    MonotoneGates,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    ResidualPathways,
    SplitGroup,
    to_conv2d,
)
from margeq.likelihoods import Categorical
from margeq.models import group_digit_network
from margeq.parameters import named_hyperparameters
from margeq.paths import idle_parameters
from margeq.priors import GaussianPrior
from margeq.training.network import NetworkSteps, NetworkStepsOptions
from margeq.training.switching import PathSwitch
from tests.network_problems import by_double_backward, problem
from tests.oracles import F64, net
from tests.partial_networks import close

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

SIZE = 5


def path_sum(group, before, after, reduction="sum", **gate):
    """All four kinds of paths between maps of a group; the first layer lifts."""
    merged = before * group.order if before > 1 else before
    merge = [MergeGroup()] if before > 1 else []
    full, part = (
        (GroupConv2d, PartialGroupConv2d) if before > 1 else (LiftingConv2d, PartialLiftingConv2d)
    )
    size = (SIZE, SIZE)
    free = nn.Conv2d(merged, after * group.order, 3, padding=1)
    dense = Linear2d(merged, after * group.order, size, size)
    paths = {
        "gconv": full(before, after, 3, group=group, padding=1),
        "partial": part(before, after, 3, group=group, padding=1, **gate),
        "conv": nn.Sequential(*merge, free, SplitGroup(group)),
        "fc": nn.Sequential(*merge, dense, SplitGroup(group)),
    }
    return ResidualPathways(paths, reduction)


def network(group, **gate):
    pools = [GroupPool(group, "mean"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)]
    layers = [path_sum(group, 1, 2, "mean", **gate), nn.Tanh(), path_sum(group, 2, 2, **gate)]
    return net(*layers, nn.Tanh(), *pools)


def gates(model):
    return [model[i].paths["partial"].gate for i in (0, 2)]


def switch(model, *off):
    for layer in (0, 2):
        for path in off:
            model[layer].switch_off(path)


# --- function and evidence


@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_with_the_whole_group_it_is_a_second_group_convolution(group):
    torch.manual_seed(0)
    model, x = network(group, width=1.0, mirror=1.0), torch.randn(2, 1, SIZE, SIZE, dtype=F64)
    other = copy.deepcopy(model)
    for layer in (0, 2):
        paths = other[layer].paths
        state = paths["partial"].state_dict()
        paths["partial"] = (
            paths["gconv"]
            .__class__(*((1, 2) if layer == 0 else (2, 2)), 3, group=group, padding=1)
            .double()
        )
        paths["partial"].load_state_dict({n: v for n, v in state.items() if "gate" not in n})
    close(model(x), other(x))
    paths = [m(x) for m in model[0].paths.values()]
    close(model[0](x), sum(paths) / 4)


@pytest.mark.parametrize(("width", "mirror"), [(0.6, 0.3), (0.85, 0.9)])
@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_evidence_gradient_inside_a_sum(group, width, mirror):
    model = network(group, width=width, mirror=mirror)
    p = problem(model, 8, 1, SIZE, SIZE)
    assert len(p.hyper) == 2 * (1 + (group == P4M))
    found, expected = p.gradient(), by_double_backward(p)
    assert max(abs(float(grad)) for grad in found.values()) > 1e-3
    for name, tensor in p.hyper.items():
        close(found[name], expected[name], 1e-8)
        assert float(found[name]) == pytest.approx(difference(p, tensor), rel=1e-5, abs=1e-7)


def difference(p, tensor):
    kept, values = tensor.detach().clone(), []
    for step in (1e-5, -1e-5):
        tensor.data = kept + step
        values.append(p.value())
    tensor.data = kept
    return (values[0] - values[1]) / 2e-5


def test_a_gate_of_a_path_that_is_off_has_no_gradient_and_no_say():
    model = network(P4, width=0.6)
    model[0].switch_off("partial")
    p = problem(model, 8, 1, SIZE, SIZE)
    idle, on = (f"{layer}.paths.partial.gate.raw_width" for layer in (0, 2))
    found, value = p.gradient(), p.value()
    assert float(found[idle]) == 0.0
    assert float(found[on]) == pytest.approx(difference(p, p.hyper[on]), rel=1e-5)
    gates(model)[0].set_shares(0.3)
    assert p.value() == value


def test_the_evidence_of_a_sum_with_the_gate_at_the_identity_is_that_of_a_plain_path():
    """At the identity, PARTIAL is a convolution whose output stands at one element."""
    torch.manual_seed(2)

    class AtIdentity(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            y = self.conv(x)[:, :, None] * 2.0  # 1 / s of four elements
            return torch.cat([y, torch.zeros_like(y).expand(-1, -1, 3, -1, -1)], 2)

    lifting = LiftingConv2d(1, 2, 3, group=P4, padding=1)
    gated = PartialLiftingConv2d(1, 2, 3, group=P4, padding=1, width=0.25)
    plain = nn.Conv2d(1, 2, 3, padding=1).double()
    pools = [nn.Tanh(), GroupPool(P4, "max"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    first = net(ResidualPathways({"gconv": lifting, "p": gated}), *pools, nn.Linear(2, 3))
    plain.weight.data = gated.weight.detach().reshape(plain.weight.shape).clone()
    plain.bias.data = gated.bias.detach().clone()
    other = copy.deepcopy(first)
    other[0].paths["p"] = AtIdentity(plain)
    x, values = torch.randn(7, 1, SIZE, SIZE, dtype=F64), []
    close(first(x), other(x))
    for model in (first, other):
        state = accumulate(model, [(x, torch.arange(7) % 3)], "classification")
        prior = GaussianPrior(model, "layerwise", 0.1)
        values.append(log_marginal_likelihood(state, prior, Categorical()))
    close(values[0], values[1], 1e-10)


# --- how free it is


def all_maps(layer):
    """One map per weight and gate, as rows of a matrix."""
    weight, rows = layer.weight.detach(), []
    for width in (0.3, 0.45, 0.6, 0.7, 0.8, 1.0):
        for mirror in (0.0, 0.5, 1.0):
            layer.gate.set_shares(
                max(width, 1 / layer.gate.n_rotations), mirror if layer.gate.has_mirror else None
            )
            for entry in range(weight.numel()):
                layer.weight.data = torch.zeros_like(weight)
                layer.weight.data.view(-1)[entry] = 1.0
                rows.append(to_conv2d(layer).weight.detach().flatten())
            if not layer.gate.has_mirror:
                break
    return torch.stack(rows)


@pytest.mark.parametrize("group", [P2, P4, C(1)], ids=repr)
@pytest.mark.parametrize("make", [PartialLiftingConv2d, PartialGroupConv2d])
def test_span_is_that_of_the_maps_at_all_gates(make, group):
    layer = make(1, 1, 3, group=group, bias=False, width=max(0.6, 1 / group.order)).double()
    claimed, gconv = layer.span_dimension, layer.weight.numel()
    assert claimed == int(torch.linalg.matrix_rank(all_maps(layer)))
    layer.gate.set_shares(1.0)
    assert layer.span_dimension == gconv


def test_span_with_reflections():
    layer = PartialLiftingConv2d(1, 1, 3, group=P4M, bias=False, width=0.6, mirror=1.0).double()
    claimed = layer.span_dimension
    assert claimed == int(torch.linalg.matrix_rank(all_maps(layer))) == 9 * 3 * 2
    layer.gate.set_shares(1.0, 0.5)
    assert layer.span_dimension == claimed
    layer.gate.set_shares(1.0, 1.0)
    assert layer.span_dimension == 9


def test_a_gate_that_is_inside_makes_a_path_less_constrained():
    inside, whole = path_sum(P4, 1, 2, width=0.6), path_sum(P4, 1, 2, width=1.0)
    assert inside.less_constrained() == ("partial", "conv", "fc")
    assert whole.less_constrained() == ("conv", "fc")
    assert path_sum(P4, 2, 2, width=0.25).less_constrained() == ("partial", "conv", "fc")


# --- steps


def stepped(model, n, **options):
    """Some evidence steps; the path is switched off after the first half."""
    p = problem(model, 8, 1, SIZE, SIZE)
    steps = NetworkSteps(model, p.hyper, NetworkStepsOptions("exact", 0.3, 1), **options)
    widths = [[g.width.item() for g in gates(p.model)]] if isinstance(model, nn.Sequential) else []
    for number in range(n):
        if number == n // 2:
            inner(model)[0].switch_off("partial")
        steps.step(p.state(), p.prior, p.likelihood, p.batches, p.options, batch_fn=None)
        widths.append([g.width.item() for g in gates(inner(model))])
    return widths


def inner(model):
    return model.network if isinstance(model, MonotoneGates) else model


@pytest.mark.parametrize("strength", [None, 100.0])
def test_a_gate_of_a_path_that_is_off_does_not_move(strength):
    """Neither by momentum, nor by a prior on the gates."""
    model = network(P4, width=0.6)
    if strength is not None:
        gates(model)[1].set_shares(0.8)
        model = MonotoneGates(model, strength)
    widths = stepped(model, 6)[-6:]
    first, second = zip(*widths, strict=True)
    assert first[0] != first[2]
    assert len(set(first[2:])) == 1
    assert len(set(second)) == 6


def test_idle_parameters_are_those_of_paths_that_are_off_and_nowhere_else():
    model = network(P4)
    assert idle_parameters(model) == []
    switch(model, "partial")
    off = [*model[0].paths["partial"].parameters(), *model[2].paths["partial"].parameters()]
    assert {id(p) for p in idle_parameters(model)} == {id(p) for p in off}
    model[0].paths["conv"].gate = gates(model)[1]  # used again by a path that is on
    idle = {id(p) for p in idle_parameters(model)}
    assert id(gates(model)[0].raw_width) in idle
    assert id(gates(model)[1].raw_width) not in idle


# --- training


def digits_model(paths, group=P4):
    torch.manual_seed(0)
    return group_digit_network(2, group=group, paths=paths, widths=(2, 2), size=8)


def task(n=30):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return [(x, (x[:, 0, :4].mean((1, 2)) > 0).long())]


def fit(model, **options):
    given = {"n_epochs": 8, "n_epochs_burnin": 2, "marglik_frequency": 1, "seed": 0, **options}
    return margeq.optimize_marglik(model, task(), progress="none", **given)


@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_network_of_digits_with_a_partial_path(group):
    model = digits_model(("gconv", "partial", "conv", "fc"), group)
    assert set(named_hyperparameters(model)) == {
        f"layer{i}.paths.partial.gate.raw_{share}"
        for i in (1, 2)
        for share in ("width", "mirror")[: 1 + (group == P4M)]
    }
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 2)
    assert model.layer2.paths["partial"].input_gate is None
    with pytest.raises(ConfigError, match=r"use any of .*'partial'"):
        digits_model(("gate",))


def test_training_compares_all_starts():
    model = digits_model(("gconv", "partial", "conv"))
    result = fit(model, n_epochs=4)
    assert [r.start for r in result.restarts] == [
        "symmetric", "free", "only:gconv", "only:partial", "only:conv", "symmetric@whole",
        "symmetric@identity",
    ]  # fmt: skip
    assert not result.diagnostics.failed_restarts
    by_start = {r.start: r.history.updates for r in result.restarts}
    name = "layer1.paths.partial.gate.raw_width"
    for start, moves in {"only:gconv": False, "only:conv": False, "only:partial": True}.items():
        values = {u.hyperparameters[name][0] for u in by_start[start]}
        assert (len(values) > 1) == moves


def test_training_goes_on_while_a_partial_path_is_off_and_probed(monkeypatch):
    """Switched off after the third update, and back on after the sixth."""
    decisions = {3: ([("layer1", "partial")], []), 6: ([], [("layer1", "partial")])}
    clock = iter(range(1, 100))
    monkeypatch.setattr(PathSwitch, "decide", lambda *_: decisions.get(next(clock), ([], [])))
    result = fit(
        digits_model(("gconv", "partial", "conv")), restarts="symmetric", n_epochs=10, lr_hyp=0.3
    )
    assert [s["to"] for s in result.history.switches] == ["off", "probe"]
    name = "layer{}.paths.partial.gate.raw_width"
    first, second = (
        [u.hyperparameters[name.format(i)][0] for u in result.history.updates] for i in (1, 2)
    )
    # each update lists the gates before its step, and switches after it
    assert len(set(first[:4])) == 4
    assert len(set(first[3:7])) == 1
    assert first[7] != first[6]
    assert all(a != b for a, b in itertools.pairwise(second))
