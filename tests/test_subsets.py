"""What gates leave of a group: words, sectors, and moving gates to exact shares."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P4, P4M, PM, Z2, C, D
from margeq.layers import GroupGate, PartialGroupConv2d, PartialLiftingConv2d
from margeq.subsets import (
    LearnedSubset,
    Sector,
    gate_label,
    learned_subsets,
    named_gates,
    trained_gates,
)

GROUPS = [P4, P4M, PM, C(3), C(8), D(5), C(7), Z2]


class Circle(nn.Module):
    """Somebody else's gate, on all rotations."""

    hyperparameter_names = ("share",)

    def __init__(self, share, mirror=None):
        super().__init__()
        self.share, self.mirrored = nn.Parameter(torch.tensor(share)), mirror

    def learned_subset(self):
        return LearnedSubset(180.0 * float(self.share.detach()), self.mirrored, None, None)

    @torch.no_grad()
    def set_shares(self, width=None, mirror=None):
        self.share.fill_(width)
        self.mirrored = mirror

    def to_whole(self):
        self.set_shares(1.0, 1.0)

    def to_identity(self):
        self.set_shares(0.0, 0.0)


@pytest.mark.parametrize(
    ("degrees", "mirror", "words"),
    [
        (0.0, None, "no rotations"),
        (0.25, None, "rotations within ±0.25°"),
        (45.0, 0.0, "rotations within ±45°, reflections off"),
        (179.0, 0.3, "rotations within ±179°, reflections at 30%"),
        (180.0, 1.0, "all rotations, reflections on"),
    ],
)
def test_words_for_a_circle(degrees, mirror, words):
    subset = LearnedSubset(degrees, mirror, None, None)
    assert str(subset) == words
    assert subset.smallest_width == 0.0
    assert subset.sectors == (Sector(0.0, 2 * degrees, 1.0),)


def test_a_single_rotation_is_no_rotation():
    assert str(LearnedSubset(180.0, None, 1, Z2)) == "no rotations"
    assert LearnedSubset(180.0, None, 1, Z2).sectors == (Sector(0.0, 360.0, 1.0),)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_sectors_are_the_weights_of_the_rotations(group, share):
    n = GroupGate(group).n_rotations
    gate = GroupGate(group, 1 / n + share * (1 - 1 / n), 0.5).double()
    sectors = gate.learned_subset().sectors
    assert [s.centre for s in sectors] == pytest.approx([360 / n * r for r in range(n)])
    assert sum(s.extent for s in sectors) == pytest.approx(360)
    assert [s.weight for s in sectors] == pytest.approx(gate.weights()[:n].tolist(), abs=1e-12)


def test_plain_data():
    subset = GroupGate(P4M, 1.0, 0.4).learned_subset()
    found = json.loads(json.dumps(subset.to_dict()))
    assert found["nearest"] == "P4"
    assert found["mirror"] == pytest.approx(0.4)
    assert (found["degrees"], found["n_rotations"]) == (180.0, 4)
    assert found["words"] == "all rotations, reflections at 40%"
    assert GroupGate(P4, 0.6).learned_subset().to_dict()["nearest"] is None


# --- moving


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_both_ends_are_reached_exactly(group, dtype):
    gate = GroupGate(group, 1.0, 0.3).to(dtype)
    before = dict(gate.named_parameters())
    places = [parameter.data_ptr() for parameter in before.values()]
    gate.to_identity()
    assert torch.equal(gate.weights(), torch.eye(group.order, dtype=dtype)[0])
    assert gate.is_whole == (group.order == 1)
    gate.to_whole()
    assert torch.equal(gate.weights(), torch.ones(group.order, dtype=dtype))
    assert gate.is_whole
    after = dict(gate.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(p.is_leaf and p.requires_grad for p in after.values())
    assert [parameter.data_ptr() for parameter in after.values()] == places


def test_shares_that_are_not_named_stay():
    gate = GroupGate(P4M, 0.6, 0.3).double()
    gate.set_shares(width=0.7)
    assert gate.width.item() == pytest.approx(0.7, abs=1e-12)
    assert gate.mirror.item() == pytest.approx(0.3, abs=1e-6)  # made in float32
    gate.set_shares(mirror=0.9)
    assert gate.width.item() == pytest.approx(0.7, abs=1e-12)
    assert gate.mirror.item() == pytest.approx(0.9, abs=1e-12)
    gate.set_shares()
    assert gate.mirror.item() == pytest.approx(0.9, abs=1e-12)


def test_shares_that_a_group_does_not_have_are_ignored():
    plain, mirrors = GroupGate(P4, 0.6), GroupGate(PM, mirror=0.6)
    plain.set_shares(0.5, 0.5)
    mirrors.set_shares(0.5, 0.5)
    assert (plain.width.item(), plain.mirror.item()) == pytest.approx((0.5, 0.0))
    assert (mirrors.width.item(), mirrors.mirror.item()) == pytest.approx((1.0, 0.5))


def test_filters_that_were_kept_are_made_anew():
    torch.manual_seed(0)
    layer = PartialLiftingConv2d(1, 2, 3, group=P4, width=1.0)
    x = torch.randn(1, 1, 5, 5)
    with torch.no_grad():
        whole = layer(x)
        layer.gate.to_identity()
        assert torch.equal(layer(x)[:, :, 1:], torch.zeros(1, 2, 3, 3, 3))
        layer.gate.to_whole()
        assert torch.equal(layer(x), whole)


@pytest.mark.parametrize(
    ("group", "shares", "message"),
    [
        (P4M, {"width": 0.2}, r"width=0\.2 must lie between 0\.25 and 1"),
        (P4M, {"width": 0.5, "mirror": 1.2}, r"mirror=1\.2 must lie between 0 and 1"),
        (P4M, {"width": float("nan")}, "width=nan must lie"),
    ],
)
def test_shares_that_are_refused_change_nothing(group, shares, message):
    gate = GroupGate(group, 1.0, 0.8)
    before = copy.deepcopy(gate.state_dict())
    with pytest.raises(ConfigError, match=message):
        gate.set_shares(**shares)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


# --- finding


def shared_network():
    first = PartialLiftingConv2d(1, 2, 3, group=P4, width=0.6)
    second = PartialGroupConv2d(2, 2, 3, group=P4, gate=first.gate)
    third = PartialGroupConv2d(2, 2, 3, group=P4, width=0.4)
    return nn.Sequential(first, second, third, Circle(0.5))


def test_every_gate_once_by_its_first_name():
    model = shared_network()
    gates = named_gates(model)
    assert list(gates) == ["0.gate", "2.gate", "3"]
    assert gates["0.gate"] is model[1].gate
    words = {name: str(subset) for name, subset in learned_subsets(model).items()}
    assert words == {
        "0.gate": "rotations within ±108°", "2.gate": "rotations within ±72°",
        "3": "rotations within ±90°",
    }  # fmt: skip
    assert named_gates(nn.Linear(2, 2)) == {}


def test_trained_gates_are_those_whose_tensors_are_trained():
    model = shared_network()
    assert list(trained_gates(model, [model[1].gate.raw_width])) == ["0.gate"]
    assert list(trained_gates(model, model.parameters())) == ["0.gate", "2.gate", "3"]
    assert trained_gates(model, [model[0].weight]) == {}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("layer1.paths.partial.gate", "layer1 partial"),
        ("layer1.paths.partial.1.gate", "layer1 partial.1"),
        ("a.paths.b.paths.c.gate", "a b c"),
        ("paths.partial.gate", "partial"),
        ("0.gate", "0"),
        ("body.sampler", "body.sampler"),
        ("footpaths.x.gate", "footpaths.x"),
        ("gate", "gate"),
        ("", "gate"),
    ],
)
def test_labels(name, label):
    assert gate_label(name) == label


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 5, 7, 12])
def test_words_at_both_ends_do_not_depend_on_rounding(n, dtype):
    gate = GroupGate(C(n)).to(dtype)
    gate.to_identity()
    assert str(gate.learned_subset()) == "no rotations"
    gate.to_whole()
    assert str(gate.learned_subset()) == "all rotations"


def test_a_name_is_no_group():
    with pytest.raises(ConfigError, match="group='P4': use a FiniteGroup"):
        GroupGate("P4")
