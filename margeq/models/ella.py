"""The architecture of the ELLA paper: eight layers that choose their paths, and a dense head."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from margeq.bases import Anchors
from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.layers import (
    FactoredLinear2d,
    Linear2d,
    PolyphaseSubsample,
    ResidualPathways,
    SparseConv2d,
    SparseFactoredLinear2d,
)
from margeq.layers.maps import Shape
from margeq.layers.pooling import BatchPolyphaseSubsample

__all__ = ["ella"]

_WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16)  # channels after each layer, in units of the width
_POOLED = (1, 3, 5, 6, 7)
_HEAD_WIDTH = 64
_KERNEL = 3

_PathAnchors = Anchors | tuple[Anchors, Anchors]


def ella(
    kind: str,
    *,
    width: int = 10,
    in_channels: int = 3,
    num_classes: int = 10,
    size: int | tuple[int, int] = 32,
    reduction: Literal["mean", "sum"] | None = None,
    anchors: Anchors | Mapping[str, _PathAnchors] = 0.5,
    learn_anchors: bool = False,
    basis: str = "rbf",
    lengthscale: float = 1.0,
    per_filter: bool = False,
    lengthscale_spread: float | str | None = "auto",
    seed: int = 0,
    reference: bool = False,
) -> nn.Sequential:
    """The network of ELLA (table 6) with any sum of candidate paths in its eight layers.

        layer_l(x) = ReLU(sum_p pool_l(path_p(x))),   l = 0..7 (eq. 4)

    Channels are ``in -> a, 2a, 2a, 4a, 4a, 8a, 8a, 16a`` for width ``a``. Layers 1, 3, 5, 6 and 7
    halve the map, 32 -> 1; a map with an odd side stays as it is, because only even ones have
    phases of equal size, so every input size works. The head ``16a -> 64a -> num_classes`` sees the
    mean over the positions that remain. A network of ``conv`` alone, or of ``s_conv`` alone, is
    therefore blind to circular shifts, exactly; their sum is not, because each path chooses a phase
    of its own. A path holds its weight and its bias, and is selected with both.

    Layers are ``layer0`` .. ``layer7``, with their rectifiers ``relu0`` .. ``relu7``, then
    ``pool``, ``flatten``, ``head0``, ``relu8`` and ``head1``. Convolutions start as in the paper,
    at the gain of a rectifier; all biases start at zero.

    Args:
        kind: paths joined by ``+`` in any order: ``"fc"`` (eq. 1), ``"conv"`` (3x3, circular,
            eq. 3), ``"f_fc"`` (factored, eq. 5), ``"s_fc"`` and ``"s_conv"`` (sparsified, eqs. 7
            and 6).
        width: ``a``.
        in_channels: channels of the picture.
        num_classes: number of outputs.
        size: height and width of the picture, an int for square ones.
        reduction: of the paths; ``"sum"`` by default, under which a path alone is exactly its
            single-path network, or ``"mean"``, as in the paper.
        anchors: of the sparsified paths, as in :class:`SparseConv2d`, or path name -> anchors.
        learn_anchors: see there, like the next four.
        basis: see there.
        lengthscale: see there.
        per_filter: see there.
        lengthscale_spread: see there.
        seed: of randomly placed anchors, which differ from layer to layer.
        reference: as the published code computes, for reproductions only: the mean of the paths; a
            phase for the whole batch (:class:`BatchPolyphaseSubsample`), which is not equivariant;
            and shares of S-CONV anchors rounded to even, 4 of 9. The code also gives biases
            precisions of their own: that is the prior structure ``"layerwise"`` against
            ``"pathwise"``, and no matter of the network.

    Returns:
        ``[n, in_channels, *size] -> [n, num_classes]``.

    Raises:
        ConfigError: for an unknown or repeated path, a size or width that is no positive whole
            number, or an argument that a layer refuses.

    Reference:
        van der Ouderaa, Immer & van der Wilk 2023, section 5 and table 6.

    Example:
        >>> model = ella("f_fc+conv", width=2, in_channels=1, size=16)
        >>> sum(parameter.numel() for parameter in model.parameters())
        30382
    """
    shape = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    _check_sizes(shape, width=width, in_channels=in_channels, num_classes=num_classes)
    names = _path_names(kind)
    sparse = {
        "learn_anchors": learn_anchors,
        "basis": basis,
        "lengthscale": lengthscale,
        "per_filter": per_filter,
        "lengthscale_spread": lengthscale_spread,
    }
    if reduction is None:
        reduction = "mean" if reference else "sum"
    path_anchors = _path_anchors(anchors, reference)
    pool = BatchPolyphaseSubsample if reference else PolyphaseSubsample
    modules: dict[str, nn.Module] = {}
    for number, step in enumerate(_steps(in_channels, width, shape, pool)):
        # a seed for each layer, shared with no layer of another seed
        options = {**sparse, "seed": len(_WIDTHS) * seed + number}
        paths = {
            name: _PATHS[name](step, options | {"anchors": path_anchors.get(name)})
            for name in names
        }
        modules[f"layer{number}"] = ResidualPathways(paths, reduction=reduction)
        modules[f"relu{number}"] = nn.ReLU()
    modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    modules["head0"] = _dense(_WIDTHS[-1] * width, _HEAD_WIDTH * width)
    modules["relu8"] = nn.ReLU()
    modules["head1"] = _dense(_HEAD_WIDTH * width, num_classes)
    return nn.Sequential(OrderedDict(modules))


@dataclass(frozen=True)
class _Step:
    """What one layer maps from and to."""

    in_channels: int
    out_channels: int
    in_shape: Shape
    out_shape: Shape
    pool: Callable[[], nn.Module]

    @property
    def maps(self) -> tuple[int, int, Shape, Shape]:
        """Channels and sizes, in the order in which layers between maps take them."""
        return self.in_channels, self.out_channels, self.in_shape, self.out_shape

    def pooled(self, convolution: nn.Module) -> nn.Sequential:
        """A convolution and the subsampling, if any; its weights are named alike in both cases."""
        halves = self.out_shape != self.in_shape
        return nn.Sequential(convolution, *([self.pool()] if halves else []))


def _steps(
    in_channels: int, width: int, shape: Shape, pool: Callable[[], nn.Module]
) -> Iterator[_Step]:
    channels = [in_channels, *(multiple * width for multiple in _WIDTHS)]
    for number, (before, after) in enumerate(pairwise(channels)):
        halves = number in _POOLED and not any(extent % 2 for extent in shape)
        reduced = tuple(extent // 2 for extent in shape) if halves else shape
        yield _Step(before, after, shape, reduced, pool)
        shape = reduced


def _fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return Linear2d(*step.maps)


def _f_fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return FactoredLinear2d(*step.maps)


def _s_fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return SparseFactoredLinear2d(*step.maps, **sparse)


def _conv(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    channels = (step.in_channels, step.out_channels)
    conv = nn.Conv2d(*channels, _KERNEL, padding=1, padding_mode="circular")
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    _zero_bias(conv)
    return step.pooled(conv)


def _s_conv(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    channels = (step.in_channels, step.out_channels)
    conv = SparseConv2d(*channels, _KERNEL, padding=1, padding_mode="circular", **sparse)
    with torch.no_grad():
        conv.weight.mul_(math.sqrt(2.0))  # from unit gain to that of a rectifier
    return step.pooled(conv)


_PATHS: dict[str, Callable[[_Step, Mapping[str, Any]], nn.Module]] = {
    "fc": _fc,
    "f_fc": _f_fc,
    "s_fc": _s_fc,
    "conv": _conv,
    "s_conv": _s_conv,
}
_SPARSE = ("s_fc", "s_conv")


def _path_anchors(
    anchors: Anchors | Mapping[str, _PathAnchors], reference: bool
) -> dict[str, _PathAnchors]:
    """Anchors of each sparsified path."""
    if not isinstance(anchors, Mapping):
        anchors = dict.fromkeys(_SPARSE, anchors)
    unknown = sorted(set(anchors) - set(_SPARSE))
    if unknown:
        raise ConfigError(f"anchors: no sparsified path {unknown[0]!r}; use {', '.join(_SPARSE)}")
    found: dict[str, _PathAnchors] = dict.fromkeys(_SPARSE, 0.5) | dict(anchors)
    share = found["s_conv"]
    if reference and isinstance(share, float) and 0.0 < share <= 1.0:
        found["s_conv"] = max(1, round(share * _KERNEL**2))  # where the layer rounds up
    return found


def _dense(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    _zero_bias(layer)
    return layer


def _zero_bias(layer: nn.Conv2d | nn.Linear) -> None:
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _path_names(kind: str) -> list[str]:
    """The paths of a kind in one order, so that ``conv+fc`` is the same network as ``fc+conv``."""
    asked = [name.strip() for name in kind.split("+")]
    unknown = [name for name in asked if name not in _PATHS]
    if unknown or len(set(asked)) < len(asked):
        fault = f"unknown path {unknown[0]!r}" if unknown else "a path is named twice"
        raise ConfigError(f"kind={kind!r}: {fault}; join different ones of {', '.join(_PATHS)}")
    return [name for name in _PATHS if name in asked]


def _check_sizes(shape: Shape, **counts: int) -> None:
    if len(shape) != 2:
        raise ConfigError(f"size={shape}: use an int or (height, width)")
    for name, value in [*(("size", extent) for extent in shape), *counts.items()]:
        if not is_count(value):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
