"""Figures of table 3: what each path carries, layer by layer, as stacked bars.

Run with ``python -m experiments.path_figures``; it only reads the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.mixer_tables import Share, layer_shares
from experiments.presets import PresetName
from experiments.records import RESULTS, read_records
from margeq.report.palette import path_colours

__all__ = ["Options", "path_figure", "save_path_figures"]

_TRAININGS = {"map": "MAP", "evidence": "evidence"}
_SHARES: Mapping[Share, str] = {
    "function_share": "share of function variance",
    "relative": "relative effective parameters",
}
_DPI = 110


@dataclass(frozen=True)
class Options:
    """Write one figure per data set beside the records."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are, and the figures go."""


def save_path_figures(
    results: Path, preset: PresetName, experiment: str = "multiple_groups"
) -> list[Path]:
    """Write ``<task>.png`` beside the records of each data set.

    Returns:
        The files.
    """
    records = list(read_records(results, experiment, preset))
    written = []
    for task in dict.fromkeys(record["task"] for record in records):
        path = results / experiment / preset / f"{task}.png"
        here = [record for record in records if record["task"] == task]
        path_figure(here, task).savefig(path, dpi=_DPI, bbox_inches="tight")
        written.append(path)
    return written


def path_figure(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Function variance and effective parameters of one data set, for each training that was run.

    Bars are means over the seeds.
    """
    groups = {
        label: [record for record in records if record["training"] == training]
        for training, label in _TRAININGS.items()
    }
    shown = {label: group for label, group in groups.items() if group}
    figure = Figure(figsize=(9, 2.3 * len(shown) + 0.7), layout="constrained")
    grid = figure.subplots(len(shown), 2, sharey=True, squeeze=False)
    for row, (label, group) in zip(grid, shown.items(), strict=True):
        for axis, (key, name) in zip(row, _SHARES.items(), strict=True):
            _stack(axis, layer_shares(group, key))
            axis.set_title(f"{label}: {name}", fontsize=10)
        row[0].set_ylabel(f"share (n = {len(group)})")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _stack(axis: Axes, by_path: Mapping[str, Sequence[float]]) -> None:
    colours = path_colours(by_path)
    bottom = [0.0] * max(map(len, by_path.values()))
    for path, heights in by_path.items():
        places = range(len(heights))
        axis.bar(places, heights, bottom=bottom, color=colours[path], label=path.upper(), width=0.7)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(bottom)), [f"layer {number}" for number in range(len(bottom))])
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    for figure_path in save_path_figures(chosen.results, chosen.preset):
        print(figure_path)
