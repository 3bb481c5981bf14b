"""Figures of the experiment on rotated MNIST (Lengyel & van Gemert 2021, figs. 1 to 3).

Run with ``python -m experiments.group_figures`` once the records exist: the curves and the
redundancy are read from them; for the filters one P4CNN is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.group_presets import ROTMNIST, PlainSettings
from experiments.group_tables import error
from experiments.plain_training import fitted
from experiments.presets import PresetName
from experiments.records import RESULTS, Cell, read_records
from experiments.redundancy import BINS, first_component_ratios
from experiments.rotmnist import EXPERIMENT, kind_and_width, n_pictures
from margeq.layers import GroupConv2d
from margeq.report.palette import path_colours

__all__ = ["FigureOptions", "curves_figure", "filters_figure", "redundancy_figure", "save_figures"]

Record = Mapping[str, Any]

_GREY = "#777777"
_BEFORE, _AFTER = "#56B4E9", "#D55E00"
_KINDS = ("z2", "p4", "g-p4", "gc-p4", "c-z2")
_NAMES = {
    "z2": "Z2CNN", "p4": "P4CNN", "g-p4": "g-P4CNN", "gc-p4": "gc-P4CNN", "c-z2": "c-Z2CNN",
}  # fmt: skip
_APART = 1.2  # labels of an axis, at least
_SHOWN_LAYER = "conv3"
_EXAMPLES = 3  # of the pairs of channels that are most and least redundant


@dataclass(frozen=True)
class FigureOptions:
    """Draw the figures of one preset's records, beside them."""

    preset: PresetName = "cpu"
    """Whose records to show."""
    results: Path = RESULTS
    """Where the records are."""
    data_dir: str = ""
    """Folder with the data; the environment variable MARGEQ_DATA by default."""
    filters: bool = True
    """Whether to train a network anew and show its filters."""


def save_figures(options: FigureOptions) -> list[Path]:
    """Write all figures as PNG files.

    Returns:
        The files.
    """
    settings = ROTMNIST[options.preset]
    records = list(read_records(options.results, "rotmnist", options.preset))
    figures = {
        "curves": curves_figure(records, settings),
        "redundancy": redundancy_figure(records, settings),
    }
    if options.filters:
        cell = Cell("rotmnist", options.preset, settings.tasks[0], "p4-w10", "plain", 0)
        task = EXPERIMENT.load(cell, settings, options.data_dir)
        model, _ = fitted(EXPERIMENT, cell, settings, task)
        figures["filters"] = filters_figure(model, task.test_images[:1])
    written = []
    for name, figure in figures.items():
        path = options.results / "rotmnist" / options.preset / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        written.append(path)
    return written


def curves_figure(records: Sequence[Record], settings: PlainSettings) -> Figure:
    """Test error against the number of training pictures, and against the size of the network."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    main = settings.tasks[0]
    for model in settings.models:
        kind, width = kind_and_width(model)
        found = [r for r in records if r["model"] == model and ("+" in main) == ("+" in r["task"])]
        points = {n_pictures(r["task"]): [] for r in found}
        for record in found:
            points[n_pictures(record["task"])].append(error(record))
        _curve(left, points, kind, f"{_NAMES[kind]}, width {width}")
    for kind in dict.fromkeys(kind_and_width(model)[0] for model in settings.models):
        found = [r for r in records if r["task"] == main and kind_and_width(r["model"])[0] == kind]
        points = {r["results"]["parameters"]: [] for r in found}
        for record in found:
            points[record["results"]["parameters"]].append(error(record))
        _curve(right, points, kind, _NAMES[kind])
    for axis in (left, right):
        _logarithmic(axis)
    _label(left, "data efficiency", "training pictures", "test error %")
    _label(right, f"{n_pictures(main):,} training pictures", "parameters", "test error %")
    return figure


def redundancy_figure(records: Sequence[Record], settings: PlainSettings) -> Figure:
    """Share of variance over the group in the first component, before and after training."""
    found = [
        r["results"]["first_component"]
        for r in records
        if r["model"] == "p4-w10" and r["task"] == settings.tasks[0]
    ]
    layers = [row["layer"] for row in found[0]["before"]] if found else []
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    edges = np.linspace(0, 1, BINS + 1)
    for number, (axis, layer) in enumerate(zip(grid.flat, layers, strict=False)):
        for when, colour in (("before", _BEFORE), ("after", _AFTER)):
            counts = np.sum([f[when][number]["histogram"] for f in found], axis=0)
            mean = fmean(f[when][number]["mean"] for f in found)
            axis.stairs(counts / counts.sum(), edges, fill=True, color=colour, alpha=0.45)
            axis.axvline(mean, color=colour, lw=1.5, label=f"{when}, mean {mean:.2f}")
        below, beside = number >= 3, number % 3 == 0
        x = "variance in the first component" if below else ""
        _label(axis, layer, x, "share of pairs" if beside else "")
        axis.set_xlim(0.2, 1)
    return figure


def filters_figure(model: nn.Module, image: Tensor) -> Figure:
    """Filters of one layer, and the maps of one picture behind it, over the group.

    Returns:
        Rows are pairs of channels, the most and the least redundant ones; columns are elements.
    """
    layer = cast(GroupConv2d, model.get_submodule(_SHOWN_LAYER))
    ratios = first_component_ratios(layer.weight)
    ranks = ratios.flatten().argsort(descending=True).tolist()
    chosen = [*ranks[:_EXAMPLES], *ranks[-_EXAMPLES:]]
    pairs = [divmod(rank, ratios.shape[1]) for rank in chosen]
    maps = _maps_before(model, _SHOWN_LAYER, image)
    figure = Figure(figsize=(8.4, 1.0 * len(pairs) + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    half = f"the {_EXAMPLES} most and the {_EXAMPLES} least redundant"
    left.suptitle(f"filters of {_SHOWN_LAYER} over the group,\n{half}", fontsize=10)
    right.suptitle("what they look at: maps of one picture\nover the group", fontsize=10)
    elements = layer.group.order
    filters = left.subplots(len(pairs), elements, squeeze=False)
    pictures = right.subplots(len(pairs), elements, squeeze=False)
    for (out, into), row, beside in zip(pairs, filters, pictures, strict=True):
        kernels = layer.weight[out, into].detach().unflatten(-1, layer.window.kernel_size)
        _strip(row, kernels, f"channel {into} to {out}, ratio {ratios[out, into]:.2f}", "RdBu_r")
        _strip(beside, maps[into], f"channel {into}", "viridis")
    return figure


def _strip(row: Sequence[Axes], images: Tensor, title: str, colours: str) -> None:
    """One picture for each element, on one scale."""
    limit = float(images.abs().max()) or 1.0
    lowest = -limit if colours == "RdBu_r" else 0.0
    for axis, image in zip(row, images, strict=True):
        axis.set_axis_off()
        axis.imshow(image.numpy(), cmap=colours, vmin=lowest, vmax=limit)
    row[0].set_title(title, loc="left", fontsize=8)


@torch.no_grad()
def _maps_before(model: nn.Module, name: str, image: Tensor) -> Tensor:
    """What a layer of a sequence gets for one picture, ``[c, g, y, x]``."""
    x = image
    for child, module in model.named_children():
        if child == name:
            break
        x = module(x)
    return x[0]


def _curve(axis: Axes, points: Mapping[int, Sequence[float]], kind: str, label: str) -> None:
    """Means, with all runs as dots."""
    colour = path_colours(_KINDS)[kind]
    numbers = sorted(points)
    axis.plot(numbers, [fmean(points[n]) for n in numbers], color=colour, label=label, lw=1.8)
    runs = [(n, value) for n in numbers for value in points[n]]
    axis.plot([n for n, _ in runs], [value for _, value in runs], ".", color=colour, ms=7)


def _logarithmic(axis: Axes) -> None:
    """Numbers on a logarithmic axis, written out where something was measured."""
    measured = {round(float(x)) for line in axis.get_lines() for x in np.asarray(line.get_xdata())}
    axis.set_xscale("log")
    ticks: list[int] = []
    for number in sorted(measured):
        ticks += [number] if not ticks or number > _APART * ticks[-1] else []
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, color=_GREY)
    if axis.has_data():
        axis.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    for written in save_figures(tyro.cli(FigureOptions, description=__doc__)):
        print(written)
