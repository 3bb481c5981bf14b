"""Figures on partial equivariance: how sure of a turned six (fig. 4), and what layers keep (5, 6).

Run with ``python -m experiments.partial_figures``; it only reads the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from experiments.presets import PresetName
from experiments.records import RESULTS, read_records
from margeq.report.polar import subset_figure
from margeq.subsets import LearnedSubset

__all__ = ["Options", "save_partial_figures"]

Record = Mapping[str, Any]
_DPI = 110
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Options:
    """Write the figures beside the records."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are, and the figures go."""


def save_partial_figures(results: Path, preset: PresetName) -> list[Path]:
    """Write all figures for which there are records.

    Returns:
        The files.
    """
    written = []
    for experiment in ("partial_toy", "partial_benchmarks"):
        records = list(read_records(results, experiment, preset))
        folder = results / experiment / preset
        for name, figure in _figures(records).items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=_DPI, bbox_inches="tight")
            written.append(path)
    return written


def _figures(records: Sequence[Record]) -> dict[str, Figure]:
    found = {}
    for task in dict.fromkeys(record["task"] for record in records):
        here = [record for record in records if record["task"] == task]
        if any("upright" in record["results"] for record in here):
            found[f"{task}-curve"] = curve_figure(here, task)
        gated = [record for record in here if record["results"]["subsets"]]
        if gated:
            found[f"{task}-subsets"] = kept_figure(gated)
    return found


def curve_figure(records: Sequence[Record], task: str) -> Figure:
    """Probability of "upright" for held-out sixes, turn by turn; one line per seed.

    Returns:
        Figure 4 of Romero & Lohit 2022.
    """
    kinds = list(dict.fromkeys((r["model"], r["training"]) for r in records))
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-90, 90, color="#F3F3F3", lw=0, label="answer: upright")
    models = list(dict.fromkeys(model for model, _ in kinds))
    for kind in kinds:
        number = models.index(kind[0])
        same = [r for r in records if (r["model"], r["training"]) == kind]
        for seed, record in enumerate(same):
            angles, said = zip(*record["results"]["upright"], strict=True)
            label = f"{kind[0]}, by {kind[1]}" if seed == 0 else None
            dash = "-" if kind[1] == "loss" else "--"
            # thinner ones in front, so that curves that coincide are all seen
            width = max(0.8, 3.0 - 0.6 * number)
            axis.plot(angles, said, dash, color=_COLOURS[number % 6], lw=width, label=label)
    axis.set(xlim=(-180, 180), ylim=(0, 1), xticks=range(-180, 181, 60), title=task)
    axis.set_xlabel("turn [degrees]")
    axis.set_ylabel("probability of upright")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def kept_figure(records: Sequence[Record]) -> Figure:
    """What each layer of the first seed's networks has left of its group.

    Returns:
        Circles, as in figures 5 and 6 of Romero & Lohit 2022.
    """
    first = min(record["seed"] for record in records)
    subsets = {
        f"{record['model']}, by {record['training']}\n{gate}": LearnedSubset(
            left["degrees"], left["mirror"], left["n_rotations"], None
        )
        for record in records
        if record["seed"] == first
        for gate, left in record["results"]["subsets"].items()
    }
    return subset_figure(subsets)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    for path in save_partial_figures(options.results, options.preset):
        print(path)
