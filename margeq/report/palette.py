"""One colour per path everywhere, readable by colour-blind people (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["REFLECTIONS", "ROTATIONS", "path_colours"]

ROTATIONS, REFLECTIONS = "#0072B2", "#E69F00"

_KNOWN = {"conv": "#0072B2", "fc": "#D55E00"}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def path_colours(paths: Iterable[str]) -> dict[str, str]:
    """A colour per path name; common names always get the same one."""
    names = list(dict.fromkeys(paths))
    others = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in names}
