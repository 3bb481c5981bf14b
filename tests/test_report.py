"""The report: one HTML file in eight parts, its sentences, and its figures as files."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import margeq
from margeq.cli import main
from margeq.errors import ConfigError
from margeq.groups import P4M
from margeq.layers import Linear2d, ResidualPathways
from margeq.models import group_digit_network
from margeq.report.figures import plates
from margeq.report.page import write_report
from margeq.report.palette import path_colours
from margeq.report.reproduce import facts
from margeq.report.svg import INK, as_svg, drawing, inline_svg
from margeq.report.words import evidence_sentence, lights, sentences, tiedness_sentences
from margeq.runs import tasks
from tests.run_files import FLAGS, TINY

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

LAYER, PATH = "<script>alert(1)<", "[red]x[/]$a_b$"
VOID = {"meta", "link", "br", "hr", "img", "rect", "path", "use", "image", "circle", "input"}
BIDI = "a\u202eb"


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Tasks that a test registers are gone after it."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


def strange_network():
    """Two candidate paths, under names that would act if they were not escaped."""
    paths = {"conv": nn.Conv2d(1, 2, 3, padding=1), PATH: Linear2d(1, 2, (6, 6), (6, 6))}
    return nn.Sequential(OrderedDict([
        (LAYER, ResidualPathways(paths)), ("relu", nn.ReLU()), ("flat", nn.Flatten()),
        (BIDI, nn.Linear(72, 2)),
    ]))  # fmt: skip


def fit(model, x, **options):
    given = {"n_epochs": 4, "n_epochs_burnin": 1, "marglik_frequency": 1, "seed": 3, **options}
    return margeq.optimize_marglik(model, [(x, torch.arange(len(x)) % 2)], progress="none", **given)


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    return fit(strange_network(), torch.randn(24, 1, 6, 6), restarts=["symmetric", "free"])


@pytest.fixture(scope="module")
def plain(result):
    return json.loads(json.dumps(result.to_dict()))


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    where = tmp_path_factory.mktemp("report") / "deeper"
    page = result.report(where)
    assert page == where / "report.html"
    return where


class Page(HTMLParser):
    """Tags, ids, links and text; complains about tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.said = [], [], [], [], []
        self.labels, self.attributes = [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [v for n, v in attrs if n in ("href", "src", "action", "data", "srcset")]
        if given.get("role") == "img":
            self.labels.append(given["aria-label"])
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)  # which sees that it is closed

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.said.append(data)


def parsed(folder):
    return Page((folder / "report.html").read_text("utf-8"))


# --- the page


def test_the_page_stands_alone(folder):
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert len(text.encode()) < 300_000
    assert "http" not in text
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,", "data:,")) for link in page.links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_ids_are_unique_and_found(folder):
    page = parsed(folder)
    assert len(page.ids) == len(set(page.ids))
    inner = [link[1:] for link in page.links if link.startswith("#")]
    text = (folder / "report.html").read_text("utf-8")
    inner += re.findall(r"url\(#([^)]+)\)", text)
    assert inner
    assert set(inner) <= set(page.ids)


def test_names_appear_and_do_nothing(folder):
    text = (folder / "report.html").read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text
    page = Page(text)
    assert f"{LAYER} mixes" in page.text or f"{LAYER} chose" in page.text
    assert PATH.upper() in page.text
    assert "\u202e" not in text
    assert r"a\u202eb" in page.text


def test_its_parts(folder):
    text = (folder / "report.html").read_text("utf-8")
    heads = re.findall(r"<h[23][^>]*>([^<]+)</h[23]>", text)
    assert heads == [
        "Verdict", "Can it be believed?", "Effective parameters", "Evidence", "Prior precisions",
        "Filters", "Reproduce",
    ]  # fmt: skip
    assert [f"<h{n}" in text for n in (1, 4)] == [True, False]
    assert '<html lang="en">' in text


def test_every_figure_is_described(folder):
    page = parsed(folder)
    assert page.tags.count("svg") == len(page.labels) == 7
    assert all(len(label) > 20 for label in page.labels)
    assert ("aria-hidden", "true") in page.attributes
    assert sum(value == "region" for name, value in page.attributes if name == "role") == 1


def test_dark_and_light_and_narrow(folder):
    text = (folder / "report.html").read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert text.count("currentColor") > 50
    assert INK not in re.sub(r"<style>.*?</style>", "", text, count=1, flags=re.DOTALL)
    assert "overflow-x: auto" in text


def test_the_same_again_from_the_directory(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "new")]) == 0
    first, second = (d / "report.html" for d in (folder, tmp_path / "new"))
    assert first.read_text("utf-8") == second.read_text("utf-8")
    assert capsys.readouterr().out == f"written {second}, *.png, *.svg\n"


def test_files_of_every_figure(folder):
    names = {path.name for path in folder.iterdir()}
    stems = {
        "effective",
        "effective-log",
        "share",
        "evidence",
        "evidence-terms",
        "precisions-1",
        "filters-1",
    }
    files = {f"{s}.{kind}" for s in stems for kind in ("png", "svg")}
    assert names == files | {"report.html", "report.json"}
    for stem in stems:
        root = ElementTree.parse(folder / f"{stem}.svg").getroot()
        assert root[0].attrib["fill"] == "#ffffff"
        image = Image.open(folder / f"{stem}.png")
        assert image.size[0] == pytest.approx(float(root.attrib["width"][:-2]) / 72 * 192, abs=2)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert len(image.convert("L").getcolors()) > 3


def test_one_colour_per_path(folder, plain):
    colours = path_colours(row["path"] for row in plain["effective_dimension"]["paths"]
                           if row["path"])  # fmt: skip
    assert len(set(colours.values())) == 2
    for stem in ("effective", "effective-log", "share", "precisions-1"):
        svg = (folder / f"{stem}.svg").read_text("utf-8")
        assert all(colour.lower() in svg for colour in colours.values())
    text = (folder / "report.html").read_text("utf-8")
    assert re.findall(r"background:(#\w+)", text) == list(colours.values())
    evidence = (folder / "evidence.svg").read_text("utf-8")
    assert not any(colour.lower() in evidence for colour in colours.values())


def test_numbers_in_words(folder, plain):
    page = parsed(folder)
    assert f"Log marginal likelihood {plain['log_marginal_likelihood']:.2f} nats" in page.text
    assert f"{plain['log_marginal_likelihood']!r} nats" in page.text
    assert f"24 data, checksum {plain['checksum']}" in page.text
    assert "seed 3" in page.text
    assert f"torch {torch.__version__}" in page.text
    assert "@inproceedings{vanderouderaa2023learning," in page.text


def test_a_result_without_candidate_paths(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    plain_result = fit(model, torch.randn(12, 1, 6, 6), n_epochs=2)
    page = Page(plain_result.report(tmp_path).read_text("utf-8"))
    assert "No layer has candidate paths or gates" in page.text
    assert page.tags.count("svg") == 3  # evidence twice, kernels
    assert not (tmp_path / "effective.png").exists()


def test_gates_are_drawn_and_named(tmp_path):
    torch.manual_seed(0)
    model = group_digit_network(2, group=P4M, paths=("gconv", "partial"), widths=(2,), size=8)
    found = fit(model, torch.randn(20, 1, 8, 8), n_epochs=2, restarts=["only:partial"])
    page = Page(found.report(tmp_path).read_text("utf-8"))
    (line,) = found.effective_dimension().subset_lines
    assert f"{line}." in page.text
    assert (tmp_path / "subset-1.png").exists()
    assert any(label.startswith("layer1 partial: ") for label in page.labels)
    assert "var(--empty)" in (tmp_path / "report.html").read_text("utf-8")


def test_importing_results_does_not_import_reports():
    code = (
        "import sys; from margeq import MargLikResult, compare; MargLikResult.report; "
        "sys.exit(bool({'matplotlib', 'jinja2', 'margeq.report'} & set(sys.modules)))"
    )
    # torch brings jinja2 itself in some versions, but never before it compiles
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert done.returncode == 0


# --- what is stored


def question(plain, path_verdicts, **more):
    """A result as a demonstration stores it."""
    named = json.loads(json.dumps(plain).replace(PATH, "fc"))
    found = named | {"held_out_accuracy": 0.9, "conv_only": None, **more}
    rows = [row for row in found["effective_dimension"]["paths"] if row["path"]]
    for row, (path, verdict) in zip(rows, path_verdicts, strict=True):
        assert row["path"] == path
        row["verdict"] = verdict
        row["function_share"] = {"selected": 1.0, "off": 0.0}.get(verdict, 0.5)
    return found


def test_the_panel_of_known_answers(plain, tmp_path):
    digit = question(plain, [("conv", "selected"), ("fc", "off")])
    corner = question(
        plain, [("conv", "mixed"), ("fc", "mixed")],
        conv_only={"held_out_accuracy": 0.25, "log_marginal_likelihood_per_datum": -1.4},
    )  # fmt: skip
    config = {"seed": 4, "epochs": 7, "restarts": "auto", "threads": 2, "out": "x y"}
    stored = {"questions": {"digit": digit, "corner": corner}, "config": config, "versions": {}}
    page = Page(write_report(stored, tmp_path).read_text("utf-8"))
    assert page.text.count("✓ This is what came out.") == 2
    assert "CONV only, same training: 25.0%" in page.text
    assert "CONV 100%, FC 0%" in page.text
    assert "CONV 50%, FC 50%" in page.text
    command = "margeq demo --seed 4 --restarts auto --epochs 7 --threads 2 --questions digit corner"
    assert command in page.text
    assert {"digit-share.png", "corner-share.svg"} <= {path.name for path in tmp_path.iterdir()}
    stored["questions"] = {"digit": corner, "corner": digit}
    page = Page(write_report(stored, tmp_path).read_text("utf-8"))
    assert page.text.count("✗ This did not come out.") == 2
    assert len(page.ids) == len(set(page.ids))


def test_a_stored_name_does_not_lead_out_of_the_directory(plain, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    stored = {"questions": {"../../evil": question(plain, [("conv", "off"), ("fc", "off")])}}
    write_report(stored, inside)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert (inside / "0-evidence.png").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"restarts": []},
        {"effective_dimension": None},
        {"pictures": [{"layer": "a", "path": "b", "kind": "kernels", "size": [3, 3],
                       "largest": 1.0, "values": ["zz"]}]},
        {"pictures": [{"layer": "a", "path": "b", "kind": "kernels", "size": [3, 3],
                       "largest": 1.0, "values": ["80"]}]},
        {"n_data": 0},
        {"diagnostics": {}},
        {"flavour": []},
        {"prior_groups": {}, "log_marginal_likelihood": "<b>"},
    ],
)  # fmt: skip
def test_what_is_no_result_is_a_configuration_error(plain, tmp_path, damage):
    with pytest.raises(ConfigError, match="not one that this version can report"):
        write_report({**plain, **damage}, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_directories_without_a_result(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "margeq resume" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_a_configuration_error(result, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        result.report(blocked / "x")
    (tmp_path / "d" / "report.html").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write to"):
        result.report(tmp_path / "d")


def test_a_run_writes_its_report_unless_told_not_to(tmp_path, capsys):
    factory = tmp_path / "tiny.py"
    factory.write_text(TINY)
    out = tmp_path / "run"
    given = ["run", "--factory", str(factory), *FLAGS, "--out", str(out)]
    assert main([*given, "--no-report"]) == 0
    assert not (out / "report.html").exists()
    assert "report.html" not in capsys.readouterr().out
    assert main(given) == 0  # finished already, but not reported
    assert f"written {out}/report.html, result.json, events.jsonl" in capsys.readouterr().out
    page = parsed(out)
    assert "margeq run --config config.json" in page.text
    assert '"task": "tiny"' in page.text
    assert "Held-out data, never used: accuracy" in page.text
    digest = json.loads((out / "config.json").read_text())["factory"]["sha256"]
    assert f"(SHA-256 {digest})" in page.text
    before = (out / "report.html").stat().st_mtime_ns
    assert main(["resume", str(out), "--factory", str(factory), "--quiet"]) == 0
    assert (out / "report.html").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out / "report.html")}


# --- sentences


def row(path, verdict, share, layer="a"):
    return {"layer": layer, "path": path, "verdict": verdict, "function_share": share}


def table(*rows, lines=()):
    return {"effective_dimension": {"paths": rows, "subset_lines": list(lines)}}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("conv", "selected", 0.999), row("fc", "off", 0.001)],
         "a chose CONV: all of its function's variance; FC is off."),
        ([row("x", "off", 0.003), row("conv", "selected", 0.99), row("fc", "off", 0.007)],
         "a chose CONV: 99% of its function's variance; FC and X are off."),
        ([row("conv", "mixed", 0.4), row("fc", "mixed", 0.6)],
         "a mixes FC (60%) and CONV (40%) of its function's variance: no path is enough alone."),
        ([row("conv", "mixed", 0.4), row("fc", "mixed", 0.595), row("x", "off", 0.005)],
         "a mixes FC (60%) and CONV (40%) of its function's variance; X is off: no path is enough "
         "alone."),
        ([row("conv", "", 0.0), row("fc", "", 0.0)],
         "a: its output does not vary over the data, so its paths cannot be told apart."),
        ([row("conv", "selected", 1.0)], "a has one path, CONV: nothing to choose from."),
        ([row("conv", "selected", 1.0, ""), row("fc", "off", 0.0, "")],
         "the model chose CONV: all of its function's variance; FC is off."),
        ([row("conv", "frozen", 1.0), row("fc", "off", 0.0)],
         "a uses CONV (all) of its function's variance; FC is off."),
    ],
)  # fmt: skip
def test_a_sentence_per_layer(rows, said):
    assert sentences(table(*rows)) == [said]


def test_a_sentence_per_gate_and_one_for_nothing():
    assert sentences(table(row("", "", 1.0), lines=["a b: no rotations"])) == ["a b: no rotations."]
    (nothing,) = sentences(table(row("", "", 1.0)))
    assert nothing.startswith("No layer has candidate paths or gates")


def diagnosed(**changes):
    found = {
        **table(row("conv", "selected", 1.0), row("fc", "off", 0.0)),
        "n_data": 100, "success": True, "message": "the evidence has settled",
        "prior_groups": {"a.paths.fc.weight": "one", "a.paths.conv.weight": "two"},
        "restarts": [
            {"start": "symmetric", "kept": True, "error": "", "log_marginal_likelihood": -50.0},
            {"start": "free", "kept": False, "error": "", "log_marginal_likelihood": -80.0},
        ],
        "diagnostics": {
            "slope": 0.001, "clamped_eigenvalues": 0, "at_bounds": [], "captured_trace": 0.999,
            "restart_spread": 30.0,
        },
    }  # fmt: skip
    for key, value in changes.items():
        (found["diagnostics"] if key in found["diagnostics"] else found)[key] = value
    return {light.name: light for light in lights(found)}


def start(name, value, kept=False, error=""):
    return {"start": name, "kept": kept, "error": error, "log_marginal_likelihood": value}


def test_all_is_fine():
    assert {light.state for light in diagnosed().values()} == {"fine"}
    words = diagnosed()["starts"].words
    assert "symmetric is kept, 30 nats (0.3 per datum) ahead of free" in words


@pytest.mark.parametrize(
    ("changes", "name", "state", "said"),
    [
        ({"slope": None}, "converged", "unknown", "the evidence has settled."),
        ({"success": False}, "converged", "take care", "slope 0.001"),
        ({"clamped_eigenvalues": 3}, "curvature", "take care", "3 clearly negative"),
        ({"at_bounds": ["one"]}, "precisions", "fine", "all of paths that are off"),
        ({"at_bounds": ["one", "two"]}, "precisions", "take care", "1 at a bound"),
        ({"captured_trace": 0.95}, "captured trace", "take care", "95.00%"),
        ({"captured_trace": 0.5}, "captured trace", "problem", "too high"),
        ({"captured_trace": None}, "captured trace", "unknown", "not known"),
        ({"restarts": [start("a", -1.0, True)]}, "starts", "take care", "only the start a"),
        ({"restarts": [start("a", -1.0, True), start("b", None, error="E: x")]},
         "starts", "take care", "Failed: b."),
        ({"restarts": [start("a", -1.0, True), start("b", -2.0), start("c", -9.0)]},
         "starts", "take care", "1 nats (0.01 per datum) ahead of b"),
    ],
)  # fmt: skip
def test_what_is_not_fine_says_so(changes, name, state, said):
    light = diagnosed(**changes)[name]
    assert light.state == state
    assert said in light.words


def test_the_terms_add_up(plain):
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", evidence_sentence(plain))]
    assert numbers[0] == pytest.approx(numbers[1] + numbers[2], abs=0.0016)
    assert numbers[0] == pytest.approx(plain["log_marginal_likelihood"] / 24, abs=0.0006)
    shifted = copy.deepcopy(plain)
    kept = next(r for r in shifted["restarts"] if r["kept"])
    for update in kept["history"]["updates"]:
        update["occam"] += 24.0
    assert "a penalty of hyperparameters inside the network of -1.000" in evidence_sentence(shifted)


def test_tiedness_of_paths_in_use_only():
    picture = {"layer": "a", "path": "fc", "tiedness": 0.5, "independent": 0.25}
    plain = table(row("fc", "mixed", 0.5)) | {"pictures": [picture]}
    (said,) = tiedness_sentences(plain)
    assert said.startswith("a FC: translation-tiedness 50.0%, where independent weights have 25.0%")
    assert tiedness_sentences(table(row("fc", "off", 0.0)) | {"pictures": [picture]}) == []
    unknown = table(row("fc", "mixed", 0.5)) | {"pictures": [picture | {"tiedness": None}]}
    assert tiedness_sentences(unknown) == []


def test_facts_leave_out_what_is_not_known(plain):
    found = dict(facts({"config": {}}, {}, {"": plain}))
    assert set(found) == {"command", "data", "evidence flavour", "log marginal likelihood"}
    assert "is_bound" not in found["evidence flavour"]
    assert "curvature kfac" in found["evidence flavour"]


# --- figures


def told(plain, shares, switches=()):
    """The result with another history of its second path."""
    changed = copy.deepcopy(plain)
    history = next(r for r in changed["restarts"] if r["kept"])["history"]
    history["switches"] = [
        {"epoch": epoch, "layer": LAYER, "path": PATH, "to": to} for epoch, to in switches
    ]
    for update, share in zip(history["updates"], shares, strict=True):
        update["function_share"][LAYER] = {"conv": 1.0 - share, PATH: share}
    with drawing():
        return {plate.name: plate for plate in plates(changed)}


def lines(plate, word):
    """Points of the lines whose label has a word in it."""
    (axis,) = plate.figure.axes
    return [line.get_xydata().tolist() for line in axis.lines if word in str(line.get_label())]


def test_bars_are_stacked(plain):
    drawn = told(plain, [0.5] * 4)
    rows = [row for row in plain["effective_dimension"]["paths"] if row["path"]]
    for name, key in (("effective", "effective"), ("share", "function_share")):
        first, second = drawn[name].figure.axes[0].patches
        assert first.get_width() == pytest.approx(rows[0][key])
        assert first.get_x() == 0.0
        assert second.get_width() == pytest.approx(rows[1][key])
        assert second.get_x() == pytest.approx(rows[0][key])


@pytest.mark.parametrize(("small", "expected"), [(0.01, 2), (0.0099, 1)])
def test_orders_of_magnitude_are_points_of_what_is_there(plain, small, expected):
    changed = copy.deepcopy(plain)
    first, second = (row for row in changed["effective_dimension"]["paths"] if row["path"])
    first["effective"], second["effective"] = 8.0, small
    with drawing():
        (plate,) = (plate for plate in plates(changed) if plate.part == "orders")
    (axis,) = plate.figure.axes
    assert axis.get_xscale() == "log"
    points = [point for line in axis.lines for point in line.get_xydata().tolist()]
    assert points == [[8.0, 0], [small, 0]][:expected]


def test_precisions_end_where_a_path_is_switched_off(plain):
    plate = told(plain, [0.5, 0.4, 0.0, 0.0], [(1, "probe"), (3, "off"), (4, "off")])[
        "precisions-1"
    ]
    (curve,) = lines(plate, "weight")[1:]
    history = next(r for r in plain["restarts"] if r["kept"])["history"]
    (group,) = [g for t, g in plain["prior_groups"].items() if PATH in t and t.endswith("weight")]
    values = [update["prior_precision"][group] for update in history["updates"]]
    assert [y for _, y in curve[:2]] == pytest.approx(values[:2])
    assert all(math.isnan(y) for _, y in curve[2:])
    assert [line[0][0] for line in lines(plate, "switched off")] == [3]
    assert [line[0][0] for line in lines(plate, "below 10%")] == [3]
    assert "is switched off at epoch 3; " in plate.alt
    assert "switched off at epoch 4" in plate.alt
    assert "switched off at epoch 1" not in plate.alt


def test_a_path_that_stays_has_no_such_line(plain):
    plate = told(plain, [0.05, 0.4, 0.4, 0.4])["precisions-1"]
    assert lines(plate, "below") == []
    assert lines(plate, "switched off") == []
    plate = told(plain, [0.05, 0.4, 0.4, 0.05])["precisions-1"]
    assert [line[0][0] for line in lines(plate, "below")] == [4]


def test_evidence_is_drawn_per_datum(plain):
    drawn = told(plain, [0.5] * 4)
    updates = next(r for r in plain["restarts"] if r["kept"])["history"]["updates"]
    (kept,) = lines(drawn["evidence"], "(kept)")
    assert [y for _, y in kept] == pytest.approx(
        [u["log_marginal_likelihood"] / 24 for u in updates]
    )
    (fit_term,), (occam,), (total,) = (
        lines(drawn["evidence-terms"], word) for word in ("fit", "Occam", "sum")
    )
    for one, two, three in zip(fit_term, occam, total, strict=True):
        assert one[1] + two[1] == pytest.approx(three[1])
    assert all(y < 0 for _, y in occam)


# --- SVG


def test_svg_in_a_page_keeps_its_ids_to_itself():
    with drawing():
        figure = Figure(figsize=(2, 1))
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], label=INK)
        axis.set_title(f"{INK} <b> & $x_1$ 0.0034567")
        svg = as_svg(figure)
    first, second = inline_svg(svg, "a"), inline_svg(svg, "b")
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])
    assert f">{INK} &lt;b&gt; &amp; $x_1$ 0.0034567<" in first  # text is left as it is
    assert math.isclose(len(first), len(svg), rel_tol=0.5)
    assert "xmlns" not in first
    assert "xlink" not in first
    ElementTree.fromstring(first)
