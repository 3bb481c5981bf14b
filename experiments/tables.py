"""The paper's tables 1, 2 and 4 with our numbers (mean ± sd over seeds) beside the published ones.

Run with ``python -m experiments.tables``; it only reads the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from experiments.law import law
from experiments.markdown import NOTHING, mean_sd, table
from experiments.presets import TOY_PROBLEM, PresetName, Settings
from experiments.published import TABLE_1, TABLE_2, TABLE_4, ImageNetRow, PathNumbers
from experiments.records import RESULTS, read_records

__all__ = ["Options", "ranking", "selected_paths", "table_1", "table_2", "table_4", "tables"]

Record = Mapping[str, Any]

_RANDOM_ROOT = (
    ", which misses curvature where the training data are fitted without an error: the evidence of "
    "such runs (MAP above all) comes out too high."
)


@dataclass(frozen=True)
class Options:
    """Print the paper's tables with our numbers beside the published ones."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are."""


def tables(preset: PresetName, results: Path) -> str:
    """All tables as Markdown.

    Returns:
        The text.
    """
    toy = list(read_records(results, "toy_problem", preset))
    cifar = list(read_records(results, "cifar10", preset))
    parts = [
        f"# The paper's tables, preset `{preset}`",
        "Ours: mean ± standard deviation (number of seeds). Published: one run each, other data "
        "and sizes; compare the order, not the digits.",
        table_1(toy, TOY_PROBLEM[preset]),
        selected_paths(toy),
        table_2(cifar),
        ranking(cifar),
        table_4(cifar),
        law([*toy, *cifar]),
    ]
    return "\n\n".join(parts)


def table_1(records: Sequence[Record], settings: Settings) -> str:
    """Test accuracies of the toy problem.

    Returns:
        Markdown.
    """
    rows = []
    for task, training, model in product(settings.tasks, ("map", "evidence"), settings.models):
        found = _of(records, task=task, training=training, model=model)
        published = TABLE_1.get((task, model, training))
        rows.append(
            [
                task,
                training,
                model.upper(),
                mean_sd([100 * r["results"]["test"]["accuracy"] for r in found], 2),
                NOTHING if published is None else f"{published:.2f}",
                mean_sd([r["results"]["log_evidence_per_datum"] for r in found], 3),
            ]
        )
    header = ("task", "training", "network", "accuracy %", "published", "log evidence / N")
    return f"## Table 1: toy problem\n\n{_sizes(records)}\n\n{table(header, rows, 3)}"


def selected_paths(records: Sequence[Record]) -> str:
    """Function share of each path and how many seeds call it off, per layer of mixed networks.

    Returns:
        Markdown.
    """
    learned = [r for r in _of(records, training="evidence") if "+" in r["model"]]
    rows = []
    for task, model in dict.fromkeys((r["task"], r["model"]) for r in learned):
        found = _of(learned, task=task, model=model)
        for layer, path in _paths(found):
            here = [
                row
                for r in found
                for row in r["results"]["paths"]
                if (row["layer"], row["path"]) == (layer, path)
            ]
            off = sum(row["verdict"] == "off" for row in here)
            rows.append(
                [
                    task,
                    model.upper(),
                    layer,
                    path.upper(),
                    f"{100 * fmean(row['function_share'] for row in here):.1f}",
                    f"{100 * fmean(row['normalised'] for row in here):.2f}",
                    f"{len(here) - off} of {len(here)}",
                ]
            )
    header = ("task", "network", "layer", "path", "function share %", "γ/P %", "not off")
    return f"### Selected paths, trained by evidence\n\n{table(header, rows, 4)}"


def table_2(records: Sequence[Record]) -> str:
    """CIFAR-10: test NLL and accuracy of both trainings, and the evidence.

    Returns:
        Markdown.
    """
    rows = []
    ours = dict.fromkeys(r["model"] for r in records)
    for model, published in [(m, p) for m in ours for p in TABLE_2 if _is_row_of(p, m)]:
        rows.append(_table_2_row(records, model))
        rows.append(
            [
                f"  published, prior on {published.prior_on}",
                published.parameters,
                f"{published.map_nll:.3f}",
                f"{published.map_accuracy:.2f}",
                f"{published.nll:.3f}",
                f"{published.accuracy:.2f}",
                f"{published.neg_log_evidence:.3f}",
            ]
        )
    header = (
        "network", "parameters", "MAP NLL", "MAP acc. %", "evidence NLL", "evidence acc. %",
        "−log evidence / N",
    )  # fmt: skip
    return f"## Table 2: CIFAR-10\n\n{_sizes(records)}\n\n{table(header, rows)}"


def _is_row_of(published: ImageNetRow, model: str) -> bool:
    kind, _, prior_on = model.partition("@")
    return published.model == kind and (published.prior_on == "lengthscales") == bool(prior_on)


def _table_2_row(records: Sequence[Record], model: str) -> list[str]:
    found = _of(records, model=model)
    by_map, learned = _of(found, training="map"), _of(found, training="evidence")
    return [
        model.upper(),
        f"{found[0]['results']['parameters']:,}",
        mean_sd([r["results"]["test"]["nll"] for r in by_map], 3),
        mean_sd([100 * r["results"]["test"]["accuracy"] for r in by_map], 2),
        mean_sd([r["results"]["test"]["nll"] for r in learned], 3),
        mean_sd([100 * r["results"]["test"]["accuracy"] for r in learned], 2),
        mean_sd([-r["results"]["log_evidence_per_datum"] for r in learned], 3),
    ]


def ranking(records: Sequence[Record]) -> str:
    """The networks in the order of evidence and in that of test NLL, both trained by evidence.

    Returns:
        Markdown.
    """
    learned = _of(records, training="evidence")
    models = list(dict.fromkeys(r["model"] for r in learned))
    evidence = {m: _mean(learned, m, "log_evidence_per_datum") for m in models}
    nll = {m: fmean(r["results"]["test"]["nll"] for r in _of(learned, model=m)) for m in models}
    by_evidence = sorted(models, key=lambda m: -evidence[m])
    by_nll = sorted(models, key=nll.__getitem__)
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    agreeing = sum((evidence[a] > evidence[b]) == (nll[a] < nll[b]) for a, b in pairs)
    return "\n".join(
        [
            "### Ranking by evidence against ranking by test NLL",
            "",
            f"- by evidence: {' > '.join(m.upper() for m in by_evidence) or NOTHING}",
            f"- by test NLL: {' > '.join(m.upper() for m in by_nll) or NOTHING}",
            f"- {agreeing} of {len(pairs)} pairs of networks are in the same order",
        ]
    )


def table_4(records: Sequence[Record]) -> str:
    """FC+CONV layer by layer: precisions, mean square weights, effective parameters.

    Returns:
        Markdown.
    """
    found = _of(records, training="evidence", model="fc+conv")
    rows = []
    for number, published in enumerate(TABLE_4):
        for path, theirs in (("fc", published.fc), ("conv", published.conv)):
            here = [_path_numbers(r, f"layer{number}", path) for r in found]
            rows.append([f"layer{number}", path.upper(), *_pairs(here, theirs)])
    header = (
        "layer", "path", "δ", "publ.", "mean θ²", "publ.", "γ/P", "publ.", "relative", "publ.",
    )  # fmt: skip
    seeds = f"Ours: mean over seeds, n = {len(found)}." if found else "No FC+CONV runs yet."
    return f"## Table 4: FC+CONV on CIFAR-10\n\n{seeds}\n\n{table(header, rows, 2)}"


def _path_numbers(record: Record, layer: str, path: str) -> PathNumbers:
    """One path of one layer, as table 4 has it: of its weights, without the bias."""
    results = record["results"]
    weight = next(
        row
        for row in results["tensors"]
        if (row["layer"], row["path"]) == (layer, path) and row["name"].endswith("weight")
    )
    row = next(row for row in results["paths"] if (row["layer"], row["path"]) == (layer, path))
    normalised = weight["effective"] / weight["parameters"]
    return PathNumbers(
        weight["prior_precision"], weight["mean_square"], normalised, row["relative"]
    )


def _pairs(ours: Sequence[PathNumbers], theirs: PathNumbers) -> list[str]:
    cells = []
    for key in ("precision", "mean_square", "normalised", "relative"):
        mean = fmean(getattr(numbers, key) for numbers in ours) if ours else None
        cells += [NOTHING if mean is None else f"{mean:.3g}", f"{getattr(theirs, key):.3g}"]
    return cells


def _of(records: Iterable[Record], **wanted: str) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def _mean(records: Iterable[Record], model: str, key: str) -> float:
    return fmean(r["results"][key] for r in _of(records, model=model))


def _paths(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Layers and paths that had candidates."""
    rows = [row for r in records for row in r["results"]["paths"] if row["path"]]
    return list(dict.fromkeys((row["layer"], row["path"]) for row in rows))


def _sizes(records: Sequence[Record]) -> str:
    """The data of the runs, in a sentence."""
    if not records:
        return "No runs yet."
    data, config = records[0]["data"], records[0]["config"]
    learned = _of(records, training="evidence")
    settled = sum(r["results"]["settled"] for r in learned)
    root = records[0]["results"]["flavour"]["hessian_root"]
    return (
        f"{data['n_train']:,} training and {data['n_test']:,} test pictures of "
        f"{config['size']} × {config['size']} pixels, width {config['width']}, "
        f"{config['epochs']} epochs. The evidence had settled in {settled} of {len(learned)} runs "
        f"that learned precisions. Root of the output Hessian: {root}"
        f"{_RANDOM_ROOT if root.startswith('mc') else '.'}"
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    print(tables(chosen.preset, chosen.results))
