"""Figures as SVG: in a page, where ink is the colour of its text, and as files of their own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["EMPTY", "INK", "as_svg", "drawing", "inline_svg", "save_figure"]

INK = "#1b1b1d"
"""Stands for the colour of text, which in a page is that of the page."""
EMPTY = "#ededed"
"""Stands for room that is left, which in a page depends on its background."""

_DOTS_PER_INCH = 192  # twice that of a screen
_STYLE: Any = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    # names of layers are no formulas
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # letters stay letters: small, searchable, and read aloud
    "svg.fonttype": "none",
    "svg.hashsalt": "margeq",
}


@contextmanager
def drawing() -> Iterator[None]:
    """A context in which figures are made and saved, with one style."""
    with rc_context(_STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes, in PNG only
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def as_svg(figure: Figure) -> str:
    """The figure on no background, as text that begins with ``<svg``."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # everything has its place now, also for the next one
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # hundredths of a point are enough for places; texts and scales are left as they are
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def inline_svg(svg: str, prefix: str) -> str:
    """The SVG as part of a page: its ids its own, without namespaces, in the colours of the page.

    Args:
        svg: from :func:`as_svg`.
        prefix: of the ids that are left, unique in the page.

    Returns:
        An element for readers who see; the page describes it to the others.
    """
    used = set(re.findall(r"(?:href=\"|url\()#([\w.-]+)", svg))
    svg = re.sub(
        r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg
    )
    svg = re.sub(r"(href=\"|url\()#", rf"\1#{prefix}-", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'style="[^"]*"', _in_page_colours, svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _in_page_colours(style: re.Match[str]) -> str:
    """Only in styles: a layer may be called like a colour."""
    return style[0].replace(INK, "currentColor").replace(EMPTY, "var(--empty)")


def save_figure(figure: Figure, svg: str, stem: Path) -> list[Path]:
    """Write PNG and SVG, dark on white.

    Args:
        figure: to draw.
        svg: the same, from :func:`as_svg`.
        stem: path without suffix.

    Returns:
        The two files.
    """
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    figure.savefig(paths[0], dpi=_DOTS_PER_INCH, facecolor="white")
    end = svg.index(">") + 1
    sheet = '\n<rect width="100%" height="100%" fill="#ffffff"/>'
    paths[1].write_text(svg[:end] + sheet + svg[end:] + "\n", encoding="utf-8")
    return paths
