"""Tables of the experiments on partial equivariance, ours beside the published.

Run with ``python -m experiments.partial_tables``; it only reads the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from experiments.markdown import NOTHING, mean_sd, table
from experiments.presets import PresetName
from experiments.published_partial import PUBLISHED, PUBLISHED_TASKS, PUBLISHED_TOY
from experiments.records import RESULTS, read_records

__all__ = ["Options", "partial_tables", "switches_at"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """Print the tables with our numbers beside the published ones."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are."""


def partial_tables(preset: PresetName, results: Path) -> str:
    """All tables as Markdown."""
    toy = list(read_records(results, "partial_toy", preset))
    pictures = list(read_records(results, "partial_benchmarks", preset))
    parts = [
        f"# Partial equivariance, preset `{preset}`",
        "Test accuracy in per cent, mean ± standard deviation (number of seeds). Widths: share of "
        "the rotations that is left, layer by layer; of reflections, their weight.",
        "## Sixes, table 1",
        accuracy_table(toy, toy_published),
        "Turns to the left and to the right, in degrees, at which sixes stop to be upright by what "
        "the networks say (figure 4):",
        curve_table(toy),
        "## Pictures, tables 2 to 5",
        accuracy_table(pictures, picture_published),
        "## Which start the evidence kept",
        starts_table([*toy, *pictures]),
    ]
    return "\n\n".join(parts)


def toy_published(task: str, model: str) -> str:
    """Table 1, for its two questions."""
    found = PUBLISHED_TOY.get(model.removeprefix("mc-").partition("-")[0])
    return NOTHING if found is None or task == "mnist6-half" else f"{found:.1f}"


def picture_published(task: str, model: str) -> str:
    """Tables 2 to 5, of networks on samples."""
    if model not in PUBLISHED or task not in PUBLISHED_TASKS:
        return NOTHING
    return f"{PUBLISHED[model][PUBLISHED_TASKS.index(task)]:.2f}"


def accuracy_table(records: Sequence[Record], published: Any) -> str:
    """One row per task, network and training.

    Args:
        records: of one experiment.
        published: the number for a task and a network, as text.

    Returns:
        Markdown.
    """
    rows = []
    for (task, model, training), found in _by(records, "task", "model", "training").items():
        results = [record["results"] for record in found]
        evidence = [r["log_evidence_per_datum"] for r in results if "log_evidence_per_datum" in r]
        rows.append(
            [
                *(task, model, training),
                mean_sd([100 * r["test"]["accuracy"] for r in results], 2),
                published(task, model),
                mean_sd([r["test"]["nll"] for r in results], 3),
                mean_sd(evidence, 3),
                left(results),
                f"{results[0]['parameters']:,}",
                mean_sd([r["training_seconds"] for r in results], 0),
            ]
        )
    header = (
        "task", "network", "trained by", "accuracy", "published", "NLL", "evidence per datum",
        "left of the group", "parameters", "seconds",
    )  # fmt: skip
    return table(header, rows, 3)


def left(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean shares over the seeds, gate by gate, or widths of an augmentation."""
    if results[0]["widths"]:
        names = results[0]["widths"]
        return ", ".join(
            f"{name} {fmean(r['widths'][name] for r in results):.2f}" for name in names
        )
    gates = list(results[0]["subsets"])
    rotations, mirrors = [], []
    for gate in gates:
        subsets = [r["subsets"][gate] for r in results]
        if subsets[0]["n_rotations"] != 1:
            rotations.append(f"{fmean(s['degrees'] / 180 for s in subsets):.2f}")
        if subsets[0]["mirror"] is not None:
            mirrors.append(f"{fmean(s['mirror'] for s in subsets):.2f}")
    parts = [("rotations", rotations), ("reflections", mirrors)]
    return "; ".join(f"{name} {' / '.join(shares)}" for name, shares in parts if shares) or NOTHING


def curve_table(records: Sequence[Record]) -> str:
    """Where the curves of figure 4 fall through ½, of networks that can know.

    Returns:
        Markdown.
    """
    known = [r for r in records if "upright" in r["results"] and r["results"]["subsets"]]
    rows = []
    for key, found in _by(known, "task", "model", "training").items():
        sides = [switches_at(record["results"]["upright"]) for record in found]
        rows.append(
            [
                *key,
                *(" / ".join(f"{turn:.0f}" for turn in side) for side in zip(*sides, strict=True)),
            ]
        )
    return table(("task", "network", "trained by", "left, by seed", "right, by seed"), rows, 3)


def starts_table(records: Sequence[Record]) -> str:
    """Evidence per datum of each start, and how often it was kept.

    Returns:
        Markdown.
    """
    several = [r for r in records if len(r["results"].get("starts", ())) > 1]
    names = list(dict.fromkeys(s["start"] for r in several for s in r["results"]["starts"]))
    rows = []
    for (task, model), found in _by(several, "task", "model").items():
        cells = []
        for name in names:
            runs = [s for r in found for s in r["results"]["starts"] if s["start"] == name]
            kept = sum(r["results"]["kept"] == name for r in found)
            mean = mean_sd([s["log_evidence_per_datum"] for s in runs], 3)
            cells.append(f"{mean}, kept {kept}" if runs else NOTHING)
        rows.append([task, model, *cells])
    return table(("task", "network", *names), rows, 2)


def switches_at(curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The turns, to either side, at which the probability of an upright six falls through ½.

    Returns:
        Degrees, interpolated; 180 for a side on which it never does.
    """
    sides = []
    for sign in (-1.0, 1.0):
        side = sorted((sign * angle, p) for angle, p in curve if sign * angle >= 0)
        sides.append(_crossing(side))
    return sides[0], sides[1]


def _crossing(side: Sequence[tuple[float, float]]) -> float:
    for (a, p), (b, q) in pairwise(side):
        if p >= 0.5 > q:
            return a + (b - a) * (p - 0.5) / (p - q)
    return 180.0


def _by(records: Sequence[Record], *keys: str) -> dict[tuple[str, ...], list[Record]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    print(partial_tables(options.preset, options.results))
