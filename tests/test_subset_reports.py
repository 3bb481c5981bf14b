"""Reports of what gates leave: the table, its lines, JSON and the figure of circles."""

from __future__ import annotations

import io
import json
import math
from contextlib import ExitStack

import pytest
import torch
from matplotlib.colors import to_hex
from rich.console import Console
from torch import nn

import margeq
from margeq.demo import Answer
from margeq.effective_dim import EffectiveDimension, PathRow
from margeq.groups import P4, P4M, C
from margeq.layers import GroupGate, LearnedSubset, PartialGroupConv2d, PartialLiftingConv2d
from margeq.models import group_digit_network
from margeq.report.palette import REFLECTIONS, ROTATIONS
from margeq.report.polar import subset_figure
from margeq.report.table import symmetry_table
from margeq.report.text import as_text
from margeq.terminal.demo import _Face

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def drawn(model):
    """Of all gates, also of those that have nothing to learn."""
    gates = {n: m for n, m in model.named_modules() if hasattr(m, "learned_subset")}
    return subset_figure({name: gate.learned_subset() for name, gate in gates.items()})


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = group_digit_network(2, group=P4M, paths=("gconv", "partial"), widths=(2,), size=8)
    x = torch.randn(20, 1, 8, 8)
    return margeq.optimize_marglik(
        model, [(x, torch.arange(20) % 2)], n_epochs=2, n_epochs_burnin=1, marglik_frequency=1,
        restarts=["only:partial", "only:partial@whole"], seed=0, progress="none",
    )  # fmt: skip


NAME = "layer1.paths.partial.gate"


def test_a_result_says_what_its_gates_leave(result):
    gate = result.model.get_submodule(NAME)
    assert result.learned_subsets == {NAME: gate.learned_subset()}
    dimension = result.effective_dimension()
    assert dimension.subsets == result.learned_subsets
    assert str(dimension).splitlines()[-1] == f"layer1 partial: {gate.learned_subset()}"
    assert len(str(dimension).splitlines()) == 2 + len(dimension.paths) + 1


def test_plain_data(result):
    found = json.loads(json.dumps(result.to_dict()))["effective_dimension"]["subsets"]
    subset = result.learned_subsets[NAME]
    assert found[NAME]["degrees"] == subset.degrees
    assert found[NAME]["words"] == str(subset)


def test_without_gates_nothing_is_said():
    dimension = EffectiveDimension((), ())
    assert len(str(dimension).splitlines()) == 2
    assert dimension.to_dict()["subsets"] == {}
    assert dimension.subset_lines == []
    assert drawn(nn.Linear(2, 2)) is None


def test_lines_below_the_table():
    subsets = {"a.paths.b.gate": GroupGate(P4M, 85 / 180, 0.0).learned_subset()}
    dimension = EffectiveDimension((), (), {}, subsets)
    assert dimension.subset_lines == ["a b: rotations within ±85°, reflections off"]
    odd = EffectiveDimension((), (), {}, {"[bold]": GroupGate(P4).learned_subset()})
    out = io.StringIO()
    console = Console(file=out, width=100)
    console.print(symmetry_table(odd, "title"))
    console.print(as_text(odd.subset_lines[0]))
    assert "[bold]: rotations within ±144°" in out.getvalue()


def path_row(path, verdict):
    return PathRow("a", path, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, verdict)


def test_a_gate_of_a_path_that_is_off_says_so():
    subset = GroupGate(P4, 0.6).learned_subset()
    subsets = {"a.paths.b.gate": subset, "a.paths.bc.gate": subset, "d.gate": subset}
    rows = (path_row("b", "off"), path_row("bc", "selected"), path_row("", "off"))
    phrase = "rotations within ±108°"
    assert EffectiveDimension(rows, (), {}, subsets).subset_lines == [
        f"a b: {phrase} (path off)", f"a bc: {phrase}", f"d: {phrase}",
    ]  # fmt: skip


def test_the_terminal_prints_a_line_per_gate(result):
    out = io.StringIO()
    console = Console(file=out, width=120)
    with ExitStack() as stack:
        _Face(console, stack).answered(Answer("corner", result, 0.5, None, 1.0))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("gates ")]
    assert lines == [f"gates        layer1 partial: {result.learned_subsets[NAME]}"]


# --- the figure


def bars(axis, colour):
    """Centre and extent in degrees, inner radius and thickness of each bar of a colour."""
    return [
        (
            math.degrees(bar.get_x() + bar.get_width() / 2), math.degrees(bar.get_width()),
            bar.get_y(), bar.get_height(),
        )
        for bar in axis.patches
        if to_hex(bar.get_facecolor()).upper() == colour
    ]  # fmt: skip


def test_each_bar_is_as_thick_as_its_weight():
    gate = GroupGate(P4M, 0.6, 0.4)
    (axis,) = drawn(gate).axes
    weights = gate.weights().tolist()
    outer, inner = bars(axis, ROTATIONS), bars(axis, REFLECTIONS)
    (ring,) = {round(y + h, 9) for _, _, y, h in bars(axis, "#EDEDED")[:4]}
    for found in (outer, inner):
        assert [b[0] for b in found] == pytest.approx([0, 90, 180, 270])
        assert all(80 < b[1] < 90 for b in found)
    thickness = ring - outer[0][2]
    assert [b[3] / thickness for b in outer] == pytest.approx(weights[:4])
    assert inner[1][3] / inner[0][3] == pytest.approx(weights[5] / weights[4])
    assert inner[0][3] == pytest.approx(0.4 * (0.5 - 0.12))
    assert outer[0][2] > inner[0][2] + 0.38  # the rings do not touch


def test_up_and_counter_clockwise():
    (axis,) = drawn(GroupGate(P4, 0.6)).axes
    assert axis.get_theta_offset() == pytest.approx(math.pi / 2)
    assert axis.get_theta_direction() == 1


class Circle(nn.Module):
    def __init__(self, degrees, mirror=None):
        super().__init__()
        self.subset = LearnedSubset(degrees, mirror, None, None)

    def learned_subset(self):
        return self.subset

    def set_shares(self, width=None, mirror=None): ...


@pytest.mark.parametrize(("degrees", "extent"), [(60.0, 120.0), (180.0, 360.0), (0.0, 5.0)])
def test_a_circle_has_one_sector(degrees, extent):
    (axis,) = drawn(Circle(degrees)).axes
    assert bars(axis, ROTATIONS) == [pytest.approx((0.0, extent, 0.58, 0.42))]
    assert bars(axis, "#EDEDED")[0][1] == pytest.approx(360)
    assert bars(axis, REFLECTIONS) == []


def test_a_group_without_rotations_has_a_mark():
    (axis,) = drawn(GroupGate(C(1))).axes
    assert bars(axis, ROTATIONS)[0][1] == pytest.approx(5.0)


def test_rows_of_six_with_names_and_words():
    first = PartialLiftingConv2d(1, 2, 3, group=P4, width=0.25)
    second = PartialGroupConv2d(2, 2, 3, group=P4, gate=first.gate)  # one circle for both
    model = nn.Sequential(first, second, *(GroupGate(C(8), 0.3) for _ in range(7)))
    figure = drawn(model)
    assert [axis.get_title() for axis in figure.axes] == ["0", *map(str, range(2, 9))]
    assert [axis.get_xlabel() for axis in figure.axes][:2] == [
        "no rotations",
        "rotations within ±54°",
    ]
    places = [axis.get_subplotspec().rowspan.start for axis in figure.axes]
    assert places == [0] * 6 + [1] * 2
    assert not figure.legends
    assert drawn(GroupGate(P4M)).legends
