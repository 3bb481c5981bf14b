"""The demonstration's promises, on real digits (slow: about a minute per seed)."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.config import DemoConfig
from margeq.data import place_digits
from margeq.demo import Listener, run_demo
from margeq.models import digit_network

pytestmark = [
    pytest.mark.slow,
    # whether a run has settled is part of its result, not of these promises
    pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Result and verdicts of five seeds."""
    folder = tmp_path_factory.mktemp("demo")
    found = [run_demo(DemoConfig(seed=s), folder / str(s), Listener()) for s in range(5)]
    return [summary["questions"] for summary in found]


def verdicts(question, path):
    rows = question["effective_dimension"]["paths"]
    return [row["verdict"] for row in rows if row["path"] == path]


def test_which_digit_ends_with_convolutions_in_every_layer(answers):
    pure = [
        verdicts(a["digit"], "conv") == ["selected"] * 3
        and verdicts(a["digit"], "fc") == ["off"] * 3
        for a in answers
    ]
    assert sum(pure) >= 4
    assert all(a["digit"]["held_out_accuracy"] >= 0.88 for a in answers)


def test_which_corner_needs_a_fully_connected_layer(answers):
    for a in answers:
        assert set(verdicts(a["corner"], "fc")) != {"off"}
        assert a["corner"]["held_out_accuracy"] >= 0.98
        assert a["corner"]["conv_only"]["held_out_accuracy"] <= 0.35


def test_the_kept_restart_has_the_highest_evidence(answers):
    for a in answers:
        for question in a.values():
            tries = question["restarts"]
            best = max(tries, key=lambda r: r["log_marginal_likelihood"])
            assert best["kept"]
            assert question["log_marginal_likelihood"] == best["log_marginal_likelihood"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nested_models_never_lose(seed):
    """FC + CONV with all restarts is at most 0.02 nats per datum below CONV alone."""
    task = place_digits("digit", seed=seed).standardised()
    data = TensorDataset(task.train_images, task.train_labels)

    def evidence(paths):
        loader = DataLoader(data, 128, shuffle=True)
        result = margeq.optimize_marglik(
            digit_network(10, paths=paths),
            loader,
            marglik_loader=DataLoader(data, 512),
            n_epochs=30,
            n_epochs_burnin=6,
            marglik_frequency=3,
            optimizer_kwargs={"lr": 0.01},
            scheduler_cls=CosineAnnealingLR,
            scheduler_kwargs={"T_max": 30 * len(loader)},
            seed=seed,
        )
        return result.log_marginal_likelihood / result.n_data

    assert evidence(("conv", "fc")) >= evidence(("conv",)) - 0.02


def test_one_thread_repeats_bit_by_bit(tmp_path):
    torch.set_num_threads(1)
    config = DemoConfig(seed=3, epochs=6, questions=("corner",), restarts="symmetric")
    first = run_demo(config, tmp_path / "a", Listener())["questions"]["corner"]
    second = run_demo(config, tmp_path / "b", Listener())["questions"]["corner"]
    assert first["log_marginal_likelihood"] == second["log_marginal_likelihood"]
