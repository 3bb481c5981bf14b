"""Figures of a result, from its plain data: evidence, parameters, precisions, filters, subsets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from margeq.pictures import MOST_PICTURES
from margeq.printable import printable
from margeq.report.palette import path_colours
from margeq.report.polar import subset_figure
from margeq.report.svg import INK
from margeq.report.words import kept_start
from margeq.subsets import LearnedSubset, gate_label

__all__ = ["FADE_SHARE", "PARTS", "Plate", "plates"]

PARTS = ("effective", "orders", "evidence", "precisions", "subsets", "filters")

FADE_SHARE = 0.1
_LEAST_EFFECTIVE = 0.01  # of an axis of orders of magnitude
_GREY = "#8a8a8a"
_WIDTH = 4.6  # inches: as wide as a phone
_LINE, _SIDE, _GAP = 0.27, 0.5, 0.06  # of pictures of weights
_MOST_LAYERS = 24
_LONGEST_NAME = 22

_Image = list[list[int]]


@dataclass(frozen=True)
class Plate:
    """A figure and what is said about it.

    Attributes:
        part: of the report, one of ``PARTS``.
        name: of its files.
        figure: itself.
        alt: for those who do not see it.
    """

    part: str
    name: str
    figure: Figure
    alt: str


def plates(plain: Mapping[str, Any]) -> Iterator[Plate]:
    """All figures of a result; to be called, and iterated, in :func:`margeq.report.svg.drawing`.

    Args:
        plain: as of :meth:`margeq.MargLikResult.to_dict`.

    Yields:
        Them, in reading order.
    """
    rows = [row for row in plain["effective_dimension"]["paths"] if row["path"]]
    colours = path_colours(row["path"] for row in rows)
    images = [_images(picture) for picture in plain["pictures"]]
    if rows:
        yield _bars(rows, colours, "effective", "effective parameters γ", "effective parameters")
        yield _bars(rows, colours, "share", "share of the function's variance", "shares")
        yield _orders(rows, colours)
    yield _starts(plain)
    yield _terms(plain)
    layers = list(dict.fromkeys(row["layer"] for row in rows))[:_MOST_LAYERS]
    for number, layer in enumerate(layers, 1):
        yield _precisions(plain, layer, number, colours)
    subsets = plain["effective_dimension"]["subsets"]
    for number, (name, subset) in enumerate(subsets.items(), 1):
        yield _subset(name, subset, number)
    seen = list(zip(plain["pictures"], images, strict=True))
    shown = list(dict.fromkeys(picture["layer"] for picture, _ in seen))[:_MOST_LAYERS]
    for number, layer in enumerate(shown, 1):
        yield _filters([pair for pair in seen if pair[0]["layer"] == layer], number)


# -- evidence ------------------------------------------------------------------------------------


def _starts(plain: Mapping[str, Any]) -> Plate:
    figure, axis = _panel(2.9)
    said = []
    for number, restart in enumerate(plain["restarts"]):
        updates = restart["history"]["updates"]
        values = [u["log_marginal_likelihood"] / plain["n_data"] for u in updates]
        # paths own the colours: starts differ by their dashes
        thin: dict[str, Any] = {"lw": 1.2, "color": _GREY, "ls": ("--", ":", "-.", "-")[number % 4]}
        style: dict[str, Any] = {"lw": 2.2, "color": INK} if restart["kept"] else thin
        kept = " (kept)" * restart["kept"]
        label = f"{_short(restart['start'])}{kept}"
        axis.plot([u["epoch"] for u in updates], values, label=label, marker=".", ms=4, **style)
        if values:
            said.append(f"{restart['start']}{kept} ends at {values[-1]:.3f}")
    _finish(figure, axis, "every start", "epoch", "log marginal likelihood\nper datum [nats]")
    alt = f"Log marginal likelihood per datum over the epochs: {'; '.join(said)}."
    return Plate("evidence", "evidence", figure, printable(alt))


def _terms(plain: Mapping[str, Any]) -> Plate:
    figure, axis = _panel(2.9)
    updates = kept_start(plain)["history"]["updates"]
    epochs = [u["epoch"] for u in updates]
    for key, label, style in (
        ("log_likelihood", "fit: log-likelihood", ("--", 1.5)),
        ("occam", "Occam term: price of the weights", (":", 1.5)),
        ("log_marginal_likelihood", "sum: log marginal likelihood", ("-", 2.2)),
    ):
        values = [u[key] / plain["n_data"] for u in updates]
        dash, width = style
        axis.plot(epochs, values, color=INK, label=label, marker=".", ms=4, ls=dash, lw=width)
    _finish(figure, axis, "kept start: fit and Occam term", "epoch", "per datum [nats]", columns=1)
    fit, occam = (updates[-1][key] / plain["n_data"] for key in ("log_likelihood", "occam"))
    alt = f"Fit and Occam term per datum over the epochs; at the end {fit:.3f} and {occam:.3f}."
    return Plate("evidence", "evidence-terms", figure, alt)


# -- effective parameters ------------------------------------------------------------------------


def _bars(
    rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], name: str, axis_label: str,
    title: str,
) -> Plate:  # fmt: skip
    key = {"effective": "effective", "share": "function_share"}[name]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axis = _panel(1.3 + 0.34 * len(layers))
    left = dict.fromkeys(layers, 0.0)
    labelled = set()
    for row in rows:
        path, at = row["path"], layers.index(row["layer"])
        # a label that begins with an underscore would be left out
        label = "" if path in labelled else f" {_short(path.upper())}"
        labelled.add(path)
        axis.barh(at, row[key], 0.62, left[row["layer"]], color=colours[path], label=label or None)
        left[row["layer"]] += row[key]
    axis.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    axis.invert_yaxis()
    axis.margins(x=0.03)
    if name == "share":
        axis.set_xlim(0.0, 1.0)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _finish(figure, axis, title, axis_label, "")
    form = "{:.1f}" if name == "effective" else "{:.0%}"
    said = "; ".join(f"{r['layer']} {r['path'].upper()} {form.format(r[key])}" for r in rows)
    return Plate("effective", name, figure, printable(f"Stacked bars, {axis_label}: {said}."))


def _orders(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Plate:
    """Points, as lengths mean nothing on a logarithmic axis; stacked bars hide what is small."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axis = _panel(1.3 + 0.34 * len(layers))
    for path, colour in colours.items():
        seen = [row for row in rows if row["path"] == path and row["effective"] >= _LEAST_EFFECTIVE]
        places = [layers.index(row["layer"]) for row in seen]
        values = [row["effective"] for row in seen]
        axis.plot(values, places, "o", ms=6, color=colour, label=f" {_short(path.upper())}")
    axis.set_xscale("log")
    axis.set_xlim(_LEAST_EFFECTIVE / 2, 2.0 * max([1.0, *(row["effective"] for row in rows)]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    axis.set_ylim(len(layers) - 0.5, -0.5)
    _finish(figure, axis, "effective parameters, orders of magnitude", "effective parameters γ", "")
    said = "; ".join(f"{r['layer']} {r['path'].upper()} {r['effective']:.2g}" for r in rows)
    alt = f"Points on a logarithmic axis, effective parameters γ from 0.01: {said}."
    return Plate("orders", "effective-log", figure, printable(alt))


# -- precisions ----------------------------------------------------------------------------------


def _precisions(
    plain: Mapping[str, Any], layer: str, number: int, colours: Mapping[str, str]
) -> Plate:
    figure, axis = _panel(3.0)
    history = kept_start(plain)["history"]
    updates, said = history["updates"], []
    epochs = [u["epoch"] for u in updates]
    for path in updates[0]["function_share"].get(layer, {}):
        prefix = f"{layer}.paths.{path}." if layer else f"paths.{path}."
        on = [u["function_share"][layer][path] > 0 for u in updates]
        weights = [
            name for name in plain["prior_groups"]
            if name.startswith(prefix) and not name.rpartition(".")[2].startswith("bias")
        ]  # fmt: skip
        for dash, name in zip(("-", "--", ":", "-.") * len(weights), weights, strict=False):
            group = plain["prior_groups"][name]
            values = [
                u["prior_precision"][group] if is_on else math.nan
                for u, is_on in zip(updates, on, strict=True)
            ]
            label = f" {_short(f'{path.upper()} {name.removeprefix(prefix)}')}"
            axis.semilogy(
                epochs, values, color=colours[path], ls=dash, label=label, marker=".", ms=4
            )
        faded = _fading_epoch(updates, layer, path)
        if faded is not None:
            label = f" {_short(path.upper())} below {FADE_SHARE:.0%}"
            axis.axvline(faded, color=colours[path], ls=(0, (1, 3)), lw=1.4, label=label)
            said.append(f"{path.upper()} falls below {FADE_SHARE:.0%} at epoch {faded}")
        label = f" {_short(path.upper())} switched off"
        for switch in history["switches"]:
            if (switch["layer"], switch["path"], switch["to"]) == (layer, path, "off"):
                axis.axvline(switch["epoch"], color=colours[path], lw=1.4, label=label)
                said.append(f"{path.upper()} is switched off at epoch {switch['epoch']}")
                label = None  # said once, also of a path that was tried again
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(1.0, 0.5)))
    _finish(figure, axis, _short(layer) or "model", "epoch", "prior precision\n[1/weight²]")
    alt = f"Prior precisions of the weights of {layer} over the epochs. {'; '.join(said)}"
    return Plate("precisions", f"precisions-{number}", figure, printable(alt).strip())


def _fading_epoch(updates: Sequence[Mapping[str, Any]], layer: str, path: str) -> int | None:
    """First update after which the path stays below a tenth of the function variance."""
    epoch = None
    for update in reversed(updates):
        if update["function_share"][layer][path] >= FADE_SHARE:
            return epoch
        epoch = update["epoch"]
    return epoch


# -- subsets and filters -------------------------------------------------------------------------


def _subset(name: str, plain: Mapping[str, Any], number: int) -> Plate:
    subset = LearnedSubset(plain["degrees"], plain["mirror"], plain["n_rotations"], None)
    figure = subset_figure({printable(name): subset})
    assert figure is not None
    alt = printable(f"{gate_label(name)}: {subset}.")
    return Plate("subsets", f"subset-{number}", figure, alt)


def _filters(pictures: Sequence[tuple[Mapping[str, Any], Sequence[_Image]]], number: int) -> Plate:
    """A row of pictures per path, under what they are."""
    height = (_LINE + _SIDE + _GAP) * len(pictures)
    figure, said = Figure(figsize=(_WIDTH, height)), []
    for row, (picture, images) in enumerate(pictures):
        top = height - row * (_LINE + _SIDE + _GAP) - _LINE
        name = _short(" ".join(filter(None, (picture["layer"], picture["path"].upper()))))
        note = f"largest |weight| {picture['largest']:.2g}" if picture["largest"] else "all zero"
        said.append(f"{name}: {picture['kind']}, {note}")
        figure.text(_GAP / _WIDTH, (top + 0.05) / height, said[-1])
        for place, image in enumerate(images):
            left = _GAP + place * (_SIDE + _GAP)
            box = (left / _WIDTH, (top - _SIDE) / height, _SIDE / _WIDTH, _SIDE / height)
            axis = figure.add_axes(box)
            axis.set_axis_off()
            axis.imshow(image, cmap="RdBu_r", vmin=1, vmax=255, interpolation="none")
    alt = f"Pictures of weights. {'; '.join(said)}."
    return Plate("filters", f"filters-{number}", figure, printable(alt))


def _images(picture: Mapping[str, Any]) -> list[_Image]:
    """Levels from 1 to 255, row by row."""
    (height, width), found = picture["size"], []
    for values in picture["values"][:MOST_PICTURES]:
        levels = list(bytes.fromhex(values))
        if len(levels) != height * width:
            raise ValueError(f"a picture of {height} x {width} pixels with {len(levels)} values")
        found.append([levels[i * width : (i + 1) * width] for i in range(height)])
    return found


# -- style ---------------------------------------------------------------------------------------


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axis: Axes, title: str, x: str, y: str, columns: int = 2) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if x == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, color=_GREY)
    axis.set_axisbelow(True)
    if axis.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "outside lower left", "ncols": columns}
        figure.legend(fontsize=8, frameon=False, handlelength=2.6, **place)


def _short(name: str) -> str:
    """A name that fits, the same at both ends."""
    shown = printable(name)
    if len(shown) <= _LONGEST_NAME:
        return shown
    half = (_LONGEST_NAME - 1) // 2
    return f"{shown[:half]}…{shown[-half:]}"
