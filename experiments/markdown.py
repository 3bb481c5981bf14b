"""Tables and numbers as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

__all__ = ["NOTHING", "mean_sd", "table"]

NOTHING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], n_text: int = 1) -> str:
    """A pipe table, its columns padded for reading; all but the first ``n_text`` are numbers."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * w if c < n_text else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
    return "\n".join(
        f"| {' | '.join(_pad(cell, w, c < n_text) for c, (cell, w) in columns)} |"
        for columns in (
            enumerate(zip(line, widths, strict=True)) for line in (lines[0], rule, *lines[1:])
        )
    )


def mean_sd(values: Sequence[float], digits: int) -> str:
    """``mean ± sd (n)``, or the value alone if there is one."""
    if not values:
        return NOTHING
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f} ({len(values)})"


def _pad(cell: str, width: int, is_text: bool) -> str:
    return cell.ljust(width) if is_text else cell.rjust(width)
