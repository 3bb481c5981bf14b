"""Switching paths off for speed, and probing them again.

The decision goes by the share of function variance, never by the precision alone: MacKay's fixed
point cannot revive weights at zero, so an off path comes back now and then near zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NEGLIGIBLE_SHARE", "PathSwitch"]

NEGLIGIBLE_SHARE = 1e-3
_PATIENCE = 2
_FIRST_PROBE = 4


class PathSwitch:
    """Decides, update by update, which paths to switch off and which to probe.

    A path is switched off after two updates in a row below a thousandth of its layer's function
    variance, and probed after 4, then 8, 16, ... further updates, but not in the last third of
    the run, where a probe could not settle any more.

    Args:
        n_updates: number of updates of the whole run.
    """

    def __init__(self, n_updates: int) -> None:
        self._n_updates = n_updates
        self._time = 0
        self._low: dict[tuple[str, str], int] = {}
        self._wait: dict[tuple[str, str], int] = {}
        self._probe_at: dict[tuple[str, str], int] = {}

    def decide(
        self, by_share: Mapping[str, Mapping[str, float]], active: Mapping[str, tuple[str, ...]]
    ) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Paths to switch off now and paths to probe now, as (layer, path)."""
        self._time += 1
        off = [key for key in self._candidates(by_share, active) if self._is_done(key)]
        probe = [key for key, at in self._probe_at.items() if at == self._time]
        for key in off:
            self._low.pop(key, None)
            self._wait[key] = 2 * self._wait.get(key, _FIRST_PROBE // 2)
            at = self._time + self._wait[key]
            if 3 * at <= 2 * self._n_updates:
                self._probe_at[key] = at
        for key in probe:
            self._probe_at.pop(key)
        return off, probe

    def state_dict(self) -> dict[str, Any]:
        """Counts so far, by (layer, path)."""
        return {"time": self._time, "low": self._low, "wait": self._wait, "probe": self._probe_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._time = state["time"]
        self._low, self._wait = dict(state["low"]), dict(state["wait"])
        self._probe_at = dict(state["probe"])

    def _candidates(
        self, by_share: Mapping[str, Mapping[str, float]], active: Mapping[str, tuple[str, ...]]
    ) -> list[tuple[str, str]]:
        found = []
        for layer, names in active.items():
            if not sum(by_share[layer].values()):
                continue  # a layer whose output does not vary says nothing about its paths
            # the largest path of a layer always stays
            keep = max(names, key=lambda name, of=by_share[layer]: of[name])
            found += [(layer, name) for name in names if name != keep]
        for key in list(self._low):
            if key not in found:
                self._low.pop(key)
        for key in found:
            low = by_share[key[0]][key[1]] < NEGLIGIBLE_SHARE
            self._low[key] = self._low.get(key, 0) + 1 if low else 0
        return found

    def _is_done(self, key: tuple[str, str]) -> bool:
        return self._low[key] >= _PATIENCE
