"""What a layer chose, in words, from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["verdicts"]


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    """Layer -> ``CONV``, or ``mixed (CONV 60%, FC 40%)``: honest about mixtures.

    Args:
        result: as of :meth:`margeq.MargLikResult.to_dict`.

    Returns:
        A line per layer with candidate paths.
    """
    table, found = result["effective_dimension"], {}
    for layer in table["selected"]:
        rows = [row for row in table["paths"] if row["layer"] == layer]
        chosen = [row["path"].upper() for row in rows if row["verdict"] == "selected"]
        on = [
            f"{row['path'].upper()} {row['function_share']:.0%}"
            for row in rows
            if row["verdict"] != "off"
        ]
        found[layer] = chosen[0] if chosen else f"mixed ({', '.join(on)})"
    return found
