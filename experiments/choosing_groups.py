"""Choosing between groups: digits anywhere on a canvas, upright or turned by quarters.

Three blocks of GCONV + CONV on maps of p4, from every start that ``restarts="auto"`` has; among
them is each path alone, the same function as the network that has only this path.
Run with ``python -m experiments.choosing_groups``.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from experiments.evaluate import evaluate
from experiments.markdown import mean_sd, table
from experiments.records import RESULTS, versions, write_record
from margeq.curvature.options import KfacOptions
from margeq.data import place_digits
from margeq.errors import ConvergenceWarning
from margeq.models import group_digit_network

__all__ = ["Options", "choose", "summary_table"]

EXPERIMENT = "choosing_groups"
Pose = Literal["upright", "turned"]


@dataclass(frozen=True)
class Options:
    """The question is the same for both poses; only one of them has the symmetry."""

    poses: tuple[Pose, ...] = ("upright", "turned")
    """Digits as they are, or turned by random multiples of 90 degrees."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of places, poses, weights and the order of the batches."""
    epochs: int = 50
    """Of each start."""
    out: Path = RESULTS
    """Where the records go."""


def choose(pose: Pose, seed: int, epochs: int = 50, restarts: str = "auto") -> dict[str, Any]:
    """Train from every start and keep the one with the highest evidence.

    Returns:
        Evidence per datum of every start, and what the kept one looks like.
    """
    began = time.perf_counter()
    task = place_digits("digit", turned=pose == "turned", seed=seed).standardised()
    network = group_digit_network(task.n_classes)
    loader = task.train_loader(128, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the record
        result = margeq.optimize_marglik(
            network,
            loader,
            marglik_loader=task.marglik_loader(512),
            n_epochs=epochs,
            n_epochs_burnin=min(6, epochs),
            marglik_frequency=3,
            optimizer_kwargs={"lr": 0.01},
            scheduler_cls=CosineAnnealingLR,
            scheduler_kwargs={"T_max": epochs * len(loader)},
            curvature=KfacOptions("adaptive", position_fraction=0.25),
            restarts=restarts,
            seed=seed,
            progress="none",
        )
    return {
        "pose": pose,
        "seed": seed,
        "epochs": epochs,
        "seconds": time.perf_counter() - began,
        "starts": {r.start: r.log_marginal_likelihood / result.n_data for r in result.restarts},
        "kept": next(r.start for r in result.restarts if r.kept),
        "log_evidence_per_datum": result.log_marginal_likelihood / result.n_data,
        "settled": result.success,
        "test": evaluate(network, task.test_loader(500)),
        "rows": [asdict(row) for row in result.effective_dimension().paths],
    }


def summary_table(records: list[dict[str, Any]]) -> str:
    """One row per run: evidence of each start, and the kept run's share of GCONV per layer.

    Returns:
        Markdown.
    """
    starts = list(records[0]["starts"])
    rows = [
        [
            r["pose"],
            str(r["seed"]),
            *(f"{r['starts'][name]:.3f}" for name in starts),
            r["kept"],
            " / ".join(f"{share:.2f}" for share in group_shares(r)),
            f"{100 * r['test']['accuracy']:.1f}",
        ]
        for r in records
    ]
    for pose in dict.fromkeys(r["pose"] for r in records):
        here = [r for r in records if r["pose"] == pose]
        means = [mean_sd([r["starts"][name] for r in here], 3) for name in starts]
        rows.append([pose, "all", *means, "", "", ""])
    header = ("digits", "seed", *starts, "kept", "share of GCONV", "accuracy %")
    return table(header, rows, 2)


def group_shares(record: dict[str, Any]) -> list[float]:
    """The group path's share of the function variance, layer by layer."""
    return [row["function_share"] for row in record["rows"] if row["path"] == "gconv"]


def main(options: Options) -> None:
    """Run what has no record yet, and print the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights that are priced out become denormal, which is slow
    records = []
    software = versions()
    for seed in options.seeds:
        for pose in options.poses:
            path = options.out / EXPERIMENT / f"{pose}-seed{seed}.json"
            if not path.exists():
                write_record(path, {**choose(pose, seed, options.epochs), "versions": software})
            records.append(stored(path))
    print(summary_table(sorted(records, key=lambda r: (r["pose"], r["seed"]))))


def stored(path: Path) -> dict[str, Any]:
    """A record that was written before."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
