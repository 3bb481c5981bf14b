"""Run what has no record yet: the loop that all tables have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.records import Cell, is_done, versions, write_record

__all__ = ["run_missing"]


def run_missing(
    cells: Iterable[Cell],
    root: Path,
    config: Callable[[Cell], Mapping[str, Any]],
    run: Callable[[Cell], Mapping[str, Any]],
    in_short: Callable[[Mapping[str, Any]], str],
) -> None:
    """Make each run whose record is missing, write it down and say so in a line.

    Args:
        cells: the runs, in order.
        root: folder of all records.
        config: settings of a run; a record of other settings is never overwritten.
        run: makes the run; returns its record but for the versions.
        in_short: the line about a record.
    """
    software = versions()  # of the code that is loaded now, whatever happens to its files later
    for cell in cells:
        path = cell.path(root)
        if is_done(path, config(cell)):
            print(f"{cell.name}: done before")
            continue
        record = run(cell)
        write_record(path, {**record, "versions": software})
        print(f"{cell.name}: {in_short(record)}; {record['seconds']:.0f} s", flush=True)
