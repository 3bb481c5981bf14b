"""What the gates of a model leave of their groups, drawn around a circle."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.projections.polar import PolarAxes

from margeq.report.palette import REFLECTIONS, ROTATIONS
from margeq.subsets import LearnedSubset, Sector, gate_label

__all__ = ["subset_figure"]

_PER_ROW = 6
_EMPTY = "#EDEDED"
_OUTER, _INNER = (0.58, 1.0), (0.12, 0.5)
_GAP, _MARK = 2.5, 5.0
"""Degrees between two cells, and of the mark of an element that is alone."""


def subset_figure(subsets: Mapping[str, LearnedSubset]) -> Figure | None:
    """One circle per gate: how much of each rotation it leaves, and of each reflection inside.

    The identity is at the top, angles grow counter-clockwise; a bar that fills its ring has weight
    1. Reflections are at the rotation that follows the mirror.

    Args:
        subsets: by name of the gate, as :func:`margeq.subsets.learned_subsets` finds them.

    Returns:
        A figure with six circles per row, or ``None`` without gates.
    """
    if not subsets:
        return None
    columns, rows = min(len(subsets), _PER_ROW), math.ceil(len(subsets) / _PER_ROW)
    # the layout overlooks what stands below a circle
    spaced = ConstrainedLayoutEngine(hspace=0.12)
    figure = Figure(figsize=(2.7 * columns, 3.4 * rows + 0.4), layout=spaced)
    for number, (name, subset) in enumerate(subsets.items(), 1):
        axis = figure.add_subplot(rows, columns, number, projection="polar")
        assert isinstance(axis, PolarAxes)
        _draw(axis, subset)
        axis.set_title(gate_label(name), fontsize=10)
        axis.set_xlabel(str(subset).replace(", ", "\n"), fontsize=8, labelpad=6)
    if any(subset.mirror is not None for subset in subsets.values()):
        handles = [Patch(color=ROTATIONS), Patch(color=REFLECTIONS)]
        labels = ["rotations", "reflections"]
        place = {"loc": "outside lower center", "ncols": 2}
        figure.legend(handles, labels, fontsize=8, frameon=False, **place)
    return figure


def _draw(axis: PolarAxes, subset: LearnedSubset) -> None:
    """Rings of rotations and, in a group that has them, of reflections."""
    axis.set_theta_zero_location("N")
    axis.set_ylim(0.0, 1.0)
    axis.set_yticks([])
    axis.set_xticks([math.radians(degrees) for degrees in (0, 90, 180, 270)])
    axis.set_xticklabels(["0°", "90°", "±180°", "−90°"], fontsize=7)
    axis.tick_params(pad=-1)
    axis.grid(False)
    axis.spines["polar"].set_visible(False)
    rings = [(_OUTER, ROTATIONS, 1.0)]
    if subset.mirror is not None:
        rings.append((_INNER, REFLECTIONS, subset.mirror))
    for ring, colour, share in rings:
        for cell in _cells(subset):
            _bar(axis, cell, ring, 1.0, _EMPTY)
        for sector in _filled(subset):
            _bar(axis, sector, ring, share * sector.weight, colour)


def _cells(subset: LearnedSubset) -> list[Sector]:
    """What a ring has room for: a cell per rotation, or the circle without a seam."""
    if (subset.n_rotations or 1) == 1:
        return [Sector(0.0, 360.0, 1.0)]
    return [s._replace(extent=s.extent - min(_GAP, 0.25 * s.extent)) for s in subset.sectors]


def _filled(subset: LearnedSubset) -> list[Sector]:
    """What is left of it; an element that is alone gets a mark."""
    if subset.n_rotations == 1:
        return [Sector(0.0, _MARK, 1.0)]
    if subset.n_rotations is None:
        return [s._replace(extent=max(s.extent, _MARK)) for s in subset.sectors]
    return _cells(subset)


def _bar(
    axis: PolarAxes, sector: Sector, ring: tuple[float, float], weight: float, colour: str
) -> None:
    """A sector of a ring, as thick as it weighs."""
    low, high = ring
    angle, extent = math.radians(sector.centre), math.radians(sector.extent)
    axis.bar(angle, weight * (high - low), extent, low, color=colour, lw=0)
