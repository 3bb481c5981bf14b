"""Figures of a result: evidence, precisions, effective parameters, filters, subsets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from margeq.effective_dim import PathRow
from margeq.paths import path_prefixes
from margeq.report.palette import path_colours
from margeq.report.polar import subset_figure
from margeq.training.result import MargLikResult

__all__ = ["save_figures"]

_GREY = "#777777"
_FADE_SHARE = 0.1


def save_figures(result: MargLikResult, directory: Path, prefix: str = "") -> list[Path]:
    """Write evidence, precisions, effective parameters, filters and subsets as PNG files.

    Args:
        result: a finished run.
        directory: existing folder.
        prefix: of the file names.

    Returns:
        The files, in reading order.
    """
    figures = {
        "evidence": evidence_figure(result),
        "precisions": precision_figure(result),
        "effective": effective_figure(result),
        "filters": filter_figure(result.model),
        "subsets": subset_figure(result.learned_subsets),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = directory / f"{prefix}{name}.png"
            figure.savefig(path, dpi=160, bbox_inches="tight")
            written.append(path)
    return written


def evidence_figure(result: MargLikResult) -> Figure:
    """Log marginal likelihood of every restart, and fit and Occam term of the kept one."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, restart in enumerate(result.restarts):
        epochs = [u.epoch for u in restart.history.updates]
        values = [u.log_marginal_likelihood / result.n_data for u in restart.history.updates]
        # paths own the colours: restarts differ by their dashes
        thin = {"lw": 1.2, "color": _GREY, "ls": ("--", ":", "-.", "-")[number % 4]}
        style = {"lw": 2.2, "color": "black"} if restart.kept else thin
        label = f"{restart.start}{' (kept)' if restart.kept else ''}"
        left.plot(epochs, values, label=label, marker=".", **style)
    _label(left, "every restart", "epoch", "log marginal likelihood\nper datum [nats]")
    updates = result.history.updates
    epochs = [u.epoch for u in updates]
    fit = [u.log_likelihood / result.n_data for u in updates]
    occam = [u.occam / result.n_data for u in updates]
    total = [u.log_marginal_likelihood / result.n_data for u in updates]
    right.plot(epochs, total, color="black", lw=2.2, label="log marginal likelihood")
    right.plot(epochs, fit, color="#009E73", label="fit: log-likelihood")
    right.plot(epochs, occam, color="#CC79A7", label="Occam term: price of the weights")
    _label(right, "kept run: fit + Occam term", "epoch", "per datum [nats]")
    return figure


def precision_figure(result: MargLikResult) -> Figure | None:
    """Prior precisions of the path weights while they are on; dotted where a path fades away."""
    layers = path_prefixes(result.model)
    if not layers:
        return None
    figure = Figure(figsize=(3.1 * len(layers), 3.2), layout="constrained")
    axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    colours = path_colours(path for named in layers.values() for path in named)
    updates = result.history.updates
    epochs = [u.epoch for u in updates]
    for axis, (layer, named) in zip(axes, layers.items(), strict=True):
        for path, prefix in named.items():
            tensors = [t for t in _weights(result, prefix) if t in result.prior.groups]
            for number, tensor in enumerate(tensors):
                group = result.prior.groups[tensor]
                values = [
                    u.prior_precision[group] if u.function_share[layer][path] > 0 else math.nan
                    for u in updates
                ]
                dash = ("-", "--", ":")[number % 3]
                label = f"{path} {tensor.removeprefix(prefix).strip('.')}"
                axis.semilogy(epochs, values, color=colours[path], ls=dash, label=label)
            fade = _fading_epoch(result, layer, path)
            if fade is not None:
                label = f"{path} below {_FADE_SHARE:.0%} of the function"
                axis.axvline(fade, color=colours[path], ls=":", lw=1, label=label)
        _label(axis, layer, "epoch", "prior precision [1/weight²]" if axis is axes[0] else "")
    return figure


def effective_figure(result: MargLikResult) -> Figure | None:
    """Effective parameters and share of function variance per layer and path."""
    rows = [row for row in result.effective_dimension().paths if row.path]
    if not rows:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _stacked(left, rows, {(r.layer, r.path): r.effective for r in rows})
    _label(left, "effective parameters", "", "γ")
    _stacked(right, rows, {(r.layer, r.path): r.function_share for r in rows})
    _label(right, "share of function variance", "", "share")
    right.set_ylim(0, 1.25)
    return figure


def filter_figure(model: nn.Module) -> Figure | None:
    """What the first path sum looks at: kernels, and rows of induced maps as pictures."""
    layers = path_prefixes(model)
    if not layers:
        return None
    named = next(iter(layers.values()))
    pictures = {path: _pictures(model.get_submodule(prefix)) for path, prefix in named.items()}
    shown = {path: picture for path, picture in pictures.items() if picture is not None}
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.35 * len(shown) + 0.4), layout="constrained")
    grid = figure.subplots(len(shown), 8, squeeze=False)
    for row, (path, picture) in zip(grid, shown.items(), strict=True):
        limit = float(picture.abs().max())
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, picture, strict=False):
            axis.imshow(image.numpy(), cmap="RdBu_r", vmin=-limit or -1.0, vmax=limit or 1.0)
        note = f"largest |weight| {limit:.2g}" if limit else "off"
        row[0].set_title(f"{path}  ({note})", loc="left", fontsize=9)
    return figure


def _pictures(path: nn.Module) -> Tensor | None:
    """Up to eight pictures ``[m, h, w]`` of a path's weights, channel 0 of the input."""
    for module in path.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.detach()[:8, 0].cpu()
        induced = getattr(module, "induced_weight", None)
        shape = getattr(module, "in_shape", ())
        if induced is not None and len(shape) == 2:
            rows = induced().detach()
            # evenly spaced output elements, so that several channels and places are shown
            chosen = torch.linspace(0, len(rows) - 1, 8).round().long()
            return rows[chosen, : shape.numel()].reshape(-1, *shape).cpu()
    return None


def _stacked(axis: Axes, rows: list[PathRow], values: Mapping[tuple[str, str], float]) -> None:
    layers = list(dict.fromkeys(row.layer for row in rows))
    paths = list(dict.fromkeys(row.path for row in rows))
    colours = path_colours(paths)
    bottom = [0.0] * len(layers)
    for path in paths:
        heights = [values.get((layer, path), 0.0) for layer in layers]
        axis.bar(layers, heights, bottom=bottom, label=path, color=colours[path], width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]


def _weights(result: MargLikResult, prefix: str) -> list[str]:
    names = [name for name in result.spectrum.square_norms if name.startswith(f"{prefix}.")]
    return [name for name in names if not name.rpartition(".")[2].startswith("bias")]


def _fading_epoch(result: MargLikResult, layer: str, path: str) -> int | None:
    """First update after which the path stays below a tenth of the function variance."""
    epoch = None
    for update in reversed(result.history.updates):
        if update.function_share[layer][path] >= _FADE_SHARE:
            return epoch
        epoch = update.epoch
    return epoch


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, color=_GREY)
    axis.legend(fontsize=7, frameon=False)
