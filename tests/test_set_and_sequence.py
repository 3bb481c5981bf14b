"""Worked cases: sets and sequences, where the evidence has to find out whether places matter.

Each layer may mix all places freely (``fc``), or in the way that commutes with a group. The
read-out takes the mean over places, so only ``fc`` can tell them apart.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.groups import C, S, regular, standard
from margeq.layers import EquivariantLinear, Linear2d, ResidualPathways
from tests.oracles import MeanPool

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

PLACES, WIDTH, NOISE = 5, 8, 0.1
ITEMS, SHIFTS = standard(S(PLACES)), regular(C(PLACES))

TARGETS = {
    "of-the-set": lambda x: 2 * (x - x.mean(1, keepdim=True)).abs().mean(1),
    "of-neighbours": lambda x: 2 * ((x - x.roll(1, 1)).abs() - (x - x.roll(2, 1)).abs()).mean(1),
    "of-two-places": lambda x: (x[:, 0] - x[:, 1]).abs(),
}


def data(target, n=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, PLACES, generator=generator)
    y = TARGETS[target](x[:, 0]) + NOISE * torch.randn(n, generator=generator)
    return x, y[:, None]


def network(reps):
    def layer(c, d):
        maps = {name: EquivariantLinear(rep, rep, c, d) for name, rep in reps.items()}
        return ResidualPathways({"fc": Linear2d(c, d, PLACES, PLACES), **maps}, reduction="sum")

    hidden = (layer(1, WIDTH), nn.ReLU(), layer(WIDTH, WIDTH), nn.ReLU())
    return nn.Sequential(*hidden, MeanPool(), nn.Linear(WIDTH, 1))


def fit(target, restarts="auto", **reps):
    return margeq.optimize_marglik(
        network(reps), [data(target)], likelihood="regression", n_epochs=100, n_epochs_burnin=20,
        optimizer_kwargs={"lr": 0.02}, restarts=restarts, seed=0, progress="none",
    )  # fmt: skip


def function_share(result, path):
    table = result.effective_dimension()
    return min(table.of(layer, path).function_share for layer in ("0", "2"))


def moves_with_the_places(model, rep):
    """Largest change of the output when the group moves the places of the input."""
    x = data("of-the-set")[0]
    moved = x @ rep.matrices.to(x).mT[:, None]
    with torch.no_grad():
        return float((torch.stack([model(m) for m in moved]) - model(x)).abs().max())


@pytest.mark.parametrize(
    ("target", "rep"),
    [("of-the-set", ITEMS), ("of-neighbours", SHIFTS)],
    ids=["permutations", "shifts"],
)
def test_the_symmetry_of_the_data_is_selected(target, rep):
    result = fit(target, sharing=rep)
    assert result.selected == {"0": "sharing", "2": "sharing"}
    assert function_share(result, "sharing") > 0.9
    assert float(result.likelihood.sigma_noise) < 2 * NOISE
    assert moves_with_the_places(result.model, rep) < 1e-4


@pytest.mark.parametrize("rep", [ITEMS, SHIFTS], ids=["permutations", "shifts"])
def test_a_symmetry_that_the_data_break_is_not(rep):
    result = fit("of-two-places", sharing=rep)
    assert "sharing" not in result.selected.values()
    assert function_share(result, "fc") > 0.9
    by_start = {run.start: run.log_marginal_likelihood for run in result.restarts}
    assert result.log_marginal_likelihood > by_start["only:sharing"] + 100
    assert float(result.likelihood.sigma_noise) < 2 * NOISE
    assert moves_with_the_places(result.model, rep) > 1.0


CHOSEN = {"of-the-set": "permutations", "of-neighbours": "shifts", "of-two-places": "fc"}


@pytest.mark.parametrize(("target", "chosen"), CHOSEN.items(), ids=CHOSEN)
def test_of_nested_symmetries_alone_the_right_one_has_the_highest_evidence(target, chosen):
    """What commutes with permutations commutes with shifts, so a sum could split it at will."""
    starts = ("only:fc", "only:permutations", "only:shifts")
    result = fit(target, starts, permutations=ITEMS, shifts=SHIFTS)
    assert result.selected == {"0": chosen, "2": chosen}
