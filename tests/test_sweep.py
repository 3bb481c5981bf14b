"""Sweeps: what is planned, what runs once, what is said of what failed, what a signal does."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import margeq
from margeq.cli import main
from margeq.errors import ConfigError
from margeq.runs import children, slurm
from margeq.runs.files import write_json
from margeq.runs.overview import overview
from margeq.runs.plain import plain_config
from margeq.runs.specification import read_specification, words
from tests.run_files import QUICK, TINY

ROOT = Path(margeq.__file__).parent.parent
CHILD = Path(__file__).parent / "sweep_child.py"
SPEC = {"base": {"task": "digit", "arguments": {"value": 1.0}}, "seeds": [0, 1]}


def specification(folder, **changes):
    path = folder / "spec.json"
    path.write_text(json.dumps(SPEC | changes))
    return path


@pytest.fixture
def quickly(monkeypatch):
    """Runs are the processes of tests/sweep_child.py."""
    whole = children.command_of
    monkeypatch.setattr(
        children, "command_of", lambda *given: [sys.executable, str(CHILD), *whole(*given)[3:]]
    )


def calls(out, kind=None):
    path = out / "calls.txt"
    lines = [line.rsplit(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []
    return [name for text, name, _ in lines if kind is None or text == kind]


# -- what is planned -----------------------------------------------------------------------------


def test_every_combination_under_every_seed(tmp_path):
    grid = {"arguments.width": [2, 4], "lr": [0.1, 0.2, 0.3]}
    runs = read_specification(specification(tmp_path, grid=grid), tmp_path / "out")
    assert len(runs) == 2 * 3 * 2
    assert [r.config.seed for r in runs[:4]] == [0, 1, 0, 1]
    assert [words(r.setting) for r in runs[:3:2]] == [
        "arguments.width=2, lr=0.1", "arguments.width=2, lr=0.2",
    ]  # fmt: skip
    assert all(r.config.arguments == {"value": 1.0, "width": w} for r, w in
               zip(runs, [2] * 6 + [4] * 6, strict=True))  # fmt: skip
    assert len({r.id for r in runs}) == 12
    assert all(r.directory == tmp_path / "out" / r.id for r in runs)


def test_tables_and_dotted_keys_are_the_same(tmp_path):
    dotted = read_specification(specification(tmp_path, grid={"arguments.width": [2, 4]}), tmp_path)
    toml = tmp_path / "spec.toml"
    toml.write_text(
        'seeds = [0, 1]\n[base]\ntask = "digit"\n[base.arguments]\nvalue = 1.0\n'
        "[grid.arguments]\nwidth = [2, 4]\n"
    )
    assert [r.id for r in read_specification(toml, tmp_path)] == [r.id for r in dotted]
    assert read_specification(toml, tmp_path)[0].setting == {"arguments.width": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "unknown key 'sedes' (did you mean 'seeds'?)"),
        ({"base": {"tsk": 1}}, "[base]: unknown key 'tsk'"),
        ({"grid": {"lrr": [1]}}, "[grid]: unknown key 'lrr' (did you mean 'lr'?)"),
        ({"grid": {"lr.x": [1]}}, "[grid] lr.x: only arguments have keys of their own"),
        ({"grid": {"lr": {"x": [1]}}}, "[grid] lr.x: only arguments"),
        ({"grid": {"lr": 0.1}}, "[grid] lr = 0.1, expected a list"),
        ({"grid": {"lr": []}}, "[grid] lr = [], expected a list"),
        ({"grid": {"lr": ["x"]}}, "(lr=x): lr = 'x', expected a number"),
        ({"grid": {"seed": [1]}}, "seeds are given once"),
        ({"base": {"task": "digit", "seed": 1}}, "seeds are given once"),
        ({"base": {}}, "[base] has no task"),
        ({"base": {"task": "os.system"}}, "cannot point to code"),
        ({"grid": {"task": ["digit", "train.py:make"]}}, "cannot point to code"),
        ({"base": 3}, "base = 3, expected a table"),
        ({"base": {"task": "digit", "arguments": 3}, "grid": {"arguments.x": [1]}},
         "arguments = 3, expected a table"),
        ({"seeds": 3}, "seeds = 3, expected a list of integers"),
        ({"seeds": []}, "seeds = []"),
        ({"seeds": [-1]}, "seeds = [-1]"),
        ({"seeds": [True]}, "seeds = [True]"),
        ({"seeds": [1, 1]}, "the same run twice, seed 1 of base and seed 1 of base"),
        ({"grid": {"lr": [1, 1.0]}}, "the same run twice, seed 0 of lr=1.0 and seed 0 of lr=1"),
        ({"grid": {"lr": list(range(1, 200)), "lr_hyp": list(range(1, 200))}}, "79202 runs, more"),
    ],
)  # fmt: skip
def test_a_wrong_specification_is_refused(tmp_path, capsys, changes, said):
    path = specification(tmp_path, **changes)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_and_does_nothing(tmp_path, capsys, quickly):
    path, out = specification(tmp_path), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 3
    assert [line.split()[1] for line in listed[1:]] == ["new", "new"]
    assert not out.exists()
    assert main(["sweep", str(path), "--out", str(out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(run["seed"], run["state"]) for run in plan["runs"]] == [(0, "new"), (1, "new")]


@pytest.mark.parametrize("more", [["--help"], ["--dry-run"]])
def test_planning_takes_at_most_half_a_second_and_no_torch(tmp_path, more):
    resource = pytest.importorskip("resource")
    given = ["sweep", str(specification(tmp_path)), *more]
    script = f"import sys, margeq.cli as c; code = c.main({given!r}); "
    script += "sys.exit(code or 'torch' in sys.modules)"

    def cpu_seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) <= 0.5


# -- what runs -----------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_failed_ones_listed(tmp_path, capsys, quickly):
    grid = {"arguments.trouble": ["", "bad", "killed"]}
    path, out = specification(tmp_path, grid=grid, seeds=[0]), tmp_path / "out"
    killed = read_specification(path, out)[2].directory
    killed.mkdir(parents=True)
    (killed / "log.txt").write_text("what an earlier attempt wrote\n")
    assert main(["sweep", str(path), "--out", str(out)]) == 1
    said, err = capsys.readouterr()
    assert err == ""
    assert "1/3  " in said
    assert ": finished" in said
    assert (
        r"arguments.trouble=bad, seed 0: failed (exit code 3): margeq: [red]no[/] \x1b[31m data"
        in said
    )
    assert "seed 0: failed (exit code -9): " in said
    assert "2 of 3 runs failed" in said
    found = json.loads((out / "sweep.json").read_text())
    assert [run["state"] for run in found["runs"]].count("finished") == 1
    codes = {entry["exit_code"]: entry["error"] for entry in found["failed"].values()}
    assert codes == {3: "margeq: [red]no[/] \x1b[31m data", -9: ""}
    first = Counter(calls(out, "begun"))
    assert set(first.values()) == {1}
    assert len(first) == 3

    (out / "repaired").touch()
    assert main(["sweep", str(path), "--out", str(out), "--json"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert sorted(run["state"] for run in again["runs"]) == ["finished", "finished", "new"]
    assert [entry["exit_code"] for entry in again["failed"].values()] == [-9]
    begun = Counter(calls(out, "begun"))
    done = found["runs"][0]["id"]
    assert (begun[done], sorted(begun.values())) == (1, [1, 2, 2])


def test_each_run_has_its_share_of_the_cores(tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for jobs, share in ((1, "8"), (3, "2"), (20, "1")):
        assert children.environment_of(jobs)["OMP_NUM_THREADS"] == share
    path, out = specification(tmp_path), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2", "--quiet"]) == 0
    assert {line.split()[-1] for line in (out / "calls.txt").read_text().splitlines()} == {"4"}
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "0"]) == 2


def test_jobs_is_the_number_of_processes_at_a_time(tmp_path, quickly):
    base = SPEC["base"] | {"arguments": {"sleep": 0.3}}
    runs = read_specification(specification(tmp_path, base=base, seeds=[0, 1, 2, 3]), tmp_path)
    children.Children(2, None, lambda ended: None).run(runs)
    open_ = peak = 0
    for line in (tmp_path / "calls.txt").read_text().splitlines():
        open_ += 1 if line.startswith("begun") else -1
        peak = max(peak, open_)
    assert (peak, open_) == (2, 0)


def test_two_sweeps_at_once_run_nothing_twice(tmp_path, quickly):
    base = SPEC["base"] | {"arguments": {"sleep": 0.15}}
    runs = read_specification(specification(tmp_path, base=base, seeds=list(range(5))), tmp_path)
    reports = [[], []]
    threads = [
        threading.Thread(target=children.Children(2, None, report.append).run, args=(order,))
        for report, order in zip(reports, (runs, runs[::-1]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(calls(tmp_path, "begun")) == Counter(run.id for run in runs)
    for report in reports:  # both end with all of them
        assert {ended.run.id for ended in report} == {run.id for run in runs}
        assert {ended.state for ended in report} <= {"finished", "skipped"}
    states = Counter(ended.state for report in reports for ended in report)
    assert states == {"finished": 5, "skipped": 5}


def test_a_sweep_of_a_real_run(tmp_path, capsys):
    factory = tmp_path / "mine.py"
    factory.write_text(TINY)
    spec, out = specification(tmp_path, base=QUICK, seeds=[0]), tmp_path / "out"
    given = ["sweep", str(spec), "--out", str(out), "--factory", str(factory)]
    assert main(given) == 0
    said, _ = capsys.readouterr()
    assert max(map(len, said[said.index(" setting") : said.index("written")].splitlines())) <= 100
    (run,) = read_specification(spec, out)
    result = json.loads((run.directory / "result.json").read_text())
    assert result["id"] == run.id
    assert result["config"] == plain_config(run.config)
    assert json.loads((run.directory / "config.json").read_text())["factory"]["sha256"]
    assert not (run.directory / "report.html").exists()  # seconds, for each of many runs
    assert main(["resume", str(run.directory), "--quiet"]) == 0
    assert (run.directory / "report.html").exists()


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_and_does_not_end_the_others(tmp_path, capsys):
    """The second sweep ends a run that the first one lost to SIGKILL in its fourth epoch."""
    factory = tmp_path / "mine.py"
    factory.write_text(TINY + KILLED)
    grid = {"arguments.folder": ["", str(tmp_path)]}
    base = QUICK | {"task": "mortal"}
    spec, out = specification(tmp_path, base=base, grid=grid, seeds=[0]), tmp_path / "out"
    given = ["sweep", str(spec), "--out", str(out), "--factory", str(factory), "--jobs", "2"]
    assert main(given) == 1
    assert "failed (exit code -9)" in capsys.readouterr().out
    immortal, mortal = read_specification(spec, out)
    assert (immortal.directory / "result.json").exists()
    assert not (mortal.directory / "result.json").exists()
    assert main(given) == 0
    results = [
        json.loads((run.directory / "result.json").read_text()) for run in (immortal, mortal)
    ]
    assert results[0]["log_marginal_likelihood"] == results[1]["log_marginal_likelihood"]
    assert results[0]["prior_precision"] == results[1]["prior_precision"]


KILLED = """

class Mortal(list):
    def __init__(self, batches, folder):
        super().__init__(batches)
        self.folder, self.passes = folder, 0

    def __iter__(self):
        import os, pathlib, signal
        self.passes += 1
        if self.folder and self.passes == 8:
            scar = pathlib.Path(self.folder, "scar")
            if not scar.exists():
                scar.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


@register_task("mortal")
def mortal(seed, folder=""):
    task = tiny(seed)
    return Task(task.model, Mortal(task.train_loader, folder))
"""


# -- signals -------------------------------------------------------------------------------------

SWEEP = """
import sys
import margeq.runs.children as children
from margeq.cli import main
whole = children.command_of
children.command_of = lambda *given: [sys.executable, {child!r}, *whole(*given)[3:]]
sys.exit(main({given!r}))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_stopped_sweep_stops_its_runs_once_and_can_go_on(tmp_path, number, code, said):
    base = SPEC["base"] | {"arguments": {"sleep": 30}}
    spec, out = specification(tmp_path, base=base, seeds=[0, 1, 2]), tmp_path / "out"
    given = ["sweep", str(spec), "--out", str(out), "--jobs", "2"]
    script = SWEEP.format(child=str(CHILD), given=given)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while len(calls(out, "begun")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does: to all of its processes
    shown, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err == (
        f"margeq: {said}; finished runs are kept, the others are saved; go on by the same command\n"
    )
    assert shown.count(": interrupted") == 2
    assert sorted(calls(out, f"signal {int(number)}")) == sorted(calls(out, "begun"))
    assert calls(out, "signals of the terminal come twice") == []
    assert len(calls(out)) == 4  # the third was never begun


# -- what is read from the directories -----------------------------------------------------------


def test_medians_ranges_and_verdicts_are_those_of_the_directories(tmp_path, capsys, quickly):
    grid = {"arguments.value": [1.0, 2.0]}
    path, out = specification(tmp_path, grid=grid, seeds=[0, 1, 2]), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2"]) == 0
    runs = read_specification(path, out)
    (runs[5].directory / "result.json").unlink()
    found = overview(runs)
    assert [run["state"] for run in found["runs"]] == ["finished"] * 5 + ["begun"]
    one, two = found["settings"]
    assert one["log_marginal_likelihood_per_datum"] == {
        "median": 0.75, "lowest": 0.0, "highest": 1.0,
    }  # fmt: skip
    assert one["verdicts"] == {"layer1": {"CONV": 2, "mixed": 1}}
    assert one["held_out"]["accuracy"]["median"] == pytest.approx(0.6)
    assert one["best"] == {
        "id": runs[0].id, "seed": 0, "start": "free", "log_marginal_likelihood_per_datum": 1.0,
    }  # fmt: skip
    assert (two["finished"], two["runs"]) == (2, 3)
    assert two["log_marginal_likelihood_per_datum"]["median"] == pytest.approx(1.875)
    said = capsys.readouterr().out
    assert re.search(r"0\.750 \[0\.000,", said)
    assert "layer1 CONV 2" in said
    assert "seed 0, free" in said


def test_names_in_a_specification_are_plain_text_on_a_terminal(tmp_path, capsys, quickly):
    base = {"task": "digit", "arguments": {}}
    grid = {"arguments.name": ["[red]x[/]\x1b[31m"]}
    path = specification(tmp_path, base=base, grid=grid, seeds=[0])
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"arguments.name=[red]x[/]\x1b[31m, seed 0: finished" in said
    assert "arguments.name=[red]x" in said[said.index(" setting") :]  # and on in the next line


# -- Slurm ---------------------------------------------------------------------------------------


def test_slurm_needs_submitit(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    path = specification(tmp_path)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--slurm"]) == 2
    assert "pip install 'margeq[slurm]'" in capsys.readouterr().err


@pytest.fixture
def submitit(monkeypatch):
    """A stand-in for submitit: it is not a dependency of the tests, and there is no cluster."""
    module, helpers = ModuleType("submitit"), ModuleType("submitit.helpers")
    module.submitted, module.options = [], []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            module.folder, module.cluster = folder, cluster

        def update_parameters(self, **options):
            if "colour" in options:
                raise NameError("unknown argument colour")
            module.options.append(options)

        def submit(self, function):
            module.submitted.append(pickle.loads(pickle.dumps(function)))
            job = ModuleType("job")
            job.job_id = f"7_{len(module.submitted)}"
            return job

    helpers.DelayedSubmission = lambda function: ("again", function)
    module.AutoExecutor, module.helpers = AutoExecutor, helpers
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    return module


def test_slurm_gets_a_job_for_every_run_that_is_not_finished(
    tmp_path, capsys, monkeypatch, submitit
):
    whole = children.command_of
    monkeypatch.setattr(
        slurm, "command_of", lambda *given: [sys.executable, str(CHILD), *whole(*given)[3:]]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path, out = specification(tmp_path, seeds=[0, 1, 2]), tmp_path / "out"
    runs = read_specification(path, out)
    runs[1].directory.mkdir(parents=True)
    write_json(runs[1].directory / "result.json", {})
    (runs[1].directory / "result.json").write_text("{}")
    monkeypatch.setattr("margeq.terminal.sweep.overview", lambda runs: {"runs": len(runs)})
    given = ["sweep", str(path), "--out", str(out), "--slurm", "--json"]
    assert main([*given, "--slurm-options", "timeout_min=60", "slurm_partition=gpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "runs": 3, "jobs": {runs[0].id: "7_1", runs[2].id: "7_2"},
    }  # fmt: skip
    assert (submitit.folder, submitit.cluster) == (str(out / "slurm"), "slurm")
    assert submitit.options == [{"name": "margeq", "timeout_min": 60, "slurm_partition": "gpu"}]
    submitit.submitted[0]()
    assert (runs[0].directory / "result.json").exists()
    assert main([*given, "--slurm-options", "colour=red"]) == 2
    assert "submitit refuses: unknown argument colour" in capsys.readouterr().err


def test_a_job_saves_before_it_is_preempted_and_is_queued_again(tmp_path, submitit):
    note = tmp_path / "note"
    code = (
        "import signal, sys, time, pathlib\n"
        f"def stop(*a): pathlib.Path({str(note)!r}).write_text('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(30)"
    )
    job = slurm.SlurmRun([sys.executable, "-c", code], tmp_path / "log.txt")
    failures = []

    def call():
        try:
            job()
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "ready" not in (
        (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    ):
        time.sleep(0.02)
    word, again = job.checkpoint()
    assert (word, again) == ("again", job)
    assert note.read_text() == "saved"
    pickle.dumps(again)
    thread.join(20)
    assert failures == [f"exit code 143; see {tmp_path / 'log.txt'}"]


def test_what_cannot_be_prepared_is_a_configuration_error(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(["sweep", str(specification(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        children.prepare(read_specification(specification(tmp_path), tmp_path / "out")[0])
    missing = str(tmp_path / "none.py")
    assert main(["sweep", str(specification(tmp_path)), "--factory", missing]) == 2
