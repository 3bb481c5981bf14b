"""The command line: one clear line for what is wrong, exit codes, plain output."""

from __future__ import annotations

import json
import re

import pytest

from margeq.cli import main

QUICK = ["demo", "--epochs", "6", "--questions", "corner", "--restarts", "symmetric"]
FIGURES = {"corner-evidence.png", "corner-precisions.png", "corner-effective.png"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--epochs", "many"], "many"),
        (["demo", "--epochs", "0"], "--epochs 0"),
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


def test_unwritable_directory_is_a_configuration_error(capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([*QUICK, "--out", str(blocked / "run")]) == 2
    assert str(blocked) in capsys.readouterr().err


def test_help_needs_no_command(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_demo_writes_its_run_and_says_so_in_plain_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r"check +held-out digits, never seen: \d", out)
    assert "CONV only" in out
    written = {path.name for path in tmp_path.iterdir()}
    assert {"result.json", "events.jsonl"} | FIGURES <= written
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
