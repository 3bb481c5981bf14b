"""The effective-dimension table for terminals."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from margeq.effective_dim import EffectiveDimension, PathRow
from margeq.report.text import as_text

__all__ = ["symmetry_table"]

_BAR = 7
_STYLES = {"selected": "bold green", "mixed": "yellow", "off": "dim"}


def symmetry_table(dimension: EffectiveDimension, title: str) -> Table:
    """A rich table with one row per layer and path; names are plain text."""
    table = Table(
        title=as_text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("layer", "path"):
        table.add_column(name)
    for name in ("parameters", "prior prec.", "effective", "eff./P", "relative"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("function share", no_wrap=True)
    table.add_column("verdict")
    for row in dimension.paths:
        table.add_row(*_cells(row), style=_STYLES.get(row.verdict, ""))
    return table


def _cells(row: PathRow) -> list[str]:
    return [
        as_text(row.layer),
        as_text(row.path.upper()),
        f"{row.parameters:,}",
        f"{row.prior_precision:.3g}",
        f"{row.effective:.1f}",
        f"{row.normalised:.1%}",
        f"{row.relative:.0%}" if row.path else "",
        _bar(row.function_share) if row.path else "",
        row.verdict,
    ]


def _bar(share: float) -> str:
    return f"{'█' * round(_BAR * share):<{_BAR}} {share:4.0%}"
