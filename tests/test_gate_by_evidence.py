"""The evidence finds how much of a rotation symmetry the data have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.data import load_digits
from margeq.groups import P4
from margeq.layers import GroupPool, PartialGroupConv2d, PartialLiftingConv2d
from margeq.parameters import named_weights

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

MEAN, SPREAD = 0.3, 0.37


def turned(classes, n_train):
    """Digits of some classes, each turned by a random multiple of 90 degrees, and by which."""
    images, digits = load_digits()
    chosen = torch.isin(digits, torch.tensor(classes)).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    turns = torch.randint(4, (len(chosen),), generator=generator)
    pairs = zip(images[chosen], turns.tolist(), strict=True)
    x = torch.stack([torch.rot90(image, turn) for image, turn in pairs])[:, None]
    x, labels = (x - MEAN) / SPREAD, torch.searchsorted(torch.tensor(classes), digits[chosen])
    return [(x[part], labels[part], turns[part]) for part in (slice(n_train), slice(n_train, None))]


def sixes():
    """Is it turned by 0 or 90 degrees, or by 180 or 270? Only the pose tells."""
    return [(x, (turns < 2).long()) for x, _, turns in turned([6], 120)]


def digits():
    """Which digit is it? The pose tells nothing."""
    return [(x, labels) for x, labels, _ in turned([1, 4, 7], 200)]


def network(width, n_classes, **options):
    torch.manual_seed(0)
    first = PartialLiftingConv2d(1, 4, 3, group=P4, width=width, **options)
    second = PartialGroupConv2d(4, 4, 3, group=P4, gate=first.gate, input_gate=first.gate)
    pools = [GroupPool(P4, "mean"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pools, nn.Linear(4, n_classes))


def width_of(model):
    return model[0].gate.width.item()


def fit(model, task, n_epochs=70, **options):
    """Train once on the first part; evidence per datum, and accuracy on the second."""
    train, test = task
    given = {"n_epochs": n_epochs, "restarts": "current", **options}
    result = margeq.optimize_marglik(
        model, [train], marglik_frequency=4, lr_hyp=0.4, optimizer_kwargs={"lr": 0.04}, seed=0,
        progress="none", **given,
    )  # fmt: skip
    with torch.no_grad():
        accuracy = (model.eval()(test[0]).argmax(1) == test[1]).float().mean()
    return result.log_marginal_likelihood / len(train[0]), float(accuracy)


def test_a_network_with_the_whole_symmetry_cannot_tell_poses():
    model = network(1.0, 2)
    model[0].gate.requires_grad_(False)
    evidence, accuracy = fit(model, sixes())
    assert str(model[0].gate.learned_subset()) == "all rotations"
    assert accuracy < 0.65
    assert evidence < -0.65  # of a coin: -0.69


def test_the_evidence_gives_up_a_symmetry_that_the_data_lack():
    model = network(0.8, 2)
    evidence, accuracy = fit(model, sixes())
    assert width_of(model) < 0.5
    assert accuracy > 0.95
    assert evidence > -0.45


def test_the_evidence_keeps_and_completes_a_symmetry_of_the_data():
    model = network(0.7, 3)
    fit(model, digits())
    subset = model[0].gate.learned_subset()
    assert subset.nearest == P4
    assert width_of(model) > 0.95


def test_the_training_loss_moves_a_gate_only_if_it_is_given_to_it():
    moved = {}
    for trained_by in ("evidence", "loss"):
        model = network(0.6, 2, trained_by=trained_by)
        weights = [name for name in named_weights(model) if "gate" not in name]
        before = width_of(model)
        fit(model, sixes(), 6, n_epochs_burnin=0, hyper_solver="fixed", parameters=weights)
        moved[trained_by] = width_of(model) != before
    assert moved == {"evidence": False, "loss": True}


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_poses_from_both_ends(width):
    model = network(width, 2)
    evidence, accuracy = fit(model, sixes(), 160)
    assert width_of(model) < 0.5
    assert accuracy > 0.95
    assert evidence > -0.4


@pytest.mark.slow
def test_two_starts_of_digits_agree_by_evidence():
    found = {}
    for width in (0.25, 0.7):
        model = network(width, 3)
        found[width] = (fit(model, digits(), 160)[0], width_of(model))
    assert max(found.values())[1] > 0.85
