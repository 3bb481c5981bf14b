"""The paper's experiments: one run, its record, resuming, and the tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import tyro

from experiments import records, runs, tables
from experiments.law import TOLERANCE, deviations, law, published_deviations
from experiments.markdown import mean_sd, table
from experiments.presets import CIFAR10, TOY_PROBLEM
from experiments.published import TABLE_1, TABLE_2, TABLE_4
from experiments.records import Cell
from margeq.data import ImageTask
from margeq.errors import ConfigError, DataError
from margeq.parameters import named_hyperparameters

pytestmark = pytest.mark.usefixtures("torch_as_before")

TINY = replace(
    TOY_PROBLEM["cpu"],
    models=("fc+conv",),
    tasks=("digit",),
    seeds=(0,),
    width=1,
    size=4,
    epochs=3,
    burnin=2,
    frequency=1,
    batch_size=20,
    prior_prec_inits=("function-scale", 1.0),
    hyper_solver="lbfgs",  # exact at once; MacKay creeps when no weight is determined
)


def load(cell, settings, data_dir):
    generator = torch.Generator().manual_seed(cell.seed)
    images = torch.randn(60, 1, 4, 4, generator=generator)
    labels = (images[:, 0, 0, 0] > 0).long()
    return ImageTask(images[:40], labels[:40], images[40:], labels[40:], name=cell.task)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    runs.run_table("toy_problem", {"cpu": TINY}, load, runs.Options(out=folder))
    return folder


def record_of(root, training):
    return records.read_record(
        Cell("toy_problem", "cpu", "digit", "fc+conv", training, 0).path(root)
    )


def test_a_record_says_how_it_came_about(root):
    path = Cell("toy_problem", "cpu", "digit", "fc+conv", "evidence", 0).path(root)
    record = records.read_record(path)
    assert record["seed"] == 0
    assert record["config"]["width"] == 1
    assert set(record["versions"]) == {"margeq", "torch", "python", "revision"}
    assert record["data"]["n_train"] == 40
    assert record["results"]["flavour"]["hessian_root"] == "mc(1)"
    starts = record["results"]["starts"]
    assert [(s["prior_prec_init"], s["start"]) for s in starts] == [
        ("function-scale", "symmetric"),
        ("function-scale", "only:conv"),
        (1.0, "symmetric"),
        (1.0, "only:conv"),
    ]
    kept = record["results"]["log_evidence_per_datum"]
    assert kept == max(start["log_evidence_per_datum"] for start in starts)
    assert path.stat().st_size < 60_000
    assert not list(path.parent.glob("*.partial"))


def test_map_keeps_unit_precisions_and_evidence_moves_them(root):
    def precisions(training):
        return [t["prior_precision"] for t in record_of(root, training)["results"]["tensors"]]

    assert precisions("map") == pytest.approx([1.0] * len(precisions("map")))
    assert precisions("evidence") != pytest.approx([1.0] * len(precisions("map")))


def test_a_run_that_exists_is_skipped(root, capsys):
    def refuse(cell, settings, data_dir):
        raise AssertionError("loaded data for a run that exists")

    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    runs.run_table("toy_problem", {"cpu": TINY}, refuse, runs.Options(out=root))
    assert capsys.readouterr().out.count("done before") == 2
    assert before == {path: path.read_bytes() for path in root.rglob("*.json")}


def test_a_record_of_other_settings_is_not_overwritten(root):
    other = replace(TINY, map_lr=0.5)
    with pytest.raises(ConfigError, match=r"lr: 0\.003 there, 0\.5 asked for"):
        runs.run_table("toy_problem", {"cpu": other}, load, runs.Options(out=root))


def test_a_run_repeats_itself(root):
    cell = Cell("toy_problem", "cpu", "digit", "fc+conv", "evidence", 0)
    again = runs.run_cell(cell, TINY, load(cell, TINY, ""))["results"]
    before = record_of(root, "evidence")["results"]
    assert again["log_evidence_per_datum"] == pytest.approx(before["log_evidence_per_datum"], 1e-6)
    assert again["test"] == pytest.approx(before["test"], 1e-6)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not a readable record"),
        ("{}", "lacks experiment"),
        ("[]", "lacks experiment"),
    ],
)
def test_a_broken_record_is_named(tmp_path, content, fault):
    path = tmp_path / "toy_problem" / "cpu" / "broken.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match=rf"broken\.json.*{fault}"):
        tables.tables("cpu", tmp_path)


def test_a_record_without_test_results_is_named(root, tmp_path):
    record = record_of(root, "map")
    del record["results"]["test"]["nll"]
    path = tmp_path / "half.json"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"half\.json lacks results\.test\.nll"):
        records.read_record(path)


def test_tables_show_ours_beside_the_published(root, tmp_path):
    for seed, accuracy in enumerate((0.8, 0.9)):
        for training in ("map", "evidence"):
            record = {**record_of(root, training), "seed": seed, "experiment": "cifar10"}
            record["results"]["test"]["accuracy"] = accuracy
            cell = Cell("cifar10", "cpu", "cifar10", "fc+conv", training, seed)
            records.write_record(cell.path(tmp_path), record)
    text = tables.tables("cpu", tmp_path)
    assert "85.00 ± 7.07 (2)" in text
    assert "83.32" in text  # table 2, published
    assert "5.9e+06" in text  # table 4, published
    assert "mean over seeds, n = 2." in text
    assert "0 of 0 pairs" in text


def test_toy_tables_name_the_selected_paths(root):
    text = tables.tables("cpu", root)
    assert "| digit | FC+CONV | layer7 | CONV" in text
    assert "24.50" in text  # table 1, published


@pytest.mark.parametrize("preset", ["paper", "gpu30", "cpu"])
def test_tables_without_records_say_so(tmp_path, preset):
    text = tables.tables(preset, tmp_path)
    assert text.count("No runs yet.") == 2
    assert "No FC+CONV runs yet." in text


def test_our_precisions_keep_to_the_law_of_table_4(root):
    found = deviations(record_of(root, "evidence"))
    assert found
    assert max(deviation.gap for deviation in found) < TOLERANCE
    # unit precisions have no reason to
    assert max(deviation.gap for deviation in deviations(record_of(root, "map"))) > 0.1


def test_the_law_tells_determined_tensors_from_flat_ones():
    def tensor(name, gamma, precision, parameters=10, mean_square=0.1):
        return {
            "name": name,
            "effective": gamma,
            "prior_precision": precision,
            "parameters": parameters,
            "mean_square": mean_square,
        }

    rows = [
        tensor("exact", 5.0, 5.0),
        tensor("off by a tenth", 5.0, 5.5),
        tensor("flat", 0.5, 0.7),
        tensor("zero", 0.0, 1.0, mean_square=0.0),
        tensor("bounded", 1.0, 9.0),
    ]
    results = {"tensors": rows, "diagnostics": {"at_bounds": ["bounded"]}}
    text = law([{"training": "evidence", "cell": "run", "results": results}])
    assert "1 of 2 tensors with at least one effective parameter" in text
    assert "worst off by a tenth of run, 1.0e-01" in text
    assert "1 tensors have less" in text
    assert "at most 2.0e-01 (flat of run)" in text
    assert "- 2 tensors have zero weights or a precision at a bound" in text


def test_published_numbers_are_consistent():
    assert len(TABLE_1) == 10
    assert len(TABLE_2) == 11
    assert len(TABLE_4) == 8
    assert max(published_deviations()) < 3e-4
    for row in TABLE_4:
        total = row.fc.normalised + row.conv.normalised
        assert row.fc.relative == pytest.approx(row.fc.normalised / total, rel=0.3, abs=1e-8)
        assert row.fc.relative + row.conv.relative == pytest.approx(1, abs=2e-8)
        assert row.selected == ("fc" if row.fc.relative > 0.5 else "conv")


def test_lengthscale_rows_have_one_lengthscale_per_filter():
    settings = CIFAR10["cpu"]
    task = SimpleNamespace(train_images=torch.zeros(1, 3, 16, 16), n_classes=10)
    per_layer, per_filter = (
        runs.network(Cell("cifar10", "cpu", "cifar10", model, "evidence", 0), settings, task)
        for model in ("s_conv", "s_conv@lengthscales")
    )
    counts = [
        [len(t) for t in named_hyperparameters(model).values()] for model in (per_layer, per_filter)
    ]
    assert counts[0] == [1] * 8
    assert counts[1] == [settings.width * factor for factor in (1, 2, 2, 4, 4, 8, 8, 16)]
    with pytest.raises(ConfigError, match="after @ only 'lengthscales'"):
        runs.network(Cell("cifar10", "cpu", "cifar10", "s_conv@x", "evidence", 0), settings, task)


def test_ranking_counts_pairs_in_the_same_order(root):
    def run(model, evidence, nll):
        results = {"log_evidence_per_datum": evidence, "test": {"nll": nll}}
        return {"training": "evidence", "model": model, "results": results}

    found = tables.ranking([run("conv", -1, 0.5), run("f_fc", -2, 1.0), run("fc", -3, 0.9)])
    assert "by evidence: CONV > F_FC > FC" in found
    assert "by test NLL: CONV > FC > F_FC" in found
    assert "2 of 3 pairs" in found


@pytest.mark.parametrize("presets", [TOY_PROBLEM, CIFAR10])
def test_presets(presets):
    assert set(presets) == {"paper", "gpu30", "cpu"}
    assert presets["paper"].width == 10
    assert presets["paper"].size == 32
    assert presets["paper"].n_train is None


def test_command_line():
    asked = ["--preset", "cpu", "--seeds", "0", "2", "--models", "conv", "--training", "map"]
    options = tyro.cli(runs.Options, args=asked)
    chosen = list(runs.cells("toy_problem", options, TOY_PROBLEM["cpu"]))
    assert [cell.name for cell in chosen] == [
        "digit-conv-map-seed0",
        "digit+quadrant-conv-map-seed0",
        "digit-conv-map-seed2",
        "digit+quadrant-conv-map-seed2",
    ]


def test_markdown():
    assert mean_sd([], 2) == "–"
    assert mean_sd([1.0], 2) == "1.00"
    assert mean_sd([1.0, 3.0], 1) == "2.0 ± 1.4 (2)"
    assert table(["a", "b"], [["x", "10"]]) == "| a   |   b |\n| --- | --: |\n| x   |  10 |"
