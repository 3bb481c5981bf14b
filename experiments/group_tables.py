"""Tables of the experiments on groups: our test errors beside the published ones.

Run with ``python -m experiments.group_tables``; it only reads the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import tyro

from experiments.group_presets import ROTMNIST, PlainSettings
from experiments.markdown import NOTHING, mean_sd, table
from experiments.presets import PresetName
from experiments.published import (
    CIFAR_OTHERS,
    CIFAR_TABLE,
    ROTMNIST_OTHERS,
    ROTMNIST_TABLE,
    CifarRow,
)
from experiments.records import RESULTS, read_records
from experiments.rotmnist import kind_and_width, n_pictures
from margeq.models import count_macs, rotmnist_cnn

__all__ = [
    "Options",
    "cifar_table",
    "comparison",
    "error",
    "group_tables",
    "margins",
    "order",
    "redundancy_table",
    "rotmnist_curves",
    "rotmnist_table",
]

Record = Mapping[str, Any]

LEAST_DEVIATIONS = 3.0
"""Pooled standard deviations by which networks on p4 have to beat the ordinary one."""
LEAST_POINTS = 1.0
"""Points of test error by which they have to beat it."""

_COUNTS = (
    "MACs: 1 × 1 convolutions at the size of the result, as published; only c-Z2CNN's published "
    "count comes from the size of the map that they get (ours would be 4.12 M)."
)
_ORDINARY = "z2-w20"
_PUBLISHED_ORDER = ("gc-p4-w30", "g-p4-w17", "p4-w10", "z2-w20")


@dataclass(frozen=True)
class Options:
    """Print the tables with our numbers beside the published ones."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are."""


def group_tables(preset: PresetName, results: Path) -> str:
    """All tables as Markdown.

    Returns:
        The text.
    """
    digits = list(read_records(results, "rotmnist", preset))
    pictures = list(read_records(results, "cifar_groups", preset))
    settings = ROTMNIST[preset]
    main = _of(digits, task=settings.tasks[0])
    turned = _of(digits, task=f"{settings.tasks[0]}+")
    parts = [
        f"# Networks on groups, preset `{preset}`",
        "Test errors in per cent. Ours: mean ± standard deviation (number of seeds).",
        rotmnist_table(main, settings),
        comparison(settings.tasks[0], main),
        *([comparison(f"{settings.tasks[0]}+", turned)] if turned else []),
        rotmnist_curves(digits, settings),
        redundancy_table(main),
        cifar_table(pictures),
    ]
    return "\n\n".join(parts)


def error(record: Record) -> float:
    """Test error, per cent."""
    return 100 * (1 - record["results"]["test"]["accuracy"])


def rotmnist_table(records: Sequence[Record], settings: PlainSettings) -> str:
    """Table 1 of Lengyel & van Gemert: errors, parameters and multiplications.

    Returns:
        Markdown.
    """
    rows = []
    for model, published in ROTMNIST_TABLE.items():
        kind, width = kind_and_width(model)
        network = rotmnist_cnn(kind, width)
        found = _of(records, model=model)
        rows.append(
            [
                published.name,
                str(width),
                mean_sd([error(r) for r in found], 2),
                f"{published.error:.2f} ± {published.deviation:.2f}",
                f"{sum(weight.numel() for weight in network.parameters()):,}",
                published.parameters,
                f"{count_macs(network, (1, 28, 28), 'paper') / 1e6:.2f} M",
                published.macs,
                mean_sd([r["results"]["training_seconds"] for r in found], 0),
            ]
        )
    for name, (theirs, deviation) in ROTMNIST_OTHERS.items():
        shown = f"{theirs:.2f}" if deviation is None else f"{theirs:.2f} ± {deviation:.2f}"
        rows.append([name, NOTHING, NOTHING, shown, *[NOTHING] * 5])
    header = (
        "network", "width", "error %", "published", "parameters", "published", "MACs", "published",
        "training s",
    )  # fmt: skip
    shown = f"{_sizes(records, settings)}\n\n{table(header, rows)}\n\n{_COUNTS}"
    return f"## Rotated MNIST\n\n{shown}"


def comparison(task: str, records: Sequence[Record]) -> str:
    """Margins over the ordinary network, and the order of all.

    Returns:
        Markdown.
    """
    anew = ", training pictures turned anew in every epoch" if task.endswith("+") else ""
    title = f"### Networks on p4 against Z2CNN (width 20), {n_pictures(task):,} pictures{anew}"
    return f"{title}\n\n{margins(records)}\n\n{order(records)}"


def margins(records: Sequence[Record]) -> str:
    """By how much each network on p4 beats the ordinary one, and whether that is enough.

        (mean_z2 - mean_p4) / sqrt((var_z2 + var_p4) / 2)

    Returns:
        Markdown.
    """
    ordinary = [error(r) for r in _of(records, model=_ORDINARY)]
    rows = []
    for model in _PUBLISHED_ORDER[:-1]:
        points, deviations = _margin([error(r) for r in _of(records, model=model)], ordinary)
        if deviations is not None:
            enough = points >= LEAST_POINTS and deviations >= LEAST_DEVIATIONS
            rows.append([model, f"{points:.2f}", f"{deviations:.1f}", "yes" if enough else "no"])
    header = ("network", "points better", "pooled standard deviations", "beats Z2CNN")
    wanted = (
        f"To beat Z2CNN takes {LEAST_POINTS:g} point of error and {LEAST_DEVIATIONS:g} pooled "
        f"standard deviations."
    )
    shown = table(header, rows) if rows else "Fewer than two seeds."
    return f"{wanted}\n\n{shown}"


def _margin(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float | None]:
    """Difference of the means, in points and, with two seeds each, in pooled deviations."""
    points = fmean(worse or [math.nan]) - fmean(better or [math.nan])
    if min(len(better), len(worse)) < 2:
        return points, None
    return points, points / math.sqrt((variance(worse) + variance(better)) / 2)


def order(records: Sequence[Record]) -> str:
    """Whether the networks come in the published order of errors.

    Returns:
        Markdown.
    """
    found = {m: [error(r) for r in _of(records, model=m)] for m in _PUBLISHED_ORDER}
    ours = sorted((m for m in found if found[m]), key=lambda m: fmean(found[m]))
    theirs = [m for m in _PUBLISHED_ORDER if found[m]]
    lines = [f"- {a} before {b}: {_holds(found[a], found[b])}" for a, b in pairwise(theirs)]
    return "\n".join(
        [
            "Order of the test errors:",
            "",
            f"- published: {' < '.join(_PUBLISHED_ORDER)}",
            f"- ours: {' < '.join(ours) or NOTHING}",
            *lines,
        ]
    )


def _holds(better: Sequence[float], worse: Sequence[float]) -> str:
    points, deviations = _margin(better, worse)
    pooled = "" if deviations is None else f", {deviations:+.1f} pooled standard deviations"
    return f"{'holds' if points > 0 else 'does not hold'}, by {points:+.2f} points{pooled}"


def rotmnist_curves(records: Sequence[Record], settings: PlainSettings) -> str:
    """Figure 3 of Lengyel & van Gemert as tables.

    Returns:
        Markdown.
    """
    tasks = sorted({*settings.tasks, *settings.curve_tasks}, key=lambda t: (n_pictures(t), t))
    by_number = [
        [model, *(mean_sd(_errors(records, task, model), 2) for task in tasks)]
        for model in settings.models
    ]
    main = settings.tasks[0]
    models = sorted({*settings.models, *settings.curve_models}, key=kind_and_width)
    by_size = []
    for model in models:
        found = _of(records, task=main, model=model)
        parameters = f"{found[0]['results']['parameters']:,}" if found else NOTHING
        by_size.append([model, parameters, mean_sd(_errors(records, main, model), 2)])
    numbers = [f"{n_pictures(task):,} pictures{'+' if '+' in task else ''}" for task in tasks]
    return "\n\n".join(
        [
            "### Test error % against the number of training pictures",
            table(["network", *numbers], by_number),
            "### Test error % against the size of the network",
            table(["network", "parameters", "error %"], by_size),
        ]
    )


def redundancy_table(records: Sequence[Record]) -> str:
    """Figure 2 of Lengyel & van Gemert as a table: median and mean of each layer.

    Returns:
        Markdown.
    """
    found = [r["results"]["first_component"] for r in _of(records, model="p4-w10")]
    rows = []
    for number, row in enumerate(found[0]["before"] if found else []):
        cells = [
            f"{fmean(_statistic(f[when][number], what) for f in found):.3f}"
            for what in ("median", "mean")
            for when in ("before", "after")
        ]
        rows.append([row["layer"], *cells])
    header = ("layer", "median before", "median after", "mean before", "mean after")
    title = (
        "### Variance over the group that one principal component explains, P4CNN (width 10)\n\n"
        f"Over all pairs of channels, before and after training; mean over {len(found)} seeds."
    )
    return f"{title}\n\n{table(header, rows)}"


def _statistic(row: Record, what: str) -> float:
    return row["quartiles"][1] if what == "median" else row["mean"]


def cifar_table(records: Sequence[Record]) -> str:
    """Table 2 of both papers.

    Returns:
        Markdown.
    """
    tasks = list(dict.fromkeys(["cifar10", "cifar10+", *(r["task"] for r in records)]))
    fifth = "cifar10-10000"
    tasks += [] if fifth in tasks else [fifth]
    rows = []
    for model, published in CIFAR_TABLE.items():
        found = _of(records, model=model)
        parameters = f"{found[0]['results']['parameters']:,}" if found else NOTHING
        errors = [mean_sd(_errors(found, task, model), 2) for task in tasks]
        rows.append([model, parameters, *errors])
        rows += [_published_row(f"  {row.source}", row, tasks) for row in published]
    rows += [_published_row(f"{n}, {row.source}", row, tasks) for n, row in CIFAR_OTHERS.items()]
    shown = table(["network", "parameters", *tasks], rows)
    return f"## CIFAR-10\n\n{_cifar_sizes(records)}\n\n{shown}"


def _published_row(name: str, row: CifarRow, tasks: Iterable[str]) -> list[str]:
    errors = [f"{row.errors[task]:.2f}" if task in row.errors else NOTHING for task in tasks]
    return [name, row.parameters, *errors]


def _cifar_sizes(records: Sequence[Record]) -> str:
    if not records:
        return "No runs yet."
    data, config = records[0]["data"], records[0]["config"]
    note = ""
    if config["width"] is not None:
        note = " This preset shows that everything runs; its errors mean nothing."
    epochs = "1 epoch" if config["epochs"] == 1 else f"{config['epochs']} epochs"
    return (
        f"{epochs}, {data['n_test']:,} test pictures, widths "
        f"{'as published' if config['width'] is None else 'from ' + str(config['width'])}.{note}"
    )


def _of(records: Iterable[Record], **wanted: str) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def _errors(records: Iterable[Record], task: str, model: str) -> list[float]:
    return [error(r) for r in _of(records, task=task, model=model)]


def _sizes(records: Sequence[Record], settings: PlainSettings) -> str:
    """The data of the runs, in two sentences."""
    if not records:
        return "No runs yet."
    data = records[0]["data"]
    turned = "turned anew in every epoch" if settings.augment else "as they are"
    return (
        f"Regenerated from MNIST (each digit turned once, angles uniform on the circle), "
        f"{data['n_train']:,} training pictures {turned} and {data['n_test']:,} test pictures of "
        f"{settings.size} × {settings.size} pixels; {settings.epochs} epochs of Adam for every "
        f"network. Published: 12,000 training pictures, other files and training."
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    print(group_tables(chosen.preset, chosen.results))
