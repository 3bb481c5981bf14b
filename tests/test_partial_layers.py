"""Gates on group elements: exact limits, equivariance in between, curvature, and gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from margeq.errors import ConfigError, DataError
from margeq.groups import P2, P4, P4M, PM, Z2, C, D, S
from margeq.layers import (
    GroupConv2d,
    GroupGate,
    LiftingConv2d,
    MergeGroup,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    expand_to,
    to_conv2d,
)
from margeq.parameters import named_hyperparameters, named_weights
from margeq.testing import equivariance_error
from tests.oracles import F64
from tests.partial_networks import close, gated_layers, network, plain_network

EXACT_GROUPS = (Z2, P2, P4, PM, D(2), P4M)


def narrowest(group):
    return {"width": 1.0 / GroupGate(group).n_rotations, "mirror": 0.0}


def maps(group, channels, n=3):
    return torch.randn(n, channels, group.order, 5, 5, dtype=F64)


# --- both limits


@pytest.mark.parametrize("group", EXACT_GROUPS, ids=repr)
@pytest.mark.parametrize("scale", ["variance", "mean"])
def test_at_full_width_it_is_the_group_convolution_and_equivariant(group, scale):
    model = network(group, width=1.0, mirror=1.0, scale=scale)
    x = torch.randn(2, 1, 6, 6, dtype=F64)
    assert equivariance_error(model, group, x).exact.max < 1e-12
    for gated, plain_type in ((model[0], LiftingConv2d), (model[2], GroupConv2d)):
        plain = plain_type(gated.in_channels, gated.out_channels, 3, group=group, padding=1)
        plain.double().load_state_dict(gated.state_dict(), strict=False)
        inputs = x if plain_type is LiftingConv2d else maps(group, gated.in_channels)
        close(gated(inputs), plain(inputs))
    features = maps(group, 2)
    assert torch.equal(GroupGate(group, 1.0, 1.0, scale=scale)(features), features)


@pytest.mark.parametrize("group", EXACT_GROUPS, ids=repr)
def test_at_the_smallest_width_it_is_a_plain_convolution(group):
    model, x = network(group, **narrowest(group)), torch.randn(2, 1, 6, 6, dtype=F64)
    plain = plain_network(model, group)
    close(model(x), plain(x))
    with torch.no_grad():
        features = model[:3](x)
    close(features[:, :, 0], plain[:5](x).detach())
    assert not features[:, :, 1:].any()


def test_the_error_grows_as_the_width_shrinks():
    torch.manual_seed(0)
    x, means = torch.randn(4, 1, 6, 6, dtype=F64), []
    for width in (1.0, 0.9, 0.75, 0.5, 0.25):
        errors = []
        for seed in range(8):
            torch.manual_seed(seed)
            model = network(P4, 8, width=width)[:-1]
            errors.append(equivariance_error(model, P4, x).exact.max)
        means.append(sum(errors) / len(errors))
    assert means[0] < 1e-12 < 0.01 < means[1]
    assert means == sorted(means), means


def test_evaluation_is_deterministic():
    model, x = network(P4M, width=0.6, mirror=0.4).eval(), torch.randn(2, 1, 6, 6, dtype=F64)
    assert torch.equal(model(x), model(x))


# --- what is computed


def test_only_live_elements_are_convolved():
    first, _, second = gated_layers(P4M, 2, width=0.25, mirror=0.0)[:3]
    with torch.no_grad():
        live, seen = second.gate.live(), second.seen()
        assert second.gate.touched().tolist() == [0, 1, 3, 4, 5, 7]
        assert live.tolist() == seen.tolist() == [0]
        assert second.live_filters(live, seen).shape == (2, 2, 3, 3)
        assert first.live_filters(live).shape == (2, 1, 3, 3)
    assert first.gate.live().tolist() == [0, 1, 3, 4, 5, 7]  # as its gradient needs
    first.gate.requires_grad_(False)
    assert first.gate.live().tolist() == [0]


@pytest.mark.parametrize("group", [P4, C(6), D(3)], ids=repr)
def test_skipping_changes_nothing(group):
    torch.manual_seed(0)
    gate = GroupGate(group, 0.4, 0.0)
    layer = PartialGroupConv2d(2, 3, 3, group=group, width=0.5, mirror=0.3, input_gate=gate)
    plain = GroupConv2d(2, 3, 3, group=group)
    layer, plain, gate = layer.double(), plain.double(), gate.double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = gate(maps(group, 2))
    expected = plain(x) * layer.gate.factors()[:, None, None]
    close(layer(x), expected)
    with torch.no_grad():
        close(layer(x), expected)
        filters = layer.dense_filters().unflatten(0, (3,))
        flat = filters.flatten(0, 1).flatten(1, 2)
        bias = layer.bias[:, None] * layer.gate.factors()
        dense = torch.nn.functional.conv2d(x.flatten(1, 2), flat, bias.flatten())
        close(dense.unflatten(1, (3, -1)), expected)


@pytest.mark.parametrize("group", [P4, P4M, C(8), D(3)], ids=repr)
@pytest.mark.parametrize("scale", ["variance", "mean"])
def test_factors_keep_the_scale_of_the_next_sum(group, scale):
    for width, mirror in ((1.0, 1.0), (0.7, 0.2), (1 / 3, 0.0)):
        gate = GroupGate(group, width, mirror, scale=scale).double()
        factors = gate.factors().detach()
        power = 2 if scale == "variance" else 1
        assert float(factors.pow(power).mean()) == pytest.approx(1.0)
        share = float(gate.weights().detach().mean())
        both = (1 + mirror) / 2 if gate.has_mirror else 1.0
        assert share == pytest.approx(width * both, abs=1e-7)


def test_at_the_ends_gates_are_exact_in_float32():
    for group in (P4, C(6), P4M):
        assert torch.equal(GroupGate(group, 1.0, 1.0).weights(), torch.ones(group.order))
        alone = GroupGate(group, **narrowest(group)).weights()
        assert torch.equal(alone, torch.eye(group.order)[0])


# --- whose gradient it is


def test_the_evidence_owns_the_gate_unless_the_loss_is_asked_for():
    for trained_by, names in (("evidence", {"raw_width", "raw_mirror"}), ("loss", set())):
        layer = PartialLiftingConv2d(1, 2, 3, group=P4M, trained_by=trained_by)
        declared = {name.removeprefix("gate.") for name in named_hyperparameters(layer)}
        assert declared == names
        assert {"weight", "bias"} <= set(named_weights(layer))
        assert (len(named_weights(layer)) == 2) == (trained_by == "evidence")
        layer(torch.randn(1, 1, 3, 3)).square().sum().backward()
        assert layer.gate.raw_width.grad is not None


# --- reports, export, errors


@pytest.mark.parametrize(
    ("group", "width", "mirror", "words", "nearest"),
    [
        (P4, 1.0, 0.5, "all rotations", P4),
        (P4, 0.25, 0.5, "no rotations", Z2),
        (P4, 85 / 180, 0.0, "rotations within ±85°", None),
        (P4M, 85 / 180, 0.0, "rotations within ±85°, reflections off", None),
        (P4M, 1.0, 1.0, "all rotations, reflections on", P4M),
        (P4M, 0.95, 0.4, "rotations within ±171°, reflections at 40%", P4),
        (P4M, 0.25, 1.0, "no rotations, reflections on", PM),
        (PM, 1.0, 0.0, "no rotations, reflections off", Z2),
    ],
)
def test_learned_subset(group, width, mirror, words, nearest):
    found = GroupGate(group, width, mirror).learned_subset()
    assert str(found) == words
    assert found.nearest == nearest
    assert found.degrees == pytest.approx(180 * width, rel=1e-6)


@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_export_to_a_plain_convolution(group):
    for layer, x in zip(
        network(group, 2, width=0.6, mirror=0.3)[:3:2],
        (torch.randn(2, 1, 5, 5, dtype=F64), maps(group, 2)),
        strict=True,
    ):
        if isinstance(layer, PartialGroupConv2d):
            x = layer.input_gate(x)
        merged = x if x.ndim == 4 else MergeGroup()(x)
        close(to_conv2d(layer)(merged), MergeGroup()(layer(x)))
        with pytest.raises(ConfigError, match="need not commute with Z2"):
            expand_to(layer, Z2)


def test_survives_copies_and_pickles():
    model, x = network(P4M, 2, width=0.6), torch.randn(2, 1, 5, 5, dtype=F64)
    for other in (copy.deepcopy(model[:6]), pickle.loads(pickle.dumps(model[:6]))):
        assert torch.equal(other(x), model[:6](x))
        assert other[2].input_gate is other[0].gate
    names = {name for name in model.state_dict() if name.startswith("2.")}
    assert names == {f"2.{n}" for n in ("weight", "bias", "gate.raw_width", "gate.raw_mirror")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupGate(S(3)), r"must be C\(n\) or D\(n\)"),
        (lambda: GroupGate(P4, 0.2), r"width=0\.2 must lie between 0\.25 and 1"),
        (lambda: GroupGate(P4M, mirror=1.1), r"mirror=1\.1 must lie"),
        (lambda: GroupGate(P4, trained_by="both"), "use 'evidence' or 'loss'"),
        (lambda: GroupGate(P4, scale="sum"), "scale='sum'"),
        (lambda: PartialLiftingConv2d(1, 1, 3, group=P4, gate=GroupGate(P2)), "gate on P2"),
        (lambda: PartialGroupConv2d(1, 1, 3, group=P4, input_gate=GroupGate(P2)), "input_gate"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_inputs_that_are_refused():
    with pytest.raises(DataError, match=r"maps \[n, c, 4"):
        GroupGate(P4)(torch.zeros(1, 1, 3, 5, 5))
    with pytest.raises(DataError, match="takes pictures"):
        PartialLiftingConv2d(2, 1, 3, group=P4)(torch.zeros(1, 1, 5, 5))
    with pytest.raises(TypeError, match="separability"):
        PartialGroupConv2d(1, 1, 3, group=P4, separability="gc")
