"""What the weights of a path look at, as small pictures, and how tied a free map is in place.

A map ``W`` between feature maps, circular at its borders, is a convolution if it commutes with all
translations ``T_g`` of its output. Its translation-tiedness is the share of its squared weights
that is a convolution,

    tiedness(W) = |P W|^2 / |W|^2,    P W = mean_g T_g^-1 W T_g

with ``P`` the orthogonal projection onto convolutions: 1 for a convolution, and ``1 / Y`` is what
independent weights give on average, with ``Y`` output positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from margeq.layers.maps import MapLayer
from margeq.layers.planar import PlanarConv
from margeq.layers.sparse import SparseConv2d
from margeq.paths import path_prefixes

__all__ = ["MOST_PICTURES", "path_pictures", "tiedness"]

MOST_PICTURES = 8
_LARGEST_SIDE = 32
_MOST_PIXELS = 1 << 16
"""Of all pictures of a model together: a result stays a small file."""
_LARGEST_MAP = 1 << 22
"""Elements of an induced map that is looked at at all."""


@torch.no_grad()
def path_pictures(model: nn.Module) -> list[dict[str, Any]]:
    """Kernels, and rows of induced maps, of each candidate path; of each layer without any.

    Up to eight pictures each: the kernels of the largest norm, of all pairs of channels; and of a
    free map the rows of places that are spread evenly over the output, for the output and the input
    channel of the largest norm. If the map is a convolution, these are one picture at eight places.

    Args:
        model: with or without candidate paths.

    Returns:
        For each path with something to see: ``layer``, ``path`` (``""`` outside of path sums),
        ``kind`` (``"kernels"`` or ``"rows"``), ``size`` (height and width), ``largest`` (the
        largest size of a weight shown), ``values`` (per picture, row by row, two hexadecimal digits
        per pixel: 01 for ``-largest``, 80 for 0, ff for ``largest``), and of rows ``tiedness`` with
        the value ``independent`` weights have on average, ``None`` where it is not defined.
    """
    found, left = [], _MOST_PIXELS
    for layer, path, module in _places(model):
        plain = _described(module)
        if plain is None:
            continue
        pixels = len(plain["values"]) * math.prod(plain["size"])
        if pixels <= left:
            left -= pixels
            found.append({"layer": layer, "path": path, **plain})
    return found


@torch.no_grad()
def tiedness(layer: MapLayer, matrix: Tensor) -> float | None:
    """Share of the squared weights of a map that is a circular convolution.

    Args:
        layer: whose map it is.
        matrix: ``[D * Y, C * X]``.

    Returns:
        From 0 to 1; ``None`` for a map of zeros, or one whose output has no whole stride.
    """
    if len(layer.in_shape) != len(layer.out_shape):
        return None
    if any(x % y for x, y in zip(layer.in_shape, layer.out_shape, strict=True)):
        return None
    strides = [x // y for x, y in zip(layer.in_shape, layer.out_shape, strict=True)]
    places = layer.out_shape.numel()
    rows = matrix.double().reshape(layer.out_channels, places, -1, *layer.in_shape)
    total = float(rows.square().sum())
    if not total:
        return None
    axes = tuple(range(2, 2 + len(strides)))
    seen = torch.zeros_like(rows[:, 0])
    # each row as its own place sees it
    for number, place in enumerate(product(*map(range, layer.out_shape))):
        shifts = tuple(-s * p for s, p in zip(strides, place, strict=True))
        seen += rows[:, number].roll(shifts, axes)
    return float((seen / places).square().sum()) * places / total


def _places(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """The first module of each path, or any module without paths, that there is something of."""
    layers = path_prefixes(model)
    for layer, named in layers.items():
        for path, prefix in named.items():
            drawable = filter(_is_drawable, model.get_submodule(prefix).modules())
            yield from ((layer, path, module) for module in list(drawable)[:1])
    if not layers:
        yield from ((n, "", module) for n, module in model.named_modules() if _is_drawable(module))


def _is_drawable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return math.prod(module.kernel_size) > 1
    if isinstance(module, PlanarConv):
        return math.prod(module.window.kernel_size) > 1
    if not (isinstance(module, MapLayer) and hasattr(module, "induced_weight")):
        return False
    elements = module.in_channels * module.in_shape.numel()
    elements *= module.out_channels * module.out_shape.numel()
    return len(module.in_shape) == 2 and elements <= _LARGEST_MAP


def _described(module: nn.Module) -> dict[str, Any] | None:
    if isinstance(module, MapLayer):
        matrix: Tensor = getattr(module, "induced_weight")()  # noqa: B009  not all map layers have it
        rows = _rows(module, matrix)
        tied = {
            "tiedness": tiedness(module, matrix),
            "independent": 1.0 / module.out_shape.numel(),
        }
        return _encoded("rows", rows.reshape(-1, *module.in_shape), tied)
    kernels = _kernels(module)
    largest = kernels.square().sum((1, 2)).argsort(descending=True, stable=True)
    return _encoded("kernels", kernels[largest[:MOST_PICTURES]], {})


def _rows(layer: MapLayer, matrix: Tensor) -> Tensor:
    """``[places, X]``: what one channel sees of another, of the pair of largest norm."""
    whole = matrix.reshape(layer.out_channels, layer.out_shape.numel(), layer.in_channels, -1)
    pair = int(whole.square().sum((1, 3)).argmax())
    channel, seen = divmod(pair, layer.in_channels)
    rows = whole[channel, :, seen]
    chosen = torch.linspace(0, len(rows) - 1, min(MOST_PICTURES, len(rows))).round().long()
    return rows[chosen.to(rows.device)]


def _kernels(module: nn.Module) -> Tensor:
    """``[pairs of channels, k, k]``, of the neutral element of a group."""
    if isinstance(module, SparseConv2d):
        return module.filters().flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        return module.weight.flatten(0, 1)
    assert isinstance(module, PlanarConv)
    kernels = module.weight.flatten(0, -2) @ module.basis[0].to(module.weight.dtype)
    return kernels.unflatten(1, module.window.kernel_size)


def _encoded(kind: str, pictures: Tensor, more: dict[str, Any]) -> dict[str, Any] | None:
    """Plain data, one byte per pixel; nothing of pictures that are too large or not finite."""
    pictures = pictures.detach().double().cpu()
    largest = float(pictures.abs().max())
    if max(pictures.shape[1:]) > _LARGEST_SIDE or not math.isfinite(largest):
        return None
    levels = (pictures / (largest or 1.0) * 127.0).round().long() + 128
    values = [bytes(levels[i].flatten().tolist()).hex() for i in range(len(levels))]
    size = list(pictures.shape[1:])
    return {"kind": kind, "size": size, "largest": largest, "values": values, **more}
