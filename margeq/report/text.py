"""Names on a terminal."""

from __future__ import annotations

from rich.markup import escape

from margeq.printable import printable

__all__ = ["as_text"]


def as_text(text: object) -> str:
    """Names of layers, tasks and files: neither markup nor control sequences work."""
    return escape(printable(str(text)))
