"""Finished results in directories, as plain data; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from margeq.errors import ConfigError
from margeq.runs.files import read_table
from margeq.runs.layout import CONFIG, RESULT

__all__ = ["REPORT_DATA", "read_result", "results_of"]

REPORT_DATA = "report.json"
"""Beside the report of a result that has no run directory."""


def read_result(directory: Path) -> dict[str, Any]:
    """What a directory holds about a finished run.

    Args:
        directory: of ``margeq run`` or ``margeq demo``, or of :meth:`margeq.MargLikResult.report`.

    Returns:
        The content of ``result.json`` or ``report.json``.

    Raises:
        ConfigError: if there is none.
    """
    for name in (RESULT, REPORT_DATA):
        if (directory / name).is_file():
            return read_table(directory / name)
    if (directory / CONFIG).exists():
        raise ConfigError(
            f"{directory} is not finished: there is no {RESULT} in it; go on with: margeq resume "
            f"{directory}"
        )
    raise ConfigError(f"{directory} is no run directory: there is no {RESULT} in it")


def results_of(stored: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each result in it, by its question; a single one by no name."""
    return dict(stored["questions"]) if "questions" in stored else {"": stored}
