"""Faces: names of others are text on a terminal, whatever they are made of."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from margeq.callbacks import Event, RichProgress
from margeq.cli import main
from margeq.effective_dim import EffectiveDimension, PathRow
from margeq.errors import MargeqError
from margeq.printable import printable
from margeq.report.table import symmetry_table
from margeq.terminal import run as run_face
from margeq.terminal.answer import show_answer
from margeq.terminal.progress import Progress

EVIL = "[red]x[/]\x1b[31m\x07\r\u202eabc"
SHOWN = r"[red]x[/]\x1b[31m\x07\r\u202eabc"


def written(terminal=False):
    out = io.StringIO()
    return out, Console(file=out, width=300, force_terminal=terminal, highlight=False)


def test_what_would_act_appears_as_an_escape():
    assert printable(EVIL) == SHOWN
    assert printable("δ≥0 层 <script> ☃") == "δ≥0 层 <script> ☃"
    assert printable("a\nb\u2028c\udc80\x9b") == r"a\nb\u2028c\udc80\x9b"


def row(path=EVIL, verdict="mixed", share=0.5):
    return PathRow(EVIL, path, 1, 1.0, 1.0, 1.0, 1.0, share, 1.0, verdict)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_escapes_layers_paths_and_title(terminal):
    out, console = written(terminal)
    console.print(symmetry_table(EffectiveDimension((row(),), ()), EVIL))
    said = out.getvalue()
    assert said.count(SHOWN) == 2  # title and layer
    assert printable(EVIL.upper()) in said
    assert "\x07" not in said
    assert "\u202e" not in said
    assert terminal or "\x1b" not in said


def answer(rows):
    return {
        "effective_dimension": {
            "paths": [asdict(r) for r in rows],
            "selected": {EVIL: "a"},
            "subset_lines": [f"{EVIL}: all rotations"],
        },
        "n_data": 10,
        "message": "the evidence has settled",
        "restarts": [
            {"start": f"only:{EVIL}", "log_marginal_likelihood": -5.0, "kept": True},
            {"start": "free", "log_marginal_likelihood": None, "kept": False},
        ],
        "diagnostics": {
            "slope": None, "captured_trace": None, "clamped_eigenvalues": 2, "at_bounds": ["a"],
        },
    }  # fmt: skip


def test_verdicts_gates_and_starts_are_text_too():
    out, console = written()
    frozen = replace(row("frozen", "frozen"), prior_precision=None)
    show_answer(console, answer([row("a", share=0.6), row("b", share=0.4), frozen]), "t", [EVIL])
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "\x1b" not in out.getvalue()
    assert f"verdict      {SHOWN}: mixed (A 60%, B 40%, FROZEN 50%)" in lines
    assert f"gates        {SHOWN}: all rotations" in lines
    tries = f"only:{SHOWN} -0.500 ← kept   free failed"
    assert f"evidence     log marginal likelihood per datum: {tries}" in lines
    assert "diagnostics  the evidence has settled (slope unknown)" in lines
    bounds = "clamped eigenvalues 2 · precisions at bounds 1 · trace captured unknown"
    assert f"             {bounds}" in lines
    assert f"check        {SHOWN}" in lines


def test_a_selected_path_is_the_verdict():
    out, console = written()
    show_answer(console, answer([row("a", "off", 0.0), row("b", "selected", 1.0)]), "t")
    assert f"verdict      {SHOWN}: B\n" in out.getvalue()
    assert "check" not in out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_names_as_text(terminal):
    out, console = written(terminal)
    with ExitStack() as stack:
        follow = Progress(console, stack).of(EVIL)
        follow(Event("start", {"start": "free", "n_epochs": 1, "epoch": 0}))
        follow(Event("epoch", {"epoch": 1, "loss": 0.25}))
        follow(Event("update", {"log_marginal_likelihood": -7.0}))
        follow(Event("end", {}))
    assert f"{SHOWN} free" in out.getvalue()
    assert "\x07" not in out.getvalue()
    if not terminal:
        assert out.getvalue() == f"{SHOWN} free: done, log marginal likelihood -7\n"


def test_a_bar_by_itself_escapes_too():
    out, console = written(terminal=True)
    with RichProgress(console) as bar:
        bar(Event("start", {"start": EVIL, "n_epochs": 1}))
    assert SHOWN in out.getvalue()


def test_errors_are_one_line_of_text(tmp_path, capsys, monkeypatch):
    def fail(flags):
        raise MargeqError(f"layer {EVIL}\nis bad")

    monkeypatch.setattr(run_face, "show_run", fail)
    assert main(["run"]) == 1
    assert capsys.readouterr().err == rf"margeq: layer {SHOWN}\nis bad" + "\n"
    monkeypatch.undo()
    (tmp_path / "config.json").write_text(json.dumps({"command": EVIL, "config": {}}))
    assert main(["resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert err.count("\n") == 1
    assert main(["run", "--task", f"a\x1b[31m{EVIL}"]) == 2
    assert r"\x1b[31m" in capsys.readouterr().err
