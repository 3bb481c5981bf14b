"""A result, from its plain data: table, verdicts, evidence, diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from margeq.effective_dim import EffectiveDimension, PathRow
from margeq.report.table import symmetry_table
from margeq.report.text import as_text
from margeq.report.words import noise_line
from margeq.runs.verdicts import verdicts

__all__ = ["show_answer"]


def show_answer(
    console: Console, plain: Mapping[str, Any], title: str, checks: Sequence[str] = ()
) -> None:
    """Print what a run found.

    Args:
        console: where to.
        plain: as of :meth:`margeq.MargLikResult.to_dict`.
        title: of the table.
        checks: lines about held-out data.
    """
    table = plain["effective_dimension"]
    rows = tuple(_row(row) for row in table["paths"])
    console.print()
    console.print(symmetry_table(EffectiveDimension(rows, ()), title))
    found = [f"{layer}: {words}" for layer, words in verdicts(plain).items()]
    _say(console, "verdict", found)
    _say(console, "gates", table["subset_lines"])
    tries = "   ".join(_try(restart, plain["n_data"]) for restart in plain["restarts"])
    _say(console, "evidence", [f"log marginal likelihood per datum: {tries}"])
    noise = noise_line(plain)
    _say(console, "noise", [noise] if noise else [])
    d = plain["diagnostics"]
    slope = "unknown" if d["slope"] is None else f"{d['slope']:.2g}"
    captured = "unknown" if d["captured_trace"] is None else f"{d['captured_trace']:.2%}"
    _say(
        console,
        "diagnostics",
        [
            f"{plain['message']} (slope {slope})",
            f"clamped eigenvalues {d['clamped_eigenvalues']} · precisions at bounds "
            f"{len(d['at_bounds'])} · trace captured {captured}",
        ],
    )
    _say(console, "check", checks)
    console.print()


def _say(console: Console, name: str, lines: Sequence[str]) -> None:
    """Lines under one name, which stands before the first one."""
    for number, line in enumerate(lines):
        console.print(f"{'' if number else name:<12} {as_text(line)}")


def _row(plain: Mapping[str, Any]) -> PathRow:
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in plain.items()}
    return PathRow(**values)


def _try(restart: Mapping[str, Any], n_data: int) -> str:
    value = restart["log_marginal_likelihood"]
    if value is None:
        return f"{restart['start']} failed"
    return f"{restart['start']} {value / n_data:.3f}{' ← kept' * restart['kept']}"
