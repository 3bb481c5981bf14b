"""A sweep on a terminal: a line per run that ends, a table per setting; without torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from margeq.callbacks import to_json
from margeq.errors import ConfigError
from margeq.flags import SweepFlags
from margeq.report.text import as_text
from margeq.runs.children import Children, Ended
from margeq.runs.files import write_json
from margeq.runs.layout import warn_if_factory_changed
from margeq.runs.overview import overview, state_of
from margeq.runs.slurm import submit
from margeq.runs.specification import PlannedRun, read_specification, words
from margeq.terminal.console import open_console, warnings_in_one_line

__all__ = ["show_sweep"]

_FAILED = 1


def show_sweep(flags: SweepFlags) -> int:
    """Run, submit or list a sweep.

    Returns:
        Exit code: 0, or 1 if a run failed.

    Raises:
        ConfigError: for arguments or a specification that cannot work.
    """
    if flags.jobs < 1:
        raise ConfigError(f"--jobs {flags.jobs}: at least 1")
    spec = Path(flags.spec)
    out = Path(flags.out or f"runs/{spec.stem}")
    factory = Path(flags.factory).resolve() if flags.factory else None
    if factory is not None and not factory.is_file():
        raise ConfigError(f"--factory {flags.factory}: no such Python file")
    runs = read_specification(spec, out)
    console = open_console(flags.quiet, flags.json)
    states = [state_of(run) for run in runs]
    console.print(
        f"sweep  {as_text(spec)}: {len(runs)} runs, {states.count('finished')} finished, in "
        f"{as_text(out)}",
        soft_wrap=True,
    )
    if flags.dry_run:
        for run, state in zip(runs, states, strict=True):
            console.print(f"{run.id}  {state:<8}  {_named(run)}", soft_wrap=True)
        return _done(flags, overview(runs), 0)
    with warnings_in_one_line():
        for run in runs:
            if state_of(run) == "finished":
                warn_if_factory_changed(run.directory, factory)
    if flags.slurm:
        return _submitted(flags, runs, out, factory, console)
    return _run(flags, runs, out, factory, console)


def _submitted(
    flags: SweepFlags, runs: Sequence[PlannedRun], out: Path, factory: Path | None, console: Console
) -> int:
    left = [run for run in runs if state_of(run) != "finished"]
    jobs = submit(left, out, factory, flags.slurm_options)
    for run in left:
        console.print(f"{run.id}  job {as_text(jobs[run.id])}  {_named(run)}", soft_wrap=True)
    console.print(f"submitted {len(jobs)} jobs; the same command with --dry-run shows their state")
    return _done(flags, overview(runs) | {"jobs": jobs}, 0)


def _run(
    flags: SweepFlags, runs: Sequence[PlannedRun], out: Path, factory: Path | None, console: Console
) -> int:
    count = 0

    def report(ended: Ended) -> None:
        nonlocal count
        count += 1
        code = f" (exit code {ended.exit_code}): {ended.error}" if ended.state == "failed" else ""
        console.print(
            f"{count}/{len(runs)}  {ended.run.id}  {_named(ended.run)}: "
            f"{ended.state}{as_text(code)}",
            soft_wrap=True,
        )

    try:
        ended = Children(flags.jobs, factory, report).run(runs)
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note("finished runs are kept, the others are saved; go on by the same command")
        raise
    found = overview(runs)
    failed = {e.run.id: {"exit_code": e.exit_code, "error": e.error} for e in ended
              if e.state == "failed"}  # fmt: skip
    found["failed"] = failed
    write_json(out / "sweep.json", found)
    console.print()
    console.print(_table(found["settings"]))
    if failed:
        console.print(f"{len(failed)} of {len(runs)} runs failed; see log.txt in their directories")
    console.print(f"written {as_text(out)}/sweep.json", soft_wrap=True)
    return _done(flags, found, _FAILED if failed else 0)


def _done(flags: SweepFlags, found: Mapping[str, Any], code: int) -> int:
    if flags.json:
        sys.stdout.write(to_json(found, indent=1) + "\n")
    return code


def _named(run: PlannedRun) -> str:
    return as_text(f"{words(run.setting)}, seed {run.config.seed}")


def _table(settings: Sequence[Mapping[str, Any]]) -> Table:
    """Columns in which there is something."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("setting", "runs", "evidence per datum", "layers", "held out", "best")
    rows = [_cells(entry) for entry in settings]
    columns = [(name, [row[i] for row in rows]) for i, name in enumerate(names)]
    for name, cells in columns:
        if any(cells):
            table.add_column(name, overflow="fold")  # a setting is told by all of its name
    filled = [cells for _, cells in columns if any(cells)]
    for row in zip(*filled, strict=True):
        table.add_row(*map(_lines, row))
    return table


def _cells(entry: Mapping[str, Any]) -> list[list[str]]:
    counts = f"{entry['finished']}/{entry['runs']}"
    if not entry["finished"]:
        return [[words(entry["setting"])], [counts], [], [], [], []]
    layers = [
        f"{layer} {', '.join(f'{verdict} {n}' for verdict, n in found.items())}"
        for layer, found in entry["verdicts"].items()
    ]
    best = entry["best"]
    return [
        [words(entry["setting"])],
        [counts],
        [_range(entry["log_marginal_likelihood_per_datum"])],
        layers,
        [f"{name} {_range(spread)}" for name, spread in entry["held_out"].items()],
        [f"seed {best['seed']}, {best['start']}"],
    ]


def _range(spread: Mapping[str, float]) -> str:
    if spread["lowest"] == spread["highest"]:
        return f"{spread['median']:.3f}"
    return f"{spread['median']:.3f} [{spread['lowest']:.3f}, {spread['highest']:.3f}]"


def _lines(lines: Sequence[str]) -> str:
    """Several lines of one cell."""
    return "\n".join(map(as_text, lines))
