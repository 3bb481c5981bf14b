"""Experiments with networks on groups: presets, runs, records, tables, figures, redundancy."""

from dataclasses import replace

import pytest
import torch
import tyro
from matplotlib import image as pictures
from torch.nn import functional

from experiments import cifar_groups, group_figures, group_tables, plain_training, rotmnist
from experiments.group_presets import CIFAR_GROUPS, ROTMNIST
from experiments.group_tables import margins, order
from experiments.plain_training import PlainOptions, cells, run_plain
from experiments.published import CIFAR_TABLE, ROTMNIST_OTHERS, ROTMNIST_TABLE
from experiments.records import RESULTS, Cell, read_record, read_records
from experiments.redundancy import BINS, first_component_ratios, redundancy
from margeq.data import ImageTask, load_digits
from margeq.errors import ConfigError
from margeq.groups import P4
from margeq.layers import GroupConv2d
from margeq.models import rotmnist_cnn

pytestmark = pytest.mark.usefixtures("torch_as_before")

TINY = replace(
    ROTMNIST["cpu"],
    models=("z2-w2", "p4-w10", "gc-p4-w2"),
    tasks=("rotmnist-20",),
    seeds=(0, 1),
    curve_tasks=("rotmnist-10", "rotmnist-20+"),
    curve_models=("p4-w1",),
    n_test=20,
    epochs=1,
    batch_size=10,
)


def digits(cell, settings, data_dir):
    """Small digits, enlarged, so that nothing has to be found or downloaded."""
    images, labels = (values[:40] for values in load_digits())
    large = functional.interpolate(images[:, None], size=(28, 28), mode="bilinear")
    names = tuple(map(str, range(10)))
    whole = ImageTask(large[:20], labels[:20], large[20:], labels[20:], cell.task, names)
    return rotmnist.pooled(
        whole, rotmnist.n_pictures(cell.task), settings.n_test, cell.seed
    ).standardised()


DIGITS = replace(rotmnist.EXPERIMENT, presets={"cpu": TINY}, load=digits)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run_plain(DIGITS, PlainOptions(out=folder))
    return folder


def test_a_run_leaves_a_record_for_every_cell_of_table_and_curves(root):
    found = list(read_records(root, "rotmnist", "cpu"))
    assert len(found) == 2 * 3 + 2 * 3 + 1
    by_model = {r["model"]: r for r in found if r["task"] == "rotmnist-20" and r["seed"] == 0}
    assert by_model["p4-w10"]["data"]["n_train"] == 20
    assert by_model["p4-w10"]["config"]["epochs"] == 1
    rows = by_model["p4-w10"]["results"]["first_component"]
    layers = [f"conv{number}" for number in range(2, 8)]
    assert [row["layer"] for row in rows["before"]] == layers
    assert all(sum(row["histogram"]) == 100 for row in rows["before"] + rows["after"])
    assert rows["before"] != rows["after"]
    # lifting and separable layers have no filters over the group
    assert "first_component" not in by_model["z2-w2"]["results"]
    assert "first_component" not in by_model["gc-p4-w2"]["results"]


def test_a_run_that_exists_is_skipped_and_other_settings_are_refused(root, capsys):
    run_plain(replace(DIGITS, load=None), PlainOptions(out=root))
    assert capsys.readouterr().out.count("done before") == 13
    smaller = replace(TINY, curve_tasks=(), curve_models=(), models=TINY.models[:1], seeds=(1,))
    run_plain(replace(DIGITS, load=None, presets={"cpu": smaller}), PlainOptions(out=root))
    assert capsys.readouterr().out.count("done before") == 1
    other = replace(DIGITS, presets={"cpu": replace(TINY, lr=0.5)})
    with pytest.raises(ConfigError, match=r"lr: 0\.005 there, 0\.5 asked for"):
        run_plain(other, PlainOptions(out=root))


def test_a_run_repeats_itself(root):
    cell = Cell("rotmnist", "cpu", "rotmnist-20", "gc-p4-w2", "plain", 1)
    torch.rand(3)  # another global state
    again = plain_training.run_plain_cell(DIGITS, cell, TINY, digits(cell, TINY, ""))
    before = read_record(cell.path(root))
    assert again["results"]["test"] == pytest.approx(before["results"]["test"], rel=1e-4)


def test_training_lowers_the_loss_and_ends_in_evaluation_mode():
    cell = Cell("rotmnist", "cpu", "rotmnist-20", "p4-w2", "plain", 0)
    settings = replace(TINY, epochs=15, lr=1e-2)
    task = digits(cell, settings, "")
    nll = [
        plain_training.run_plain_cell(DIGITS, cell, replace(settings, epochs=epochs), task)[
            "results"
        ]["train"]["nll"]
        for epochs in (1, 15)
    ]
    assert nll[1] < 0.8 * nll[0]
    model, _ = plain_training.fitted(DIGITS, cell, settings, task)
    assert not model.training


def test_parts_are_disjoint_and_smaller_ones_contained_in_larger_ones():
    images = torch.arange(10.0)[:, None, None, None]
    whole = ImageTask(images[:6], torch.arange(6), images[6:], torch.arange(6, 10), "x")
    small, large = (rotmnist.pooled(whole, n, 4, seed=3) for n in (2, 6))
    assert sorted([*large.train_labels.tolist(), *large.test_labels.tolist()]) == list(range(10))
    assert torch.equal(small.train_labels, large.train_labels[:2])
    assert torch.equal(small.test_labels, large.test_labels)
    assert torch.equal(large.train_images.flatten(), large.train_labels.float())
    with pytest.raises(ConfigError, match="more than 10 pictures"):
        rotmnist.pooled(whole, 7, 4, seed=3)
    assert len(rotmnist.pooled(whole, 7, None, seed=3).test_labels) == 3


def test_turned_pictures_keep_the_background_and_have_their_own_angles():
    images = torch.full((2, 1, 9, 9), -0.4)
    images[:, :, 4, 1] = 2.0
    turned = rotmnist.turned(images, torch.Generator().manual_seed(0))
    assert torch.allclose(turned[:, :, [0, 0, 8, 8], [0, 8, 0, 8]], torch.tensor(-0.4))
    assert not torch.allclose(turned[0], turned[1], atol=0.1)
    assert turned[0].sum() == pytest.approx(float(images[0].sum()), abs=0.5)


def test_plus_turns_the_training_pictures():
    def augmentation(task, **options):
        cell = Cell("rotmnist", "cpu", task, "p4-w2", "plain", 0)
        return rotmnist.EXPERIMENT.augment(cell, replace(TINY, **options))

    assert augmentation("rotmnist-20") is None
    assert augmentation("rotmnist-20+") is rotmnist.turned
    assert augmentation("rotmnist-20", augment=True) is rotmnist.turned


def test_one_component_explains_products_and_a_share_of_what_is_orthogonal():
    generator = torch.Generator().manual_seed(0)
    pictures, elements = (
        torch.randn(3, 2, n, generator=generator, dtype=torch.float64) for n in (9, 4)
    )
    product = torch.einsum("oig,oix->oigx", elements, pictures)
    assert torch.allclose(first_component_ratios(product), torch.ones(3, 2).double(), atol=1e-12)
    # opposite filters, as of an edge detector, are one component too
    opposite = pictures[:, :, None] * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    assert torch.allclose(first_component_ratios(opposite), torch.ones(3, 2).double(), atol=1e-12)
    # orthogonal pictures without mean, of sizes 2, 1, 1 and 0
    basis = torch.linalg.qr(
        torch.cat([torch.ones(9, 1), torch.randn(9, 3, generator=generator)], 1).double()
    ).Q[:, 1:]
    filters = torch.cat([basis * torch.tensor([2.0, 1.0, 1.0]), torch.zeros(9, 1)], 1).T
    ratio = first_component_ratios(filters[None, None])
    assert ratio.item() == pytest.approx(4 / 6, abs=1e-12)
    # a constant on each filter is no variance, and adding one changes nothing
    shifts = torch.randn(4, 1, generator=generator)
    assert first_component_ratios((filters + shifts)[None, None]).item() == pytest.approx(4 / 6)
    assert first_component_ratios(torch.ones(1, 1, 4, 9)).item() == 1.0


def test_redundancy_of_a_network_whose_filters_are_products():
    model = rotmnist_cnn("p4", 3)
    before = redundancy(model)
    for module in model.modules():
        if isinstance(module, GroupConv2d):
            module.weight.data = module.weight.data[:, :, :1].expand_as(module.weight).clone()
    after = redundancy(model)
    assert len(before) == len(after) == 6
    assert all(row["mean"] < 0.9 for row in before)
    assert all(row["quartiles"] == pytest.approx([1.0] * 3, abs=1e-9) for row in after)
    assert all(row["histogram"] == [0] * (BINS - 1) + [9] for row in after)
    separable = GroupConv2d(2, 2, 3, group=P4, separability="gc")
    assert redundancy(separable) == []  # its 1 x 1 factor has no pictures


@pytest.mark.parametrize("presets", [ROTMNIST, CIFAR_GROUPS])
def test_presets(presets):
    assert set(presets) == {"paper", "gpu30", "cpu"}
    paper = presets["paper"]
    assert paper.width is None
    assert paper.n_train is None
    assert all(set(settings.models) <= set(paper.models) for settings in presets.values())


def test_presets_of_rotated_digits():
    paper, cpu = ROTMNIST["paper"], ROTMNIST["cpu"]
    assert set(paper.models) == set(ROTMNIST_TABLE)
    assert rotmnist.n_pictures(paper.tasks[0]) == 12_000
    assert paper.n_test == 50_000
    assert {settings.size for settings in ROTMNIST.values()} == {28}
    assert rotmnist.n_pictures(cpu.tasks[0]) == 1000
    assert len(cpu.seeds) == 3
    assert rotmnist.kind_and_width("gc-p4-w30") == ("gc-p4", 30)
    with pytest.raises(ConfigError, match="name kind and width"):
        rotmnist.kind_and_width("gc-p4")


def test_published_numbers_are_those_of_our_networks():
    for model, row in ROTMNIST_TABLE.items():
        network = rotmnist_cnn(*rotmnist.kind_and_width(model))
        count = sum(weight.numel() for weight in network.parameters())
        assert count / 1000 == pytest.approx(float(row.parameters.removesuffix(" k")), abs=0.0051)
    assert len(ROTMNIST_OTHERS) == 8


@pytest.mark.parametrize("model", list(CIFAR_TABLE))
def test_published_networks_for_cifar(model):
    settings = CIFAR_GROUPS["paper"]
    cell = Cell("cifar_groups", "paper", "cifar10", model, "plain", 0)
    task = ImageTask(*2 * (torch.zeros(10, 3, 5, 5), torch.arange(10)), name="x")
    with torch.device("meta"):
        network = cifar_groups.EXPERIMENT.network(cell, settings, task)
    count = sum(weight.numel() for weight in network.parameters())
    assert f"{count / 1e6:.2f} M" == CIFAR_TABLE[model][0].parameters


def cifar_task(cell, settings, data_dir):
    generator = torch.Generator().manual_seed(cell.seed)
    images = torch.randn(20, 3, 9, 9, generator=generator)
    labels = torch.arange(20) % 10
    return ImageTask(images[:10], labels[:10], images[10:], labels[10:], cell.task)


def test_smoke_run_on_colour_pictures(tmp_path):
    settings = replace(CIFAR_GROUPS["cpu"], tasks=("cifar10+",), batch_size=5)
    experiment = replace(cifar_groups.EXPERIMENT, presets={"cpu": settings}, load=cifar_task)
    options = PlainOptions(out=tmp_path, models=("resnet44-gc-p4m", "allcnn-p4"))
    run_plain(experiment, options)
    found = list(read_records(tmp_path, "cifar_groups", "cpu"))
    assert [r["model"] for r in found] == ["allcnn-p4", "resnet44-gc-p4m"]
    text = group_tables.group_tables("cpu", tmp_path)
    assert "its errors mean nothing" in text
    assert "13.43" in text  # published, a fifth of the pictures
    wrong = Cell("cifar_groups", "cpu", "cifar10", "vgg", "plain", 0)
    with pytest.raises(ConfigError, match="'vgg': use one of resnet44-z2"):
        cifar_groups.EXPERIMENT.network(wrong, settings, cifar_task(wrong, settings, ""))


def test_plus_shifts_and_mirrors():
    def augmentation(task):
        cell = Cell("cifar_groups", "cpu", task, "allcnn-z2", "plain", 0)
        return cifar_groups.EXPERIMENT.augment(cell, CIFAR_GROUPS["cpu"])

    assert augmentation("cifar10") is None
    assert augmentation("cifar10-10000") is None
    assert augmentation("cifar10+") is not None


def run_with(model, accuracy, task="rotmnist-1000"):
    return {"model": model, "task": task, "results": {"test": {"accuracy": accuracy}}}


def test_margins_are_in_pooled_deviations():
    errors = {"z2-w20": (10.0, 12.0), "p4-w10": (6.0, 8.0), "gc-p4-w30": (10.4, 10.6)}
    runs = [run_with(m, 1 - e / 100) for m, pair in errors.items() for e in pair]
    text = margins(runs)
    # 11 - 7 points, deviations sqrt(2) each
    assert "| p4-w10    |          4.00 |                        2.8 |          no |" in text
    # 0.5 points, pooled deviation sqrt((2 + 0.02) / 2)
    assert "| gc-p4-w30 |          0.50 |                        0.5 |          no |" in text
    assert "Fewer than two seeds" in margins(runs[::2])
    close = [run_with("z2-w20", a) for a in (0.900, 0.901)]
    close += [run_with("p4-w10", a) for a in (0.905, 0.906)]
    assert "7.1 |          no" in margins(close)
    better = [run_with("z2-w20", a) for a in (0.90, 0.91)]
    better += [run_with("p4-w10", a) for a in (0.95, 0.96)]
    assert "7.1 |         yes" in margins(better)
    assert "p4-w10 before z2-w20: holds, by +5.00 points, +7.1 pooled" in order(better)


def test_order_names_the_pairs_that_do_not_hold():
    errors = {"z2-w20": 5.0, "p4-w10": 2.0, "g-p4-w17": 3.0}
    text = order([run_with(model, 1 - e / 100) for model, e in errors.items()])
    assert "ours: p4-w10 < g-p4-w17 < z2-w20" in text
    assert "g-p4-w17 before p4-w10: does not hold, by -1.00 points" in text
    assert "p4-w10 before z2-w20: holds, by +3.00 points" in text


@pytest.mark.parametrize("preset", ["paper", "gpu30", "cpu"])
def test_tables_without_records_say_so(tmp_path, preset):
    text = group_tables.group_tables(preset, tmp_path)
    assert text.count("No runs yet.") == 2
    assert "5.20 ± 0.11" in text
    assert "gc-p4-w30 < g-p4-w17 < p4-w10 < z2-w20" in text


def test_figures_are_small_pictures(root, monkeypatch):
    monkeypatch.setattr(group_figures, "ROTMNIST", {"cpu": TINY})
    monkeypatch.setattr(group_figures, "EXPERIMENT", DIGITS)
    written = group_figures.save_figures(group_figures.FigureOptions(results=root))
    assert [path.stem for path in written] == ["curves", "redundancy", "filters"]
    for path in written:
        assert path.stat().st_size < 150_000
        assert pictures.imread(path).std() > 0.01


def test_committed_records_fill_the_tables():
    found = list(read_records(RESULTS, "rotmnist", "cpu"))
    if not found:
        pytest.skip("no records of rotated digits in the tree")
    text = group_tables.group_tables("cpu", RESULTS)
    assert "Regenerated from MNIST" in text
    assert "No runs yet." not in text.partition("## CIFAR-10")[0]
    for record in found:
        network = rotmnist_cnn(*rotmnist.kind_and_width(record["model"]))
        assert record["results"]["parameters"] == sum(w.numel() for w in network.parameters())
    figures = sorted((RESULTS / "rotmnist" / "cpu").glob("*.png"))
    assert all(path.stat().st_size < 150_000 for path in figures)


def test_command_line():
    options = tyro.cli(PlainOptions, args=["--models", "p4-w10", "p4-w5", "--seeds", "0"])
    chosen = list(cells("rotmnist", options, ROTMNIST["cpu"]))
    assert [cell.name for cell in chosen] == [
        "rotmnist-1000-p4-w10-plain-seed0",
        "rotmnist-250-p4-w10-plain-seed0",
        "rotmnist-500-p4-w10-plain-seed0",
        "rotmnist-1000-p4-w5-plain-seed0",
    ]
