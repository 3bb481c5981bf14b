"""Comparisons by evidence: ranking, differences, refusals, and names as text."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import margeq
from margeq.cli import main
from margeq.errors import ConfigError, FlavourMismatchError
from margeq.runs import tasks
from tests.run_files import FLAGS, TINY

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

EVIL = "[red]x\x1b[31m"


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Tasks that a test registers are gone after it."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


def data(seed=0, n=30):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def fit(width=2, batch=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    given = {"n_epochs": 4, "n_epochs_burnin": 1, "marglik_frequency": 1, "seed": 0, **options}
    return margeq.optimize_marglik(model, [batch or data()], progress="none", **given)


@pytest.fixture(scope="module")
def results():
    return {"small": fit(2), "large": fit(9), "middle": fit(5)}


def stored(folder, result, **changes):
    """A directory as ``margeq run`` leaves it."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result.to_dict(), **changes}))
    return folder


def test_best_first_with_differences_in_nats(results):
    found = margeq.compare(results)
    values = {name: r.log_marginal_likelihood for name, r in results.items()}
    order = sorted(values, key=values.__getitem__, reverse=True)
    assert [entry.name for entry in found.ranking] == order
    assert found.best.name == order[0]
    assert found.best.difference == 0.0
    for entry in found.ranking:
        assert entry.log_marginal_likelihood == values[entry.name]
        gap = results[entry.name].log_bayes_factor(results[order[0]])
        assert entry.difference == pytest.approx(gap, abs=1e-12)
        assert entry.difference <= 0.0
        assert entry.difference_per_datum == pytest.approx(gap / 30, abs=1e-14)
    assert found.n_data == 30


def test_effective_parameters_and_parameters(results):
    for entry in margeq.compare(results).ranking:
        result = results[entry.name]
        assert entry.parameters == sum(p.numel() for p in result.model.parameters())
        total = sum(row.effective for row in result.effective_dimension().tensors)
        assert entry.effective == pytest.approx(total)
        assert entry.start == "current"


def test_frozen_weights_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2))
    found = margeq.optimize_marglik(
        model, [data()], n_epochs=2, n_epochs_burnin=1, marglik_frequency=1, seed=0, progress="none"
    )
    assert margeq.compare([found]).best.parameters == 8


def test_held_out_scores(results, tmp_path):
    found = margeq.compare(results, held_out={"small": {"accuracy": 0.75}})
    scores = {entry.name: dict(entry.held_out) for entry in found.ranking}
    assert scores == {"small": {"accuracy": 0.75}, "large": {}, "middle": {}}
    assert str(found).splitlines()[0].endswith("accuracy")
    assert "0.75" in str(found)
    assert "accuracy" not in str(margeq.compare(results))
    with pytest.raises(ConfigError, match="huge"):
        margeq.compare(results, held_out={"huge": {"accuracy": 1.0}})
    run = stored(tmp_path / "run", results["small"], held_out={"rmse": 2.5})
    assert margeq.compare([run]).best.held_out == {"rmse": 2.5}
    assert margeq.compare({"a": run}, {"a": {"rmse": 1.0}}).best.held_out == {"rmse": 1.0}


def test_directories_and_results_are_the_same(results, tmp_path):
    places = {name: stored(tmp_path / name, result) for name, result in results.items()}
    assert margeq.compare(places).to_dict() == margeq.compare(results).to_dict()
    named = margeq.compare([str(place) for place in places.values()])
    assert named.to_dict() == margeq.compare(results).to_dict()
    results["small"].report(tmp_path / "report")
    mixed = margeq.compare([results["large"], tmp_path / "report"])
    assert {entry.name for entry in mixed.ranking} == {"#1", "report"}


def test_directories_of_one_name_are_told_apart(results, tmp_path):
    places = [stored(tmp_path / part / "run", results["small"]) for part in "ab"]
    found = margeq.compare(places)
    assert {entry.name for entry in found.ranking} == {str(place) for place in places}
    with pytest.raises(ConfigError, match="given twice"):
        margeq.compare([places[0], places[0]])


def test_plain_data(results):
    found = margeq.compare(results)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [entry["name"] for entry in plain["ranking"]] == [e.name for e in found.ranking]
    assert plain["checksum"] == str(results["small"].spectrum.checksum)
    assert plain["flavour"]["curvature"] == "kfac"
    assert plain["n_data"] == 30


def test_the_table(results):
    found = margeq.compare(results)
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "evidence", "difference", "per", "datum", "effective", "parameters",
    ]  # fmt: skip
    assert set(lines[1]) == {"-"}
    assert len({len(line) for line in lines[:5]}) == 1
    assert [line.split()[0] for line in lines[2:5]] == [entry.name for entry in found.ranking]
    assert lines[5] == f"30 data; differences to {found.best.name} in nats"


def test_what_has_not_settled_is_named(results):
    settled = copy.copy(results["small"])
    object.__setattr__(settled, "success", True)
    moving = copy.copy(results["large"])
    object.__setattr__(moving, "success", False)
    notes = margeq.compare({"a": settled, "b": moving}).notes
    assert notes[1:] == ["no success, see result.message; may change: b"]
    assert len(margeq.compare({"a": settled}).notes) == 1


# --- refusals


def test_other_data_are_refused(results):
    x, y = data()
    with pytest.raises(ConfigError, match="small is about 30 data and new about 20"):
        margeq.compare({"small": results["small"], "new": fit(batch=data(0, 20))})
    for batch in ((x, 1 - y), (x + 1e-3, y)):
        with pytest.raises(ConfigError, match="small and new are about other inputs or targets"):
            margeq.compare({"small": results["small"], "new": fit(batch=batch)})
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    margeq.compare({"small": results["small"], "new": fit(batch=(x[order], y[order]))})


def test_other_flavours_are_refused(results):
    others = {"a": results["small"], "b": results["large"], "diag": fit(curvature="diag",
              hessian_root="exact")}  # fmt: skip
    with pytest.raises(FlavourMismatchError) as caught:
        margeq.compare(others)
    said = str(caught.value)
    assert "evidence of a and diag cannot be compared" in said
    assert "curvature: 'kfac' against 'diag'" in said
    assert "hessian_root: 'adaptive(0.999)' against 'exact'" in said
    assert "likelihood" not in said


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "nothing to compare"),
        ([], "nothing to compare"),
        ("runs/a", "results is a str"),
        (3, "results is a int"),
        ({"a": 3}, "a is a int"),
        (["/nowhere/at/all"], "is no run directory"),
    ],
)
def test_what_is_no_result_is_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        margeq.compare(given)


@pytest.mark.parametrize(
    "damage",
    [
        {"log_marginal_likelihood": None},
        {"log_marginal_likelihood": float("nan")},
        {"log_marginal_likelihood": float("inf")},
        {"n_data": "many"},
        {"restarts": []},
        {"flavour": None},
        {"effective_dimension": {}},
        {"held_out": [1]},
    ],
)
def test_what_is_damaged_is_refused(results, tmp_path, damage):
    place = stored(tmp_path / "run", results["small"], **damage)
    with pytest.raises(ConfigError, match="run holds no result that can be compared"):
        margeq.compare([place])


def test_results_without_a_checksum_and_demonstrations(results, tmp_path):
    plain = results["small"].to_dict()
    del plain["checksum"]
    (tmp_path / "result.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="does not say which data"):
        margeq.compare([tmp_path])
    (tmp_path / "result.json").write_text(json.dumps({"questions": {"digit": plain}}))
    with pytest.raises(ConfigError, match="is a demonstration"):
        margeq.compare([tmp_path])


# --- the command


def test_the_command(tmp_path, capsys):
    factory = tmp_path / "tiny.py"
    factory.write_text(TINY)
    places = [str(tmp_path / f"width-{width}") for width in (2, 6)]
    for width, place in zip((2, 6), places, strict=True):
        arguments = ["--arguments", f"width={width}", "--no-report", "--quiet", "--out", place]
        assert main(["run", "--factory", str(factory), *FLAGS, *arguments]) == 0
    capsys.readouterr()
    assert main(["compare", *places, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == margeq.compare(places).to_dict()
    assert all(0.0 <= entry["held_out"]["accuracy"] <= 1.0 for entry in found["ranking"])
    assert main(["compare", *places]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("width-")]
    assert [row[0] for row in rows] == [entry["name"] for entry in found["ranking"]]
    assert rows[0][2] == "0.00"
    assert math.isclose(float(rows[1][2]), found["ranking"][1]["difference"], abs_tol=0.006)
    assert "24 data; differences to width-" in out
    assert main(["compare", *places, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_names_are_text_on_a_terminal(results, tmp_path, capsys):
    places = [stored(tmp_path / name, results["small"]) for name in (EVIL, "other")]
    assert main(["compare", *map(str, places)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"[red]x\x1b[31m" in out
    assert r"\x1b" in str(margeq.compare(places))


def test_exit_codes(results, tmp_path, capsys):
    good = stored(tmp_path / "good", results["small"])
    assert main(["compare", str(good)]) == 2
    assert "two run directories" in capsys.readouterr().err
    assert main(["compare", str(good), str(tmp_path / "none")]) == 2
    assert "is no run directory" in capsys.readouterr().err
    flavour = {**results["small"].to_dict()["flavour"], "curvature": "ekfac"}
    other = stored(tmp_path / "other", results["small"], flavour=flavour)
    assert main(["compare", str(good), str(other)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "good and other" in err


def test_comparing_directories_does_not_wait_for_torch(results, tmp_path):
    places = [str(stored(tmp_path / name, results["small"])) for name in "ab"]
    code = (
        "import sys; from margeq.cli import main; "
        f"code = main(['compare', *{places}, '--quiet']); sys.exit(code + ('torch' in sys.modules))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
