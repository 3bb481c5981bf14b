"""Experiments on partial equivariance: presets, runs, records, tables, figures."""

from dataclasses import replace

import pytest
import torch
import tyro

from experiments import partial_benchmarks, partial_figures, partial_tables, partial_toy
from experiments import partial_training as runs
from experiments.partial_networks import build_partial
from experiments.partial_presets import PARTIAL_BENCHMARKS, PARTIAL_TOY
from experiments.partial_tables import switches_at
from experiments.partial_training import PartialOptions, partial_cells, resolved, run_partial
from experiments.presets import PresetName
from experiments.records import Cell, read_records
from margeq.data import ImageTask, load_digits
from margeq.errors import ConfigError
from margeq.layers import MonotoneGates
from margeq.models import AugmentedInputs, partial_cnn
from margeq.subsets import named_gates

pytestmark = pytest.mark.usefixtures("torch_as_before")

PRESETS: tuple[PresetName, ...] = ("paper", "gpu30", "cpu")

TINY = replace(
    PARTIAL_TOY["cpu"],
    questions=(("digits", ("t2", "full-p4", "partial-p4+monotone", "augmented-p4")),),
    seeds=(0,),
    size=8,
    widths=(2, 2, 2),
    kernel_size=3,
    epochs=2,
    burnin=1,
    frequency=1,
    batch_size=10,
    starts=("current", "current@whole"),
    n_copies=2,
)


def digits(name="digits"):
    images, labels = (values[:60] for values in load_digits())
    names = tuple(map(str, range(10)))
    images = images[:, None]
    task = ImageTask(images[:40], labels[:40], images[40:], labels[40:], name, names)
    return task.with_validation(10)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_partial", lambda name, settings, seed, data_dir: digits(name))
        angles = [[float(a), float(abs(a) < 80)] for a in range(-180, 181, 30)]
        run_partial("partial_toy", TINY, PartialOptions(out=folder), lambda *_: {"upright": angles})
    return folder


def test_every_cell_leaves_a_record(root):
    found = {(r["model"], r["training"]): r for r in read_records(root, "partial_toy", "cpu")}
    assert len(found) == 4 * 2
    for (model, training), record in found.items():
        results = record["results"]
        assert record["data"]["n_validation"] == 10
        assert {"test", "validation", "train"} <= results.keys()
        assert bool(results["subsets"]) == model.startswith("partial")
        assert bool(results["widths"]) == model.startswith("augmented")
        assert ("log_evidence_per_datum" in results) == (training == "evidence")
    gated = found["partial-p4+monotone", "evidence"]["results"]
    assert {row["start"] for row in gated["starts"]} == {"current", "current@whole"}
    assert [*gated["gates"]["current"]] == [f"network.gate{n}.raw_width" for n in (1, 2, 3)]
    assert all(len(values) == 2 for values in gated["gates"]["current"].values())


@pytest.mark.parametrize("training", ["loss", "evidence"])
def test_gates_and_widths_move_with_both_trainings(root, training):
    found = {r["model"]: r for r in read_records(root, "partial_toy", "cpu")
             if r["training"] == training}  # fmt: skip
    subsets = found["partial-p4+monotone"]["results"]["subsets"].values()
    assert any(abs(left["degrees"] / 180 - TINY.start) > 1e-4 for left in subsets)
    (width,) = found["augmented-p4"]["results"]["widths"].values()
    assert abs(width - torch.pi / 4) > 1e-4


def test_tables_and_figures(root):
    text = partial_tables.partial_tables("cpu", root)
    assert "partial-p4+monotone" in text
    assert "| 50.0" not in text  # not a question of the paper
    assert "kept" in text
    written = partial_figures.save_partial_figures(root, "cpu")
    assert [path.name for path in written] == ["digits-curve.png", "digits-subsets.png"]
    assert all(path.stat().st_size > 5000 for path in written)


def test_where_a_curve_switches():
    curve = [(-180.0, 0.1), (-90.0, 0.4), (-60.0, 0.6), (0.0, 1.0), (100.0, 0.5), (110.0, 0.3)]
    left, right = switches_at(curve)
    assert (left, right) == (pytest.approx(75.0), pytest.approx(100.0))
    assert switches_at([(0.0, 0.9), (180.0, 0.8), (-180.0, 0.8)]) == (180.0, 180.0)


@pytest.mark.parametrize("presets", [PARTIAL_TOY, PARTIAL_BENCHMARKS])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_network_of_a_preset_can_be_built(presets, preset):
    settings = replace(presets[preset], widths=(2, 2, 2), mc_width=2, mc_hidden=2, n_copies=2)
    task = digits()
    for _, models in settings.questions:
        for model in models:
            assert build_partial(model, settings, task, "loss") is not None
    with pytest.raises(ConfigError, match="'half-p4' is unknown"):
        build_partial("half-p4", settings, task, "loss")
    with pytest.raises(ConfigError, match="only 'monotone'"):
        build_partial("partial-p4+more", settings, task, "loss")


def test_networks_are_what_their_names_say():
    task, settings = digits(), PARTIAL_TOY["cpu"]
    built = {
        name: build_partial(name, settings, task, "evidence")
        for name in ("t2", "full-p4", "partial-p4", "partial-p4+monotone", "augmented-p4")
    }
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in built.items()}
    assert sizes["t2"] == pytest.approx(sizes["full-p4"], rel=0.25)
    assert [len(named_gates(m)) for m in built.values()] == [0, 0, 3, 3, 0]
    assert isinstance(built["partial-p4+monotone"], MonotoneGates)
    assert built["partial-p4+monotone"].strength == settings.monotone * len(task.train_images)
    assert isinstance(built["augmented-p4"], AugmentedInputs)


def test_records_of_grids_do_not_depend_on_settings_of_samples():
    cell = Cell("partial_toy", "cpu", "mnist6-half", "full-p4", "loss", 0)
    on_samples = replace(cell, model="mc-full-se2-8")
    assert "mc_width" not in resolved(cell, TINY)
    assert "mc_width" in resolved(on_samples, TINY)


def test_networks_on_samples_are_trained_by_the_loss_alone():
    cells = list(partial_cells("partial_toy", PARTIAL_TOY["cpu"], PartialOptions()))
    trained = {(cell.model, cell.training) for cell in cells}
    assert ("partial-p4", "evidence") in trained
    assert {training for model, training in trained if model.startswith("mc-")} == {"loss"}


@pytest.mark.parametrize("script", [partial_toy, partial_benchmarks])
def test_command_line(script):
    options = tyro.cli(PartialOptions, args=["--preset", "cpu", "--models", "full-p4", "t2"])
    assert options.models == ("full-p4", "t2")
    assert callable(script.main)


def test_partial_cnn_refuses_other_depths():
    with pytest.raises(ConfigError, match="give 3 numbers"):
        partial_cnn(2, widths=(2, 2))
