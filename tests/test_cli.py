"""The command line: one clear line for what is wrong, exit codes, plain output."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from margeq import __version__
from margeq.callbacks import Event, JsonlCallback, to_json
from margeq.cli import main
from margeq.errors import DistributedMismatchError
from margeq.terminal import demo as demo_face

QUICK = ["demo", "--epochs", "6", "--questions", "corner", "--restarts", "symmetric"]
FIGURES = {"corner-evidence.png", "corner-precisions-1.svg", "corner-effective.png"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--epochs", "many"], "many"),
        (["demo", "--epochs", "0"], "--epochs 0"),
        (["demo", "--threads", "0"], "--threads 0"),
        (["demo", "--restarts", "sideways"], "sideways"),
        (["demo", "--restarts", "auto,free"], "auto,free"),
        (["demo", "--questions", "when"], "when"),
        (["demo", "--colour"], "--colour"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_arguments_end_with_one_clear_line_and_code_2(capsys, arguments, named):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("margeq: ")
    assert err.count("\n") == 1
    assert named in err


def test_what_the_parser_says_is_short_and_said_once(capsys):
    assert main(["demo", "--epochs", "x"]) == 2
    assert main(["demo", "--colour"]) == 2
    assert capsys.readouterr().err == (
        "margeq: Error parsing --epochs: invalid literal for int() with base 10: 'x'\n"
        "margeq: Unrecognized options: --colour\n"
    )


@pytest.mark.parametrize(
    "name", ["events.jsonl", "result.json", "corner-evidence.png", "report.html"]
)
def test_a_directory_in_the_place_of_a_file_is_a_configuration_error(capsys, tmp_path, name):
    (tmp_path / name).mkdir()
    assert main([*QUICK, "--quiet", "--out", str(tmp_path)]) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"margeq: cannot write to {tmp_path / name}: ")
    assert err.count("\n") == 1


def test_unwritable_directory_is_a_configuration_error(capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([*QUICK, "--out", str(blocked / "run")]) == 2
    assert str(blocked) in capsys.readouterr().err


def python(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, check=False, **kwargs
    )


@pytest.mark.parametrize("arguments", [["--help"], [*QUICK, "--out"]])
def test_a_reader_that_went_away_ends_the_command_quietly(tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)
    given = [*arguments, str(tmp_path)] if arguments[-1] == "--out" else arguments
    try:
        done = python("-m", "margeq.cli", *given, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_report_of_a_wrong_directory_does_not_wait_for_torch(tmp_path):
    code = (
        "import sys, margeq.cli as c; code = c.main(['report', sys.argv[1]]); "
        "sys.exit(code + 100 * ('torch' in sys.modules))"
    )
    done = python("-c", code, str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "is no run directory" in done.stderr


def test_a_command_that_is_none_is_told_the_commands(capsys):
    assert main(["rnu", "--task", "digit"]) == 2
    told = (
        "margeq: there is no command 'rnu'; there are demo, run, resume, sweep, report, compare\n"
    )
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_do_not_wait_for_torch(flag):
    code = f"import sys, margeq.cli as c; c.main(['{flag}']); sys.exit('torch' in sys.modules)"
    done = python("-c", code, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert flag != "--version" or done.stdout == f"margeq {__version__}\n"


def test_an_error_without_a_code_of_its_own_is_code_1(capsys, monkeypatch):
    def fail(config):
        raise DistributedMismatchError("ranks differ")

    monkeypatch.setattr(demo_face, "show_demo", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "margeq: ranks differ\n"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    values = [math.nan, -math.inf, 1.5, torch.tensor(math.inf), torch.tensor(2.0), True, None]
    assert json.loads(to_json({"v": values})) == {"v": [None, None, 1.5, None, 2.0, True, None]}
    JsonlCallback(tmp_path / "log")(Event("end", {"log_marginal_likelihood": -math.inf}))
    line = json.loads((tmp_path / "log").read_text())
    assert line == {"event": "end", "log_marginal_likelihood": None}


def test_help_needs_no_command(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_demo_writes_its_run_and_says_so_in_plain_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert re.search(r"check +held-out digits, never seen: \d", out)
    assert "CONV only" in out
    written = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "result.json", "events.jsonl"} | FIGURES <= written
    assert out.splitlines()[-1].startswith(f"written {tmp_path}/report.html, result.json, ")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {"start", "epoch", "update", "end", "result"} <= {event["event"] for event in events}
    corner = json.loads((tmp_path / "result.json").read_text())["questions"]["corner"]
    assert corner["flavour"]["hessian_root"] == "adaptive(0.999)"


def test_json_prints_the_result_and_nothing_else(capsys, tmp_path):
    assert main([*QUICK, "--json", "--out", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "result.json").read_text())


def test_quiet_prints_nothing(capsys, tmp_path):
    assert main([*QUICK, "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")
