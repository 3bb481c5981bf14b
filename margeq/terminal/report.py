"""The report of a run directory, from the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from margeq.callbacks import to_json
from margeq.flags import ReportFlags
from margeq.report.text import as_text
from margeq.runs.files import read_if_there, writing
from margeq.runs.layout import CONFIG
from margeq.runs.results import read_result
from margeq.terminal.console import open_console

__all__ = ["show_report"]


def show_report(flags: ReportFlags) -> None:
    """Write the report and say where it is.

    Raises:
        ConfigError: for a directory without a result, or one that cannot be written to.
    """
    directory, out = Path(flags.run), Path(flags.out or flags.run)
    stored = read_result(directory)
    # a wrong directory is told before figures, and torch with them, are imported
    from margeq.report.page import write_report

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    page = write_report(stored, out, read_if_there(directory / CONFIG))
    if flags.json:
        sys.stdout.write(to_json({"report": str(page)}, indent=1) + "\n")
        return
    console = open_console(flags.quiet, flags.json)
    console.print(f"written {as_text(page)}, *.png, *.svg", soft_wrap=True)
