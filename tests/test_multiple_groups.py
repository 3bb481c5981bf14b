"""The experiments on several groups: settings, one run of each, tables and figures."""

from dataclasses import replace

import pytest
import torch

from experiments import mixer_tables, multiple_groups, separable_ablation
from experiments.path_figures import path_figure, save_path_figures
from experiments.presets import MULTIPLE_GROUPS, SEPARABLE
from experiments.published import TABLE_3, TABLE_7
from experiments.records import RESULTS, Cell, read_records, write_record
from experiments.runs import Options
from margeq.data import ImageTask
from margeq.errors import ConfigError
from margeq.training import solvers

pytestmark = pytest.mark.usefixtures("torch_as_before")

TINY = {
    "width": 1,
    "size": 4,
    "seeds": (0,),
    "epochs": 1,
    "burnin": 1,
    "frequency": 1,
    "batch_size": 20,
    "starts": ("symmetric",),
}


def pictures(size, data_dir, *, n_train, n_test, seed, channels=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(60, channels, size, size, generator=generator)
    labels = (images[:, 0, 0, 0] > 0).long()
    return ImageTask(images[:40], labels[:40], images[40:], labels[40:], name="pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    digits, colour = (
        {"cpu": replace(presets["cpu"], **TINY, tasks=(presets["cpu"].tasks[0],))}
        for presets in MULTIPLE_GROUPS
    )
    colour["cpu"] = replace(colour["cpu"], batch_size=5)  # no digits are trained like this
    factored = replace(SEPARABLE["cpu"], **TINY, models=("separable-matched", "cnn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiple_groups, "_TASKS", dict.fromkeys((*TABLE_3, "rotated-cifar10"), pictures)
        )
        patch.setattr(multiple_groups, "MULTIPLE_GROUPS", (digits, colour))
        # the fixed point creeps where no weight is determined, and nothing here depends on it
        patch.setattr(solvers.MacKay, "converge", solvers.MacKay.refresh)
        patch.setattr(separable_ablation, "SEPARABLE", {"cpu": factored})
        multiple_groups.run(Options(out=folder, tasks=("mnist",)))
        separable_ablation.run(Options(out=folder))
    return folder


CORNERS = (("symmetric", -1.0), ("only:conv", -1.5), ("only:gconv", -1.25))


def result(task, training, shares, *, seed=0, starts=CORNERS):
    """A record as the tables read it; ``shares`` is path -> share in each of the layers."""
    rows = [
        {"layer": f"layer{n}", "path": path, "function_share": share, "relative": share / 2}
        for path, by_layer in shares.items()
        for n, share in enumerate(by_layer)
    ]
    return {
        "experiment": "multiple_groups",
        "preset": "cpu",
        "cell": f"{task}-{training}-{seed}",
        "versions": {},
        "threads": 1,
        "seconds": 1.0,
        "task": task,
        "model": "f_fc+conv+gconv",
        "training": training,
        "seed": seed,
        "data": {"n_train": 2000, "n_test": 10},
        "config": {"size": 16, "width": 2, "epochs": 3},
        "results": {
            "test": {"accuracy": 0.9, "nll": 0.25},
            "log_evidence_per_datum": max(value for _, value in starts),
            "settled": True,
            "flavour": {"hessian_root": "exact"},
            "paths": [*rows, {"layer": "head0", "path": ""}],
            "starts": [
                {"start": name, "log_evidence_per_datum": value, "error": ""}
                for name, value in starts
            ],
        },
    }


def mixed(group_share):
    rest = (1 - group_share) / 2
    return {"f_fc": [rest, rest], "conv": [rest, rest], "gconv": [group_share, group_share]}


def test_presets_cover_the_tables():
    names = {"paper", "gpu30", "cpu"}
    assert all(set(presets) == names for presets in (*MULTIPLE_GROUPS, SEPARABLE))
    for preset in names:
        tasks = [task for presets in MULTIPLE_GROUPS for task in presets[preset].tasks]
        assert tasks == list(TABLE_3)
        assert SEPARABLE[preset].models == tuple(TABLE_7)
        assert SEPARABLE[preset].tasks == ("rotated-cifar10",)
        for presets in MULTIPLE_GROUPS:
            assert presets[preset].models == ("f_fc+conv+gconv",)
            assert presets[preset].width == 2
    digits, colour = (presets["paper"] for presets in MULTIPLE_GROUPS)
    assert (digits.epochs, colour.epochs, SEPARABLE["paper"].epochs) == (1000, 4000, 4000)
    assert (digits.augment, colour.augment, SEPARABLE["paper"].augment) == (False, True, True)
    assert digits.reduction == colour.reduction == "mean"


@pytest.mark.parametrize("preset", ["gpu30", "cpu"])
def test_each_convolution_alone_is_a_start(preset):
    for presets in MULTIPLE_GROUPS:
        assert {"symmetric", "only:conv", "only:gconv"} <= set(presets[preset].starts)


@pytest.mark.parametrize("model", TABLE_7)
def test_the_networks_of_table_7_have_the_published_weights(model):
    settings = SEPARABLE["paper"]
    cell = Cell("separable_ablation", "paper", "rotated-cifar10", model, "map", 0)
    task = pictures(settings.size, None, n_train=0, n_test=0, seed=0, channels=3)
    task = replace(task, class_names=tuple("abcdefghij"))
    network = separable_ablation.build(cell, settings, task)
    slip = 10 if model == "dw-separable" else 0
    assert sum(w.numel() for w in network.parameters()) == TABLE_7[model].parameters - slip


def test_matched_widths_are_the_published_ones():
    sizes = {"in_channels": 3, "num_classes": 10, "size": 32}
    before = torch.get_rng_state()
    for kind in ("full", "separable", "dw-separable"):
        width = separable_ablation.matched_width(kind, 10, **sizes)
        assert width == TABLE_7[f"{kind}-matched"].width
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_network_or_data_set_is_named():
    cell = Cell("separable_ablation", "cpu", "rotated-cifar10", "half", "map", 0)
    task = pictures(4, None, n_train=0, n_test=0, seed=0)
    with pytest.raises(ConfigError, match="'half'"):
        separable_ablation.build(cell, SEPARABLE["cpu"], task)
    with pytest.raises(ConfigError, match="svhn"):
        multiple_groups.run(Options(tasks=("svhn",)))


def test_a_mixer_is_trained_both_ways(root):
    by_map, learned = sorted(
        read_records(root, "multiple_groups", "cpu"), key=lambda r: r["training"] != "map"
    )
    assert {row["path"] for row in learned["results"]["paths"]} == {"f_fc", "conv", "gconv", ""}
    for record in (by_map, learned):
        assert [start["start"] for start in record["results"]["starts"]] == ["symmetric"]
    assert {row["prior_precision"] for row in by_map["results"]["tensors"]} == {1.0}


def test_factored_networks_are_trained_with_unit_precisions_only(root):
    found = list(read_records(root, "separable_ablation", "cpu"))
    assert [record["model"] for record in found] == ["cnn", "separable-matched"]
    assert {record["training"] for record in found} == {"map"}


def test_tables_of_these_runs(root):
    text = mixer_tables.tables("cpu", root)
    assert "| mnist " in text
    assert "75 (1–100)" in text  # table 3, published
    assert "59.99" in text  # table 7, published
    assert "carries" not in text  # one data set has nothing to compare with
    assert mixer_tables.tables("paper", root).count("No runs yet.") == 2


def test_shares_are_means_over_seeds_then_layers():
    first = result("mnist", "evidence", {"conv": [0.0, 0.5], "gconv": [1.0, 0.5]})
    second = result("mnist", "evidence", {"conv": [0.2, 0.9], "gconv": [0.8, 0.1]}, seed=1)
    found = mixer_tables.layer_shares([first, second], "function_share")
    assert found["gconv"] == pytest.approx([0.9, 0.3])
    assert "| 60 (30–90) |" in mixer_tables.shares_table([first, second])
    assert "| 30 (15–45) |" in mixer_tables.table_3([first, second])


@pytest.mark.parametrize(("upright", "word"), [(0.3, "more"), (0.8, "not more")])
def test_the_answer_is_read_off_the_shares(upright, word):
    runs = [
        result("mnist", "evidence", mixed(upright)),
        result("rotated-mnist", "evidence", mixed(0.5)),
        result("rotated-mnist", "evidence", mixed(0.7), seed=1),
        result("mnist", "map", mixed(1.0)),
    ]
    text = mixer_tables.answer(runs)
    assert f"GCONV carries {word} of the function on rotated-mnist" in text
    assert f"50.0, 70.0 % against {100 * upright:.1f} %" in text
    assert "GCONV alone has +0.250, +0.250 nats per datum more" in text
    assert "on rotated-mnist, and +0.250 on mnist" in text


def test_the_kept_start_has_the_highest_evidence():
    starts = (("symmetric", -1.5), ("only:conv", -1.25), ("only:gconv", -2.0))
    run = result("rotated-mnist", "evidence", mixed(0.5), starts=starts)
    run["results"]["starts"][2]["error"] = "CurvatureError: lost"
    line = mixer_tables.starts_table([run]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["rotated-mnist", "0", "-1.500", "-1.250", "–", "only:conv"]


def test_figures_show_every_cell(tmp_path):
    for training in ("map", "evidence"):
        run = result("mnist", training, mixed(0.5))
        write_record(tmp_path / "multiple_groups" / "cpu" / f"{run['cell']}.json", run)
    written = save_path_figures(tmp_path, "cpu")
    assert [path.name for path in written] == ["mnist.png"]
    assert 5_000 < written[0].stat().st_size < 150_000
    figure = path_figure([result("mnist", "evidence", mixed(0.4))], "one")
    bars = figure.axes[0].containers
    assert [container.get_label() for container in bars] == ["F_FC", "CONV", "GCONV"]
    tops = [bar.get_y() + bar.get_height() for bar in bars[-1]]
    assert tops == pytest.approx([1.0, 1.0])


def test_committed_records_make_tables():
    if not (RESULTS / "multiple_groups" / "cpu").exists():
        pytest.skip("no records of multiple_groups here")
    text = mixer_tables.tables("cpu", RESULTS)
    assert "on rotated-mnist than on mnist" in text
