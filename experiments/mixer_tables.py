"""The paper's tables 3 and 7 with our numbers (mean ± sd over seeds) beside the published ones.

Run with ``python -m experiments.mixer_tables``; it only reads the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro

from experiments.markdown import NOTHING, mean_sd, table
from experiments.presets import PresetName
from experiments.published import TABLE_3, TABLE_7, MixerRow
from experiments.records import RESULTS, read_records

__all__ = [
    "Options",
    "Share",
    "answer",
    "layer_shares",
    "shares_table",
    "starts_table",
    "table_3",
    "table_7",
    "tables",
]

Record = Mapping[str, Any]
Share = Literal["relative", "function_share"]

_PAIRS = (("mnist", "rotated-mnist"), ("cifar10", "rotated-cifar10"))


@dataclass(frozen=True)
class Options:
    """Print the tables on groups with our numbers beside the published ones."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are."""


def tables(preset: PresetName, results: Path) -> str:
    """Both tables as Markdown.

    Returns:
        The text.
    """
    mixers = list(read_records(results, "multiple_groups", preset))
    factored = list(read_records(results, "separable_ablation", preset))
    parts = [
        f"# The paper's tables on groups, preset `{preset}`",
        "Ours: mean ± standard deviation (number of seeds). Published: one run each, other data "
        "and sizes; compare the order, not the digits.",
        f"## Table 3: F-FC+CONV+GCONV\n\n{_sizes(mixers)}",
        table_3(mixers),
        shares_table(mixers),
        answer(mixers),
        starts_table(mixers),
        f"## Table 7: factored group convolutions, rotated CIFAR-10, MAP\n\n{_sizes(factored)}",
        table_7(factored),
    ]
    return "\n\n".join(part for part in parts if part)


def layer_shares(records: Iterable[Record], key: Share) -> dict[str, list[float]]:
    """Path -> its share in each layer, mean over runs of one data set and training."""
    rows = [row for record in records for row in record["results"]["paths"] if row["path"]]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return {
        path: [
            fmean(row[key] for row in rows if (row["layer"], row["path"]) == (layer, path))
            for layer in layers
        ]
        for path in dict.fromkeys(row["path"] for row in rows)
    }


def table_3(records: Sequence[Record]) -> str:
    """Both trainings, the evidence, and effective parameters, data set by data set.

    Returns:
        Markdown, or nothing without records.
    """
    rows = []
    for task in _tasks(records):
        rows += [_mixer_row(records, task), _published_mixer_row(TABLE_3[task])]
    header = (
        "data", "MAP NLL", "MAP acc. %", "evidence NLL", "evidence acc. %", "−log evidence / N",
        "F_FC %", "CONV %", "GCONV %",
    )  # fmt: skip
    note = (
        "Per path: relative effective parameters after training by evidence, mean (min–max) over "
        "the layers."
    )
    return f"{note}\n\n{table(header, rows)}" if rows else ""


def _mixer_row(records: Sequence[Record], task: str) -> list[str]:
    by_map, learned = (_of(records, task=task, training=t) for t in ("map", "evidence"))
    by_path = layer_shares(learned, "relative")
    return [
        task,
        *(
            numbers
            for found in (by_map, learned)
            for numbers in (
                mean_sd([r["results"]["test"]["nll"] for r in found], 3),
                mean_sd([100 * r["results"]["test"]["accuracy"] for r in found], 2),
            )
        ),
        mean_sd([-r["results"]["log_evidence_per_datum"] for r in learned], 3),
        *(_spread(by_path.get(path, ())) for path in ("f_fc", "conv", "gconv")),
    ]


def _published_mixer_row(row: MixerRow) -> list[str]:
    return [
        "  published",
        f"{row.map_nll:.3f}",
        f"{row.map_accuracy:.2f}",
        f"{row.nll:.3f}",
        f"{row.accuracy:.2f}",
        f"{row.neg_log_evidence:.3f}",
        *(f"{mean} ({least}–{most})" for mean, least, most in row.shares.values()),
    ]


def shares_table(records: Sequence[Record]) -> str:
    """Share of each path in the variance of its layer's output over the data.

    Returns:
        Markdown, or nothing without records.
    """
    rows = []
    for task in _tasks(records):
        for training in ("map", "evidence"):
            found = _of(records, task=task, training=training)
            by_path = layer_shares(found, "function_share")
            shown = (_spread(by_path.get(path, ())) for path in ("f_fc", "conv", "gconv"))
            rows.append([task, training, *shown])
    header = ("data", "training", "F_FC %", "CONV %", "GCONV %")
    title = "### Share of the function's variance, mean (min–max) over the layers"
    return f"{title}\n\n{table(header, rows, 2)}" if rows else ""


def answer(records: Sequence[Record]) -> str:
    """Whether turned pictures ask for more of the group path than upright ones do.

    By the function of the runs that were kept, and by the evidence of the corners: a little CONV
    beside much GCONV can break a symmetry as well as CONV alone, and then both starts tie.

    Returns:
        Two sentences for each pair of data sets that has been run.
    """
    learned = _of(records, training="evidence")
    lines = []
    for upright, turned in _PAIRS:
        both = [_of(learned, task=task) for task in (upright, turned)]
        if all(both):
            low, high = ([_group_share(r) for r in runs] for runs in both)
            word = "more" if fmean(high) > fmean(low) else "not more"
            lines.append(
                f"- GCONV carries {word} of the function on {turned} than on {upright}: "
                f"{_percents(high)} % against {_percents(low)} %, one number a seed"
            )
            leads = [", ".join(f"{_lead(r):+.3f}" for r in runs) for runs in reversed(both)]
            lines.append(
                f"- GCONV alone has {leads[0]} nats per datum more evidence than CONV alone on "
                f"{turned}, and {leads[1]} on {upright}"
            )
    return "\n".join(lines)


def _group_share(record: Record) -> float:
    """Of the function's variance, mean over the layers."""
    return fmean(layer_shares([record], "function_share")["gconv"])


def _lead(record: Record) -> float:
    """Evidence of the network with GCONV alone over that with CONV alone, per datum."""
    reached = _reached(record)
    return reached.get("only:gconv", math.nan) - reached.get("only:conv", math.nan)


def _reached(record: Record) -> dict[str, float]:
    """Evidence per datum of every start that did not fail."""
    return {
        s["start"]: s["log_evidence_per_datum"]
        for s in record["results"]["starts"]
        if not s["error"]
    }


def starts_table(records: Sequence[Record]) -> str:
    """Evidence that every start reached; the highest one of a run is kept.

    Returns:
        Markdown, or nothing without records.
    """
    learned = _of(records, training="evidence")
    names = list(dict.fromkeys(s["start"] for r in learned for s in r["results"]["starts"]))
    rows = []
    for record in sorted(learned, key=lambda r: (_order(r["task"]), r["seed"])):
        reached = _reached(record)
        kept = max(reached, key=reached.__getitem__)
        rows.append(
            [
                record["task"],
                str(record["seed"]),
                *(f"{reached[n]:.3f}" if n in reached else NOTHING for n in names),
                kept,
            ]
        )
    header = ("data", "seed", *names, "kept")
    title = "### Log evidence per datum, start by start"
    return f"{title}\n\n{table(header, rows, 1)}" if rows else ""


def table_7(records: Sequence[Record]) -> str:
    """Weights and accuracies of the factored networks; those of equal width come first.

    Returns:
        Markdown, or nothing without records.
    """
    rows = []
    for model, published in TABLE_7.items():
        found = _of(records, model=model)
        if found:
            rows.append(
                [
                    model,
                    f"{found[0]['results']['parameters']:,}",
                    f"{published.parameters:,}",
                    mean_sd([100 * r["results"]["test"]["accuracy"] for r in found], 2),
                    f"{published.accuracy:.2f}",
                    mean_sd([100 * r["results"]["train"]["accuracy"] for r in found], 2),
                    mean_sd([r["results"]["test"]["nll"] for r in found], 3),
                ]
            )
    header = (
        "network", "weights", "publ.", "accuracy %", "publ.", "training accuracy %", "NLL",
    )  # fmt: skip
    return table(header, rows) if rows else ""


def _tasks(records: Iterable[Record]) -> list[str]:
    return sorted({r["task"] for r in records}, key=_order)


def _order(task: str) -> int:
    return list(TABLE_3).index(task)


def _of(records: Iterable[Record], **wanted: str) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def _spread(shares: Sequence[float]) -> str:
    """``mean (min–max)`` in per cent."""
    if not shares:
        return NOTHING
    return f"{100 * fmean(shares):.0f} ({100 * min(shares):.0f}–{100 * max(shares):.0f})"


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.1f}" for share in shares)


def _sizes(records: Sequence[Record]) -> str:
    """The data of the runs, in a sentence."""
    if not records:
        return "No runs yet."
    data, config = records[0]["data"], records[0]["config"]
    learned = _of(records, training="evidence")
    settled = sum(r["results"]["settled"] for r in learned)
    ending = f" The evidence had settled in {settled} of {len(learned)} runs." if learned else ""
    return (
        f"{data['n_train']:,} training and {data['n_test']:,} test pictures of "
        f"{config['size']} × {config['size']} pixels, width {config['width']}, "
        f"{config['epochs']} epochs; root of the output Hessian "
        f"{records[0]['results']['flavour']['hessian_root']}.{ending}"
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    print(tables(chosen.preset, chosen.results))
