"""Runs that begin with gates at the whole group and at the identity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import margeq
from margeq.errors import ConfigError
from margeq.groups import P4, P4M
from margeq.layers import (
    GroupConv2d,
    GroupGate,
    GroupPool,
    LearnedSubset,
    LiftingConv2d,
    PartialLiftingConv2d,
    ResidualPathways,
)
from margeq.parameters import named_hyperparameters, named_weights
from margeq.training.network import collect_hyperparameters
from margeq.training.starts import resolve_starts

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

ENDS = ["current", "current@whole", "current@identity"]


def gated(width=0.6, mirror=0.3, **options):
    """One gate on D4, under a linear head."""
    torch.manual_seed(0)
    first = PartialLiftingConv2d(1, 2, 3, group=P4M, width=width, mirror=mirror, **options)
    pools = [GroupPool(P4M, "mean"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(first, nn.Tanh(), *pools, nn.Linear(2, 2)).double()


def with_paths(**more):
    paths = {
        "gconv": LiftingConv2d(1, 2, 3, group=P4M),
        "partial": PartialLiftingConv2d(1, 2, 3, group=P4M),
        **more,
    }
    pools = [GroupPool(P4M, "mean"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(ResidualPathways(paths, "sum"), nn.ReLU(), *pools, nn.Linear(2, 2))


def data(n=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 5, 5, generator=generator, dtype=torch.float64)
    return [(x, (x[:, 0, :2].mean((1, 2)) > 0).long())]


def fit(model, **options):
    given = {"n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "seed": 0, **options}
    batches = [(x.to(next(model.parameters())), y) for x, y in data()]
    return margeq.optimize_marglik(model, batches, progress="none", **given)


def names(model, restarts="auto", hyperparameters=None):
    trained = collect_hyperparameters(model, ()) if hyperparameters is None else hyperparameters
    return [start.name for start in resolve_starts(model, restarts, trained.values())]


# --- names


def test_automatic_starts_with_gates():
    assert names(gated()) == ENDS
    assert names(with_paths()) == [
        "symmetric", "free", "only:gconv", "only:partial", "symmetric@whole", "symmetric@identity",
    ]  # fmt: skip
    single = ResidualPathways({"partial": PartialLiftingConv2d(1, 2, 3, group=P4)})
    assert names(single) == ["symmetric", "symmetric@whole", "symmetric@identity"]


def test_gates_that_the_run_does_not_train_have_no_starts():
    frozen = gated()
    frozen[0].gate.requires_grad_(False)
    assert names(frozen) == names(gated(trained_by="loss")) == ["current"]
    assert names(gated(), hyperparameters={}) == ["current"]
    half = gated()
    half[0].gate.raw_mirror.requires_grad_(False)
    assert names(half) == ENDS


def test_every_start_can_have_an_end():
    chosen = ["free@identity", "only:partial@whole", "current@whole", "symmetric"]
    model = with_paths()
    found = resolve_starts(model, chosen, named_hyperparameters(model).values())
    assert [start.name for start in found] == chosen
    assert [start.gates for start in found] == ["identity", "whole", "whole", None]
    assert [start.only for start in found] == [None, "partial", None, None]
    assert [start.draw for start in found] == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("current@half", "unknown start 'current@half'.*each also with @whole or @identity"),
        ("@whole", "unknown start '@whole'"),
        ("only:fc@whole", "unknown start 'only:fc@whole'"),
        ("current@", "unknown start"),
    ],
)
def test_unknown_starts(name, message):
    with pytest.raises(ConfigError, match=message):
        names(gated(), name)


def test_an_end_without_gates():
    for model in (nn.Linear(2, 2), gated(trained_by="loss")):
        with pytest.raises(
            ConfigError, match=r"is about gates, and this run trains none.*'current'"
        ):
            names(model, "current@whole")
    with pytest.raises(ConfigError, match="held by hyper_solver='fixed'"):
        fit(gated(), restarts="current@whole", hyper_solver="fixed")


# --- runs


def first_values(result):
    """The gates of each run at its first update: no step has been taken in them."""
    return {r.start: r.history.updates[0].hyperparameters for r in result.restarts}


def raw(width, mirror):
    gate = GroupGate(P4M, width, mirror).double()
    return {
        "0.gate.raw_width": [gate.raw_width.item()],
        "0.gate.raw_mirror": [gate.raw_mirror.item()],
    }


def test_every_run_begins_where_its_name_says():
    model = gated()
    result = fit(model, lr_hyp=0.5)
    assert [r.start for r in result.restarts] == ENDS
    found = first_values(result)
    for start, shares in zip(ENDS, [(0.6, 0.3), (1.0, 1.0), (0.25, 0.0)], strict=True):
        expected = raw(*shares)
        assert found[start].keys() == expected.keys()
        for name, value in expected.items():
            assert found[start][name] == pytest.approx(value, rel=1e-6)
    # the run before an end moved its gates, so each of them was really put back
    last = result.restarts[0].history.updates[-1].hyperparameters
    assert last["0.gate.raw_width"] != found["current"]["0.gate.raw_width"]


@pytest.mark.parametrize("start", ENDS)
def test_a_run_does_not_depend_on_the_runs_before(start):
    alone = fit(gated(), restarts=start).log_marginal_likelihood
    together = fit(gated(), restarts=[*reversed(ENDS), start]).restarts[-1]
    assert together.log_marginal_likelihood == pytest.approx(alone, rel=1e-10)


def test_an_end_is_the_model_with_gates_at_that_end():
    for start, shares in (("current@whole", (1.0, 1.0)), ("current@identity", (0.25, 0.0))):
        there = gated()
        there[0].gate.set_shares(*shares)
        expected = fit(there, restarts="current").log_marginal_likelihood
        found = fit(gated(), restarts=start).log_marginal_likelihood
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_kept_run_decides_where_the_gates_are():
    model = gated()
    result = fit(model)
    kept = next(r for r in result.restarts if r.kept)
    assert kept.log_marginal_likelihood == max(r.log_marginal_likelihood for r in result.restarts)
    for name, value in result.hyperparameters.items():
        assert torch.equal(model.get_parameter(name), value)
    best = max(kept.history.updates, key=lambda u: u.log_marginal_likelihood)
    assert best.hyperparameters["0.gate.raw_width"] == [model[0].gate.raw_width.item()]


def test_only_what_is_trained_goes_to_an_end():
    model = nn.Sequential(
        LiftingConv2d(1, 2, 3, group=P4M), GroupGate(P4M, 0.6, 0.3), nn.Tanh(),
        GroupConv2d(2, 2, 3, group=P4M), GroupGate(P4M, 0.7, 0.2, trained_by="loss"),
        GroupPool(P4M, "mean"), nn.Flatten(), nn.Linear(2, 2),
    ).double()  # fmt: skip
    model[1].raw_mirror.requires_grad_(False)
    weights = [name for name in named_weights(model) if "raw" not in name]
    seen = []

    def look(event):
        if event.kind == "epoch" and event.data["epoch"] == 1:
            seen.append(
                [s.item() for gate in (model[1], model[4]) for s in (gate.width, gate.mirror)]
            )

    fit(model, parameters=weights, optimizer_kwargs={"lr": 1e-9}, callbacks=[look])
    assert seen[0] == pytest.approx([0.6, 0.3, 0.7, 0.2], abs=1e-5)
    assert seen[1] == pytest.approx([1.0, 0.3, 0.7, 0.2], abs=1e-5)
    assert seen[2] == pytest.approx([0.25, 0.3, 0.7, 0.2], abs=1e-5)


def test_a_failure_at_an_end_leaves_the_model_as_it_was():
    model = gated()
    before = copy.deepcopy(model.state_dict())
    seen = []

    def stop(event):
        if event.kind == "update":
            seen.append(event.data["start"])
            if event.data["start"] == "current@identity":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[stop])
    assert set(seen) == set(ENDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_paths_and_gates_start_together():
    model = with_paths()
    result = fit(model, restarts=["only:partial@identity", "symmetric@whole"], n_epochs=2)
    identity, whole = first_values(result).values()
    name = "0.paths.partial.gate.raw_width"
    assert identity[name] == pytest.approx(raw(0.25, 0.0)["0.gate.raw_width"], rel=1e-6)
    assert whole[name] == pytest.approx(raw(1.0, 1.0)["0.gate.raw_width"], rel=1e-6)
    assert [r.start for r in result.restarts] == ["only:partial@identity", "symmetric@whole"]


class Blend(nn.Module):
    """Somebody else's gate: a share of the mirrored picture."""

    hyperparameter_names = ("share",)

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def forward(self, x):
        return x + self.share * x.flip(-1)

    def learned_subset(self):
        return LearnedSubset(0.0, self.share.item(), None, None)

    @torch.no_grad()
    def set_shares(self, width=None, mirror=None):
        self.share.fill_(mirror)

    def to_whole(self):
        self.set_shares(1.0, 1.0)

    def to_identity(self):
        self.set_shares(0.0, 0.0)


def test_gates_of_others_start_at_their_ends_too():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Blend(), nn.Flatten(), nn.Linear(18, 2)).double()
    found = first_values(fit(model))
    assert {start: values["1.share"] for start, values in found.items()} == {
        "current": [0.6], "current@whole": [1.0], "current@identity": [0.0],
    }  # fmt: skip


def test_a_gate_of_the_loss_is_refused_by_the_evidence():
    model = nn.Sequential(GroupGate(P4, 1.0, trained_by="loss"))
    with pytest.raises(ConfigError, match=r"the gate '0' was made with trained_by='loss'"):
        margeq.optimize_marglik(model, [], hyperparameters=[model[0].raw_width])
