"""Experiment trackers: what they are told, run by run, and that none is imported unasked."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import margeq
from margeq.callbacks import Event
from margeq.checkpoint import Checkpoints
from margeq.cli import main
from margeq.errors import ConfigError
from margeq.layers import ResidualPathways
from margeq.trackers import Tracker, by_name, scalars, tensorboard, tracker
from tests.test_package import run_python

# four epochs are enough here
pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


class FakeRun:
    def __init__(self, **init):
        self.init, self.logged, self.finished = init, [], 0

    def log(self, metrics, *, step):
        assert not self.finished
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


class FakeModule:
    def __init__(self):
        self.runs = []

    def init(self, **init):
        self.runs.append(FakeRun(**init))
        return self.runs[-1]


OPTIONS = {
    "n_epochs": 4,
    "n_epochs_burnin": 0,
    "marglik_frequency": 2,
    "progress": "none",
    "restarts": ["symmetric", "free"],
}


def problem():
    torch.manual_seed(0)
    paths = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5)}
    model = nn.Sequential(ResidualPathways(paths), nn.Tanh(), nn.Linear(5, 3))
    return model, [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]


def train(callbacks, **options):
    return margeq.optimize_marglik(*problem(), callbacks=callbacks, **OPTIONS | options)


def kept_start(result):
    return next(restart.start for restart in result.restarts if restart.kept)


def test_each_start_is_a_run_of_its_own_with_the_numbers_of_the_history():
    module = FakeModule()
    with tracker(module, name="mine", project="digits") as follow:
        result = train([follow])
    names = [run.init for run in module.runs]
    assert names == [
        {"project": "digits", "name": "mine-symmetric"},
        {"project": "digits", "name": "mine-free"},
    ]
    assert [run.finished for run in module.runs] == [1, 1]
    kept = next(run for run in module.runs if run.init["name"] == f"mine-{kept_start(result)}")
    losses = [(step, values["loss"]) for step, values in kept.logged if "loss" in values]
    assert losses == list(enumerate(result.history.losses, 1))
    updates = [
        (step, values) for step, values in kept.logged if "log_marginal_likelihood" in values
    ]
    assert [step for step, _ in updates] == [update.epoch for update in result.history.updates]
    for (_, values), update in zip(updates, result.history.updates, strict=True):
        assert values["log_marginal_likelihood"] == update.log_marginal_likelihood
        for group, precision in update.prior_precision.items():
            assert values[f"prior_precision/{group}"] == precision
        assert values["function_share/0/a"] == update.function_share["0"]["a"]


def test_a_failure_finishes_the_run_that_is_open():
    module = FakeModule()

    def fails(event):
        if event.kind == "update":
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), tracker(module) as follow:
        train([follow, fails])
    assert [run.finished for run in module.runs] == [1]
    follow.close()  # once is enough
    assert module.runs[0].finished == 1


def test_without_a_context_the_runs_of_all_starts_are_finished():
    module = FakeModule()
    train([tracker(module)])
    assert [run.finished for run in module.runs] == [1, 1]


def test_a_resumed_run_goes_on_with_its_epoch(tmp_path):
    def stop(event):
        if event.data.get("epoch") == 3 and event.kind == "epoch":
            raise KeyError("stopped")

    every_step = Checkpoints(tmp_path, max_overhead=math.inf)
    options = {"checkpoint_dir": every_step, "restarts": ["free"]}
    with pytest.raises(KeyError, match="stopped"):
        margeq.optimize_marglik(*problem(), callbacks=[stop], **OPTIONS | options)
    module = FakeModule()
    train([tracker(module)], **options)
    assert [step for step, values in module.runs[0].logged if "loss" in values] == [3, 4]


def test_only_finite_numbers_are_logged():
    data = {
        "epoch": 2,
        "start": "free",
        "loss": math.nan,
        "sigma_noise": None,
        "clamped": 0,
        "hyperparameters": {"width": [0.5], "scale": [1.0, 2.0]},
        "effective": {},
    }
    found = scalars(Event("update", data))
    expected = {
        "clamped": 0,
        "hyperparameters/width": 0.5,
        "hyperparameters/scale/0": 1.0,
        "hyperparameters/scale/1": 2.0,
    }
    assert found == expected
    switch = {"epoch": 2, "layer": "0", "path": "fc", "to": "off"}
    assert scalars(Event("switch", switch)) == {"switch/0/fc": 0.0}
    assert scalars(Event("switch", {**switch, "to": "probe"})) == {"switch/0/fc": 1.0}
    assert scalars(Event("end", {"start": "a", "log_marginal_likelihood": -3.0})) == {}


def test_events_before_the_first_start_open_nothing():
    follow = Tracker(lambda name: pytest.fail("opened"))
    follow(Event("epoch", {"epoch": 1, "loss": 0.5}))


@pytest.mark.parametrize("module", [SimpleNamespace(), "wandb"])
def test_what_is_no_tracker_is_refused(module):
    with pytest.raises(ConfigError, match="pass the module trackio or wandb itself"):
        tracker(module)


def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard(tmp_path / "tb") as follow:
        result = train([follow])
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["free", "symmetric"]
    read = EventAccumulator(str(tmp_path / "tb" / kept_start(result))).Reload()
    losses = [(point.step, point.value) for point in read.Scalars("loss")]
    assert losses == [
        (epoch, pytest.approx(loss)) for epoch, loss in enumerate(result.history.losses, 1)
    ]
    last = read.Scalars("log_marginal_likelihood")[-1]
    assert last.value == pytest.approx(result.history.updates[-1].log_marginal_likelihood)


def test_no_tracker_is_imported_unasked():
    code = (
        "import sys, margeq\nfrom margeq import optimize_marglik, trackers\n"
        "trackers.tracker\n"
        "assert not {'tensorboard', 'trackio', 'wandb'} & set(sys.modules)"
    )
    run_python("-c", code)


def test_missing_tensorboard_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        tensorboard(tmp_path)


def test_a_run_directory_names_the_project_and_the_runs(monkeypatch, tmp_path):
    module = FakeModule()
    monkeypatch.setitem(sys.modules, "trackio", module)
    by_name("trackio", tmp_path / "digit-7f")(Event("start", {"start": "free"}))
    expected = {"project": "margeq", "group": "digit-7f", "name": "digit-7f-free"}
    assert module.runs[0].init == expected
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        by_name("trackio", tmp_path)


def test_the_command_line_follows_a_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    arguments = [
        "run",
        "--task",
        "corner",
        "--n-epochs",
        "1",
        "--n-epochs-burnin",
        "0",
        "--restarts",
        "current",
        "--track",
        "tensorboard",
        "--no-report",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["current"]
