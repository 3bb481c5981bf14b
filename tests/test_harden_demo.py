"""Trained networks, hardened, saved and read without margeq; and the figures on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.harden_demo import EXPERIMENT, hardened, summary_table, trained
from experiments.records import RESULTS
from margeq.runs.questions import question_task

STORED = [
    json.loads((RESULTS / EXPERIMENT / f"{name}-seed0.json").read_text(encoding="utf-8"))
    for name in ("digit", "corner", "p4")
]


def check(record):
    candidates, selected, plain = record["costs"].values()
    assert record["difference"] <= 1e-5
    assert record["elsewhere"]["program"] <= 1e-5
    assert record["elsewhere"]["state dict"] <= 1e-5
    assert record["elsewhere"]["other weights"] > 1e-2  # the state dict is what counts
    assert plain["macs"] <= selected["macs"] <= candidates["macs"]
    assert selected["active_parameters"] <= candidates["active_parameters"]
    if record["onnx"] is not None:
        assert record["onnx"]["difference"] <= 1e-5


@pytest.mark.filterwarnings("default")  # of torch.onnx
def test_a_short_run_is_read_elsewhere():
    task = question_task("digit", 0, widths=(4, 8), copies=1)
    record = hardened(task, trained("digit", task, seed=0, epochs=1))
    check(record)
    assert record["n_pictures"] == 360


@pytest.mark.parametrize("record", STORED, ids=lambda r: r["network"])
def test_stored_runs(record):
    check(record)
    candidates, selected, plain = record["costs"].values()
    assert record["onnx"] is not None
    assert plain["macs"] == selected["macs"] < candidates["macs"]
    assert plain["accuracy"] == pytest.approx(candidates["accuracy"], abs=0.01)
    if record["network"] == "digit":
        assert set(record["selected"].values()) == {"conv"}
        assert plain["parameters"] == selected["active_parameters"]
        assert plain["macs"] < 0.9 * candidates["macs"]
        assert plain["latency"] < candidates["latency"]


def test_the_page_shows_the_stored_runs():
    page = Path(__file__).parent.parent / "docs" / "relax-and-harden.md"
    assert summary_table(STORED) in page.read_text(encoding="utf-8")
