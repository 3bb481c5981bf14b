"""Runs of the command line: configurations, tasks, directories, going on, exit codes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import margeq
from margeq.checkpoint import CheckpointWriter, run_lock
from margeq.cli import main
from margeq.config import DemoConfig, RunConfig
from margeq.errors import CheckpointLocked, ConfigError, DeterminismWarning
from margeq.runs import (
    Task,
    execute,
    files,
    held_out,
    identity,
    layout,
    plain,
    register_task,
    tasks,
)
from margeq.terminal import demo as demo_face
from margeq.terminal import run as run_face
from tests.run_files import FLAGS, QUICK, TINY

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Tasks that a test registers are gone after it."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TINY)
    return path


@pytest.fixture
def quick(factory):
    """A configuration whose task is registered."""
    tasks.load_factory(factory)
    return RunConfig(**QUICK)


# -- configurations ------------------------------------------------------------------------------


def test_defaults_are_those_of_optimize_marglik():
    defaults = inspect.signature(margeq.optimize_marglik).parameters
    own = {"task", "arguments", "seed", "threads", "optimizer", "lr", "momentum", "scheduler"}
    for field in fields(RunConfig):
        if field.name not in own | {"restarts"}:
            assert field.default == defaults[field.name].default, field.name
    assert RunConfig().restarts == (defaults["restarts"].default,)
    assert defaults["optimizer_cls"].default is execute._OPTIMIZERS[RunConfig().optimizer]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_epoch": 3}, "unknown key 'n_epoch' (did you mean 'n_epochs'?); known are task, arg"),
        ({"_target_": "os.system"}, "unknown key '_target_'"),
        ({"n_epochs": 3.0}, "n_epochs = 3.0, expected an integer"),
        ({"n_epochs": True}, "n_epochs = True, expected an integer"),
        ({"lr": "fast"}, "lr = 'fast', expected a number"),
        ({"lr": float("nan")}, "lr = nan is not finite"),
        ({"lr": True}, "lr = True, expected a number"),
        ({"deterministic": 1}, "deterministic = 1, expected true or false"),
        ({"task": 3}, "task = 3, expected a text"),
        ({"optimizer": "torch.optim.Adam"}, "expected one of 'adam', 'adamw', 'sgd'"),
        ({"restarts": [1]}, "restarts = [1], expected a list, each a text"),
        ({"restarts": 7}, "restarts = 7, expected a list"),
        ({"arguments": [1]}, "arguments = [1], expected a table"),
        ({"arguments": {"x": object}}, "arguments.x = <class 'object'> is a type, which JSON"),
        ({"arguments": {3: 1}}, "arguments: key 3 is no text"),
        ({"prior_prec_init": "big"}, "expected a number or one of 'function-scale'"),
        ({"momentum": "0.9"}, "momentum = '0.9', expected a number"),
        ({"momentum": 0.9}, "momentum is for optimizer 'sgd', not 'adam'"),
        ({"threads": 0}, "threads = 0, at least 1"),
    ],
)
def test_a_wrong_configuration_is_refused_with_key_and_value(values, said):
    with pytest.raises(ConfigError) as error:
        plain.config_from(values, "here")
    assert str(error.value).startswith("here: ")
    assert said in str(error.value)


def test_a_right_configuration_has_one_form():
    given = {"lr": 1, "restarts": "free", "prior_prec_init": 2, "arguments": {"w": (1, 2)}}
    config = plain.config_from(given, "here")
    assert (config.lr, type(config.lr)) == (1.0, float)
    assert config.restarts == ("free",)
    assert (config.prior_prec_init, type(config.prior_prec_init)) == (2.0, float)
    assert config.arguments == {"w": [1, 2]}
    assert plain.config_from(plain.plain_config(config), "again") == config
    assert plain.config_from({}, "here") == RunConfig()


@pytest.mark.parametrize("name", ["os.system", "train.py:make", "../x", "a b", "", "x" * 65, "1a"])
def test_a_task_can_only_be_named(name, tmp_path, capsys):
    with pytest.raises(ConfigError, match="cannot point to code"):
        register_task(name)
    if name:
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"task": name}))
        for given in (["--task", name], ["--config", str(path)]):
            assert main(["run", *given, "--out", str(tmp_path / "run")]) == 2
            assert "cannot point to code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_name_that_nobody_registered_reaches_no_code(tmp_path, capsys):
    assert main(["run", "--task", "system", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "task 'system' is not registered; there are corner, digit" in err
    assert not (tmp_path / "run" / "config.json").exists()


def test_files_are_read_as_toml_or_json(tmp_path):
    (tmp_path / "a.toml").write_text('task = "digit"\n[arguments]\ncopies = 1\n')
    (tmp_path / "a.json").write_text('{"task": "digit", "arguments": {"copies": 1}}')
    assert files.read_table(tmp_path / "a.toml") == files.read_table(tmp_path / "a.json")
    for name, text in (("b.toml", "x = "), ("b.json", "{"), ("c.json", "[1]"), ("d.json", "\xff")):
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=name):
            files.read_table(tmp_path / name)
    with pytest.raises(ConfigError, match=r"no\.json: No such file"):
        files.read_table(tmp_path / "no.json")


def test_flags_come_after_the_file(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(run_face, "show_run", seen.append)
    path = tmp_path / "a.toml"
    path.write_text('task = "digit"\nlr = 0.5\nmomentum = 0.9\noptimizer = "sgd"\nseed = 4\n')
    given = ["--lr", "0.25", "--arguments", "copies=1", "name=x", 'paths=["conv"]']
    assert main(["run", "--config", str(path), *given]) == 0
    flags = seen[0]
    assert (flags.task, flags.lr, flags.seed, flags.momentum) == ("digit", 0.25, 4, 0.9)
    assert flags.arguments == {"copies": 1, "name": "x", "paths": ["conv"]}
    assert main(["run", "--arguments", "copies"]) == 2
    assert "'copies' is not NAME=VALUE" in capsys.readouterr().err


# -- identity ------------------------------------------------------------------------------------


def test_the_id_is_that_of_the_configuration():
    config = RunConfig(task="digit", arguments={"a": 1, "b": 2})
    assert identity.run_id(config) == identity.run_id(replace(config, arguments={"b": 2, "a": 1}))
    assert len(identity.run_id(config)) == 12
    assert set(identity.run_id(config)) <= set("0123456789abcdef")
    other = {int: 77, float: 0.125, str: "x", bool: True, tuple: ("x",), dict: {"x": 1}}
    for field in fields(RunConfig):
        value = other.get(type(getattr(config, field.name)), 0.5)  # momentum is None
        changed = replace(config, **{field.name: value})
        assert identity.run_id(changed) != identity.run_id(config), field.name


def test_differences_name_nested_keys():
    old, new = {"a": {"x": 1, "y": 2}, "b": 1, "c": {}}, {"a": {"x": 1, "y": 3}, "c": {"z": 0}}
    assert identity.differences(old, new) == [
        "a.y: 2 there, 3 here",
        "b: 1 there, '-' here",
        "c.z: '-' there, 0 here",
    ]
    assert identity.differences(old, old) == []


# -- directories ---------------------------------------------------------------------------------


def test_a_run_directory_has_its_configuration_first_and_its_result_last(quick, tmp_path, factory):
    seen = []

    def watch(event):
        seen.append({path.name for path in run.iterdir()})

    run = tmp_path / "run"
    summary = execute.execute(quick, run, factory=factory, callbacks=[watch])
    assert all(layout.CONFIG in names and layout.RESULT not in names for names in seen)
    assert {"config.json", "events.jsonl", "checkpoints", "result.json"} <= set(
        path.name for path in run.iterdir()
    )
    stored = json.loads((run / "config.json").read_text())
    assert (stored["command"], stored["id"]) == ("run", identity.run_id(quick))
    assert plain.config_from(stored["config"], "stored") == quick
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["factory"] == {"path": str(factory), "sha256": identity.file_digest(factory)}
    assert summary == json.loads((run / "result.json").read_text())
    assert summary["held_out"].keys() == {"accuracy"}
    per_datum = summary["log_marginal_likelihood"] / summary["n_data"]
    assert summary["log_marginal_likelihood_per_datum"] == pytest.approx(per_datum, rel=1e-15)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][-1] == "result"


def test_a_finished_run_gives_its_result_again(quick, tmp_path):
    first = execute.execute(quick, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    tasks._TASKS.pop("tiny")  # it is not even built
    events = []
    assert execute.execute(quick, tmp_path / "run", callbacks=[events.append]) == first
    assert events == []
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    lock = tmp_path / "run" / ".lock"
    assert {p: t for p, t in after.items() if p != lock} == {
        p: t for p, t in before.items() if p != lock
    }


def test_the_directory_of_another_run_is_refused(quick, tmp_path):
    execute.execute(quick, tmp_path / "run")
    other = replace(quick, lr=0.1, arguments={"width": 2})
    with pytest.raises(ConfigError) as error:
        execute.execute(other, tmp_path / "run")
    assert "(arguments.width: '-' there, 2 here; lr: 0.05 there, 0.1 here)" in str(error.value)
    (tmp_path / "run" / "config.json").write_text('{"command": "demo", "config": {}}')
    with pytest.raises(ConfigError, match="command: 'demo' there, 'run' here"):
        execute.execute(quick, tmp_path / "run")


def test_without_resuming_everything_is_done_again(quick, tmp_path):
    execute.execute(quick, tmp_path / "run")
    before = (tmp_path / "run" / "events.jsonl").read_text().count("\n")
    other = replace(quick, lr=0.1)
    summary = execute.execute(other, tmp_path / "run", resume=False)
    assert summary["config"]["lr"] == 0.1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lr"] == 0.1
    assert (tmp_path / "run" / "events.jsonl").read_text().count("\n") == before


def without_seconds(summary):
    """What has to be the same in two runs."""
    cleared = json.loads(json.dumps(summary) + "")
    cleared.pop("seconds")
    for restart in cleared["restarts"]:
        for update in restart["history"]["updates"]:
            update.pop("seconds")
    return cleared


def test_an_interrupted_run_ends_like_one_that_was_not(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "is_due", lambda self: True)
    whole = execute.execute(quick, tmp_path / "whole")
    run = tmp_path / "run"

    def interrupt(event):
        if event.kind == "epoch" and event.data["epoch"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute.execute(quick, run, callbacks=[interrupt])
    assert not (run / "result.json").exists()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "ep')  # killed while it wrote
    events = []
    resumed = execute.execute(quick, run, callbacks=[events.append])
    assert without_seconds(resumed) == without_seconds(whole)
    assert next(e for e in events if e.kind == "start").data["epoch"] >= 3
    for line in (run / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["event"]


def test_the_task_begins_with_the_seed_and_leaves_the_global_state_alone(tmp_path):
    drawn = []

    @register_task("drawing")
    def drawing(seed):
        model = nn.Linear(2, 2)
        drawn.append(model.weight.detach().clone())
        x = torch.linspace(-1, 1, 12).reshape(6, 2)
        return Task(model, [(x, torch.tensor([0, 1] * 3))])

    config = RunConfig(**QUICK | {"task": "drawing"})
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        summary = execute.execute(replace(config, seed=seed), tmp_path / name)
        assert summary["held_out"] is None
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)  # whatever else happens
        before = torch.get_rng_state()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_threads_are_those_of_the_configuration(quick, tmp_path, torch_as_before):
    seen = []
    config = replace(quick, threads=2)
    execute.execute(
        config, tmp_path / "run", callbacks=[lambda event: seen.append(torch.get_num_threads())]
    )
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_names_become_arguments(quick, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def record(model, loader, **options):
        raise Seen(options)

    monkeypatch.setattr(execute, "optimize_marglik", record)
    config = replace(
        quick, optimizer="sgd", momentum=0.5, scheduler="cosine", restarts=("free", "symmetric"),
        curvature="ekfac", seed=5, prior="scalar", temperature=0.5, network_gradient="exact",
    )  # fmt: skip
    with pytest.raises(Seen) as seen:
        execute.execute(config, tmp_path / "run")
    options = seen.value.args[0]
    assert options["optimizer_cls"] is torch.optim.SGD
    assert options["optimizer_kwargs"] == {"lr": 0.05, "momentum": 0.5}
    assert options["scheduler_cls"] is torch.optim.lr_scheduler.CosineAnnealingLR
    assert options["scheduler_kwargs"] == {"T_max": 6 * 2}
    assert options["restarts"] == ["free", "symmetric"]
    for name in ("curvature", "seed", "prior", "temperature", "network_gradient", "n_epochs"):
        assert options[name] == getattr(config, name)
    taken = inspect.signature(margeq.optimize_marglik).parameters.keys()
    assert options.keys() <= taken
    left_out = taken - options.keys() - {"model", "train_loader"}
    # no names in a configuration, or the command line's own business
    assert left_out == {"hyperparameters", "parameters", "backend"}
    with pytest.raises(Seen) as seen:
        execute.execute(quick, tmp_path / "auto")
    assert seen.value.args[0]["restarts"] == "auto"


def test_a_schedule_needs_the_number_of_batches():
    class Endless:
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigError, match="training loader, a Endless, has no len"):
        _ = Task(nn.Linear(1, 1), Endless()).n_batches


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"cannot write to .*a\.json: No space left"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# -- tasks ---------------------------------------------------------------------------------------


def test_a_file_with_a_plain_task_function_names_it(tmp_path, factory):
    path = tmp_path / "plainly.py"
    path.write_text(TINY.replace('@register_task("tiny")\ndef tiny', "def task"))
    assert tasks.load_factory(path) == ["plainly"]
    assert execute.with_task(RunConfig(), path).task == "plainly"
    assert execute.with_task(RunConfig(task="tiny"), path).task == "tiny"  # judged when it is built
    assert tasks.load_factory(factory) == ["tiny"]
    assert tasks.load_factory(factory) == ["tiny"]  # the same file may be given twice


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "registers no task"),
        (TINY.replace('"tiny"', '"digit"'), "task 'digit' is registered already"),
        (TINY.replace('"tiny"', '"os.system"'), "cannot point to code"),
    ],
)
def test_a_file_without_a_task_of_its_own_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        tasks.load_factory(path)
    with pytest.raises(ConfigError, match="no such Python file"):
        tasks.load_factory(tmp_path / "none.py")


def test_a_task_has_to_be_named_where_there_are_several(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(TINY + TINY.replace('"tiny"', '"second"').replace("def tiny", "def second"))
    with pytest.raises(ConfigError, match="task is missing: name one of tiny, second by --task"):
        execute.with_task(RunConfig(), path)
    with pytest.raises(ConfigError, match="task is missing: name one of corner, digit"):
        execute.with_task(RunConfig(), None)


def test_arguments_of_a_task_are_checked_before_it_is_called(quick):
    with pytest.raises(ConfigError, match=r"tiny\(seed, width=3, trouble=''\), not with height"):
        tasks.build("tiny", 0, {"height": 3})
    register_task("wrong")(lambda seed: 3)
    with pytest.raises(ConfigError, match=r"returned a int, not a margeq\.runs\.Task"):
        tasks.build("wrong", 0, {})


def test_a_changed_file_is_a_warning(quick, tmp_path, factory):
    execute.execute(quick, tmp_path / "run", factory=factory)
    execute.execute(quick, tmp_path / "run", factory=factory)
    factory.write_text(TINY + "# changed")
    with pytest.warns(DeterminismWarning, match=r"mine\.py has changed since"):
        execute.execute(quick, tmp_path / "run", factory=factory)


def test_built_in_tasks_are_those_of_the_demonstration():
    for name, classes, n in (("digit", 10, 2874), ("corner", 4, 1437)):
        task = tasks.build(name, 0, {})
        images, labels = task.held_out[0]
        assert (len(images), len(labels)) == (360, 360)
        assert task.model.head.out_features == classes
        assert sum(len(batch[1]) for batch in task.marglik_loader) == n
        assert (len(task.train_loader.dataset), task.n_batches) == (n, -(-n // 128))
    alone = tasks.build("digit", 0, {"paths": ["conv"], "widths": [2, 2, 2], "copies": 1})
    assert alone.n_batches == -(-1437 // 128)
    assert sum(p.numel() for p in alone.model.parameters()) < 200


def test_scores_of_held_out_data():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[1.0], [-1.0], [2.0]])
    batches = [(x[:1], torch.tensor([0])), (x[1:], torch.tensor([1, 1]))]
    model.train()
    assert held_out.held_out_score(Task(model, [], held_out=batches), "classification") == {
        "accuracy": pytest.approx(2 / 3)
    }
    assert model.training
    targets = x * torch.tensor([[1.0, -1.0]]) + torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    batches = [(x[:1], targets[:1]), (x[1:], targets[1:])]
    score = held_out.held_out_score(Task(model, [], held_out=batches), "regression")
    assert score == {"rmse": pytest.approx(1.0)}  # unequal batches weigh by their data
    with pytest.raises(margeq.errors.DataError, match=r"targets are \(3, 1\)"):
        held_out.held_out_score(Task(model, [], held_out=[(x, x)]), "regression")


# -- the command line ----------------------------------------------------------------------------


def run(factory, out, *more):
    return main(["run", "--factory", str(factory), "--out", str(out), *FLAGS, *more])


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [("data", 3, "index 3"), ("model", 4, "Odd"), ("numbers", 5, "non-finite")],
)
def test_exit_codes_of_what_goes_wrong(capsys, tmp_path, factory, trouble, code, said):
    assert run(factory, tmp_path / "run", "--quiet", "--arguments", f"trouble={trouble}") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert not (tmp_path / "run" / "result.json").exists()


def test_exit_codes_of_configurations_and_checkpoints(capsys, tmp_path, factory):
    out = tmp_path / "run"
    assert run(factory, out, "--task", "other") == 2
    assert run(tmp_path / "none.py", out) == 2
    assert run(factory, out, "--lr", "-1") == 2
    capsys.readouterr()
    with run_lock(out):
        assert run(factory, out, "--quiet") == 6
    assert "in use by process" in capsys.readouterr().err
    assert run(factory, tmp_path / "bugs", "--quiet") == 0
    capsys.readouterr()
    with pytest.raises(ZeroDivisionError):  # not ours: Python shows where, and ends with 1
        run(factory, tmp_path / "new", "--arguments", "trouble=bug")
    with pytest.raises(CheckpointLocked), run_lock(out):
        run(factory, out, "--quiet", "--debug")


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "margeq: interrupted; go on with: margeq resume "),
        (KeyboardInterrupt("saved in X"), 130, "margeq: saved in X; go on with: margeq resume "),
        (SystemExit(143), 143, "margeq: terminated; go on with: margeq resume "),
    ],
)
def test_a_stopped_run_says_how_to_go_on(capsys, tmp_path, factory, monkeypatch, stop, code, said):
    def stopped(*arguments, **options):
        raise stop

    monkeypatch.setattr(execute, "optimize_marglik", stopped)
    assert run(factory, tmp_path / "run", "--quiet") == code
    assert capsys.readouterr().err == f"{said}{tmp_path / 'run'}\n"


@pytest.mark.filterwarnings("always::margeq.errors.DeterminismWarning")
def test_a_run_shows_its_table_and_resuming_shows_it_again(capsys, tmp_path, factory):
    assert run(factory, tmp_path / "run") == 0
    first, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in first
    assert max(map(len, first.replace(str(tmp_path), "").splitlines())) <= 100
    assert "log marginal likelihood per datum: current -" in first
    assert "held-out data, never seen: accuracy 0." in first
    table = first[first.index("Which symmetry") : first.index("written")]
    assert main(["resume", str(tmp_path / "run")]) == 0  # a result can be shown without the task
    again, _ = capsys.readouterr()
    assert table in again
    assert "was finished already" in again
    assert main(["resume", str(tmp_path / "run"), "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "run" / "result.json").read_text())
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    factory.write_text(TINY + "# changed")
    assert main(["resume", str(tmp_path / "run"), "--quiet", "--factory", str(factory)]) == 0
    assert capsys.readouterr().err.startswith("margeq: DeterminismWarning: ")


def test_an_interrupted_run_is_resumed_by_its_directory(capsys, tmp_path, factory, monkeypatch):
    with monkeypatch.context() as patch:

        def stopped(*arguments, **options):
            raise KeyboardInterrupt

        patch.setattr(execute, "optimize_marglik", stopped)
        assert run(factory, tmp_path / "run") == 130
    monkeypatch.setattr(tasks, "_TASKS", {n: tasks._TASKS[n] for n in ("digit", "corner")})
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "task 'tiny' is not built in: name its file again" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run"), "--factory", str(factory), "--quiet"]) == 0
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no run directory"),
        ("{}", "command None"),
        ('{"command": "rm", "config": {}}', "command 'rm'"),
        ('{"command": "run", "config": {"task": "os.system"}}', "cannot point to code"),
        ('{"command": "run", "config": {"tsk": 1}}', "unknown key 'tsk'"),
        ('{"command": "demo", "config": {"seed": "x"}}', "seed = 'x', expected an integer"),
        ('{"command": "demo", "config": {"questions": ["why"]}}', "questions = ['why']"),
    ],
)
def test_only_run_directories_are_resumed(capsys, tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["resume", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_demonstration_is_resumed_with_its_own_configuration(tmp_path, monkeypatch):
    seen = []

    def record(config, directory, listener, resume):
        seen.append((config, directory, resume))
        return {"questions": {}}

    monkeypatch.setattr(demo_face, "run_demo", record)
    config = {"seed": 3, "epochs": 9, "questions": ["corner"], "out": "elsewhere", "quiet": False}
    (tmp_path / "config.json").write_text(json.dumps({"command": "demo", "config": config}))
    assert main(["resume", str(tmp_path), "--quiet"]) == 0
    given = DemoConfig(seed=3, epochs=9, questions=("corner",), out=str(tmp_path), quiet=True)
    assert seen == [(given, tmp_path, True)]


def test_help_and_bad_configurations_do_not_wait_for_torch(tmp_path):
    (tmp_path / "bad.toml").write_text("n_epoch = 3")
    for arguments, code in (
        (["run", "--help"], 0),
        (["resume", "--help"], 0),
        (["run", "--config", str(tmp_path / "bad.toml")], 2),
    ):
        script = f"import sys, margeq.cli as c; code = c.main({arguments!r}); "
        script += f"sys.exit(code != {code} or 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_from_the_shell(tmp_path, factory):
    """Once as users do it: a process of its own, Ctrl-C and all is tested in test_sweep."""
    root = Path(margeq.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "margeq.cli", "run", "--factory", str(factory), *FLAGS, "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (tmp_path / "runs" / f"tiny-{result['id']}" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_in_a_process_of_its_own_costs_nothing_but_time(tmp_path, factory):
    """Interrupted in its third epoch and resumed: bit for bit the result of the other one."""
    factory.write_text(TINY + INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(margeq.__file__).parent.parent)}

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "margeq.cli", *arguments, "--factory", str(factory), "--quiet"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    given = ["run", "--task", "interrupted", *FLAGS]
    stopped = command(*given, "--out", "a", "--arguments", f"folder={tmp_path}")
    assert stopped.returncode == 130, stopped.stderr
    assert "margeq resume a" in stopped.stderr.splitlines()[-1]
    assert not (tmp_path / "a" / "result.json").exists()
    assert command("resume", "a").returncode == 0
    assert command(*given, "--out", "b").returncode == 0
    one, other = (json.loads((tmp_path / d / "result.json").read_text()) for d in "ab")
    for key in ("log_marginal_likelihood", "prior_precision", "held_out"):
        assert one[key] == other[key]
    losses = [result["restarts"][0]["history"]["losses"] for result in (one, other)]
    assert losses[0] == losses[1]


INTERRUPTED = """

class Interrupting(list):
    def __init__(self, batches, folder):
        super().__init__(batches)
        self.folder, self.passes = folder, 0

    def __iter__(self):
        import os, pathlib, signal
        self.passes += 1
        if self.folder and self.passes == 6:
            scar = pathlib.Path(self.folder, "scar")
            if not scar.exists():
                scar.touch()
                os.kill(os.getpid(), signal.SIGINT)
        return super().__iter__()


@register_task("interrupted")
def interrupted(seed, folder=""):
    task = tiny(seed)
    return Task(task.model, Interrupting(task.train_loader, folder), held_out=task.held_out)
"""
