"""A sweep, read from its run directories: one entry per run, one per setting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from margeq.runs.files import read_table
from margeq.runs.layout import CONFIG, RESULT
from margeq.runs.specification import PlannedRun
from margeq.runs.verdicts import verdicts

__all__ = ["overview", "state_of"]


def state_of(run: PlannedRun) -> str:
    """``"finished"``, ``"begun"`` (running, interrupted or failed) or ``"new"``."""
    if (run.directory / RESULT).exists():
        return "finished"
    return "begun" if (run.directory / CONFIG).exists() else "new"


def overview(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """What the directories of a sweep hold, whoever ran them.

    Args:
        runs: of a specification.

    Returns:
        ``"runs"``, in their order, and ``"settings"``, with median and range over the seeds.
    """
    entries = [_entry(run) for run in runs]
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(entry["setting"], sort_keys=True), []).append(entry)
    return {"runs": entries, "settings": [_setting(members) for members in groups.values()]}


def _entry(run: PlannedRun) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": run.id,
        "directory": run.directory.name,
        "setting": dict(run.setting),
        "seed": run.config.seed,
        "state": state_of(run),
    }
    if entry["state"] != "finished":
        return entry
    result = read_table(run.directory / RESULT)
    kept = next(r["start"] for r in result["restarts"] if r["kept"])
    return entry | {
        "log_marginal_likelihood_per_datum": result["log_marginal_likelihood_per_datum"],
        "n_data": result["n_data"],
        "flavour": result["flavour"],
        "success": result["success"],
        "kept_start": kept,
        "verdicts": verdicts(result),
        "held_out": result["held_out"],
        "seconds": result["seconds"],
    }


def _setting(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [entry for entry in members if entry["state"] == "finished"]
    found: dict[str, Any] = {
        "setting": members[0]["setting"],
        "runs": len(members),
        "finished": len(done),
    }
    if not done:
        return found
    best = max(done, key=lambda entry: entry["log_marginal_likelihood_per_datum"])
    scores = sorted({name for entry in done for name in entry["held_out"] or {}})
    return found | {
        "log_marginal_likelihood_per_datum": _spread(
            [entry["log_marginal_likelihood_per_datum"] for entry in done]
        ),
        "held_out": {
            name: _spread([e["held_out"][name] for e in done if name in (e["held_out"] or {})])
            for name in scores
        },
        "verdicts": {
            layer: dict(Counter(_in_short(entry["verdicts"].get(layer, "")) for entry in done))
            for layer in done[0]["verdicts"]
        },
        "best": {
            "id": best["id"],
            "seed": best["seed"],
            "start": best["kept_start"],
            "log_marginal_likelihood_per_datum": best["log_marginal_likelihood_per_datum"],
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def _in_short(verdict: str) -> str:
    return verdict.partition(" (")[0]
