"""A sweep: every combination of a grid, under every seed, each a run with a name of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from margeq.config import RunConfig
from margeq.errors import ConfigError
from margeq.runs.files import read_table
from margeq.runs.identity import run_id
from margeq.runs.plain import config_from, require_known

__all__ = ["PlannedRun", "read_specification", "words"]

_MOST = 10_000
_KNOWN = [field.name for field in fields(RunConfig)]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        id: by its configuration.
        config: all of it.
        setting: the values of the grid, by key.
        directory: where it takes place.
    """

    id: str
    config: RunConfig
    setting: Mapping[str, Any]
    directory: Path


def read_specification(path: Path, out: Path) -> list[PlannedRun]:
    """The runs of a file with ``[base]``, ``[grid]`` and ``seeds``.

    Args:
        path: TOML or JSON.
        out: directory of all runs.

    Returns:
        One run per combination and seed, the seeds of one combination side by side.

    Raises:
        ConfigError: for an unknown key, an empty list, a missing task, or the same run twice.
    """
    table = read_table(path)
    for key in table:
        require_known(key, str(path), ("base", "grid", "seeds"))
    base, grid = (_mapping(table.get(key, {}), key, path) for key in ("base", "grid"))
    axes = dict(_axes(grid, "", path))
    seeds = _seeds(table, base, axes, path)
    count = len(seeds)
    for values in axes.values():
        count *= len(values)
    if count > _MOST:
        raise ConfigError(f"{path}: {count} runs, more than {_MOST}; make the grid coarser")
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    runs = [_planned(base, s, seed, path, out) for s in combinations for seed in seeds]
    _require_distinct(runs, path)
    return runs


def words(setting: Mapping[str, Any]) -> str:
    """A setting in one line."""
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "base"


def _planned(
    base: Mapping[str, Any], setting: Mapping[str, Any], seed: int, path: Path, out: Path
) -> PlannedRun:
    values = dict(base) | {"seed": seed}
    for key, value in setting.items():
        name, _, argument = key.partition(".")
        if argument:
            given = values.get("arguments", {})
            # what is no table is refused below, in the same words as everywhere
            values["arguments"] = {**given, argument: value} if isinstance(given, dict) else given
        else:
            values[name] = value
    config = config_from(values, f"{path} ({words(setting)})" if setting else str(path))
    if not config.task:
        raise ConfigError(f"{path}: [base] has no task, such as task = 'digit'")
    name = run_id(config)
    return PlannedRun(name, config, setting, out / name)


def _mapping(value: Any, key: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {key} = {value!r}, expected a table")
    for name in value:
        require_known(str(name).partition(".")[0], f"{path}: [{key}]", _KNOWN)
    return value


def _axes(grid: Mapping[str, Any], prefix: str, path: Path) -> Iterator[tuple[str, list[Any]]]:
    """``arguments.width`` and a table ``[grid.arguments]`` are the same."""
    for name, values in grid.items():
        key = f"{prefix}{name}"
        if isinstance(values, Mapping) and not prefix:
            yield from _axes(values, f"{key}.", path)
        elif not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: [grid] {key} = {values!r}, expected a list of values")
        elif "." in key and not key.startswith("arguments."):
            raise ConfigError(f"{path}: [grid] {key}: only arguments have keys of their own")
        else:
            yield key, values


def _seeds(
    table: Mapping[str, Any], base: Mapping[str, Any], axes: Mapping[str, Any], path: Path
) -> list[int]:
    if "seed" in axes or ("seed" in base and "seeds" in table):
        raise ConfigError(f"{path}: seeds are given once, as seeds = [0, 1, 2] before the tables")
    seeds = table.get("seeds", [base.get("seed", 0)])
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and seed >= 0 for seed in seeds)
    ):
        raise ConfigError(f"{path}: seeds = {seeds!r}, expected a list of integers from 0")
    return seeds


def _require_distinct(runs: list[PlannedRun], path: Path) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        other = seen.setdefault(run.id, run)
        if other is not run:
            raise ConfigError(
                f"{path}: the same run twice, seed {run.config.seed} of {words(run.setting)} and "
                f"seed {other.config.seed} of {words(other.setting)}; a value is listed twice"
            )
