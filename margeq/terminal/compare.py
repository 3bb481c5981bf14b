"""A comparison of runs on a terminal; without torch."""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.table import Table

from margeq.callbacks import to_json
from margeq.comparison import Comparison, compare
from margeq.errors import ConfigError
from margeq.flags import CompareFlags
from margeq.report.text import as_text
from margeq.terminal.console import open_console

__all__ = ["show_comparison"]


def show_comparison(flags: CompareFlags) -> None:
    """Print the table.

    Raises:
        ConfigError: for fewer than two runs, or runs that do not compare.
    """
    if len(flags.runs) < 2:
        raise ConfigError("margeq compare needs two run directories or more")
    found = compare(list(flags.runs))
    if flags.json:
        sys.stdout.write(to_json(found.to_dict(), indent=1) + "\n")
        return
    console = open_console(flags.quiet, flags.json)
    console.print(_table(found))
    for line in found.notes:
        console.print(as_text(line), soft_wrap=True)


def _table(found: Comparison) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    header, *rows = found.cells()
    for number, name in enumerate(header):
        # a run is told by all of its name
        table.add_column(as_text(name), overflow="fold", justify="left" if number == 0 else "right")
    for number, row in enumerate(rows):
        table.add_row(*map(as_text, row), style="" if number else "bold")
    return table
