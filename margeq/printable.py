"""Text of others on a terminal: layers and files can be called anything."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, direction, half pairs, line ends


def printable(text: str) -> str:
    r"""The text with characters that would act instead of appear written as escapes.

    Returns:
        One line, such as ``\x1b[31mred`` for a name that would turn a terminal red.
    """
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _UNSEEN else c
        for c in text
    )
