"""The architecture of the ELLA paper: eight layers that choose their paths, and a dense head."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from margeq.bases import Anchors
from margeq.errors import ConfigError
from margeq.groups import P4, FiniteGroup
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    GroupPool,
    Lift,
    Linear2d,
    MergeGroup,
    PolyphaseSubsample,
    ResidualPathways,
    SparseConv2d,
    SparseFactoredLinear2d,
    SplitGroup,
)
from margeq.layers.maps import Shape
from margeq.layers.pooling import BatchPolyphaseSubsample
from margeq.models.planar_layers import require_counts, require_group, with_rectifier_gain

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
    group: FiniteGroup | None = None,
    separability: str = "pointwise",
) -> nn.Sequential:
    """The network of ELLA (table 6) with any sum of candidate paths in its eight layers.

        layer_l(x) = ReLU(sum_p pool_l(path_p(x))),   l = 0..7 (eq. 4)

    Channels are ``in -> a, 2a, 2a, 4a, 4a, 8a, 8a, 16a`` for width ``a``. Layers 1, 3, 5, 6 and 7
    halve the map, 32 -> 1; a map with an odd side stays as it is, because only even ones have
    phases of equal size, so every input size works. The head ``16a -> 64a -> num_classes`` sees the
    mean over the positions that remain. A network of ``conv`` alone, or of ``s_conv`` alone, is
    therefore blind to circular shifts, exactly; their sum is not, because each path chooses a phase
    of its own. A path holds its weight and its bias, and is selected with both.

    With a group, layer 0 gets the picture in every pose and all maps are ``[n, c, g, y, x]``, with
    ``c`` as above. ``gconv`` turns its filters; the other paths see channels and elements alike, as
    ``c |H|`` channels. All convolutions of a layer share one phase, and the head sees the maximum
    over the group, so that ``gconv`` alone is blind to quarter turns and mirrors of square pictures
    as well as to shifts, exactly, and ``gconv+conv`` to shifts. The paper's mixers are
    ``f_fc+conv+gconv`` with width 2; the networks of its table 7 are ``gconv`` alone, with
    separability ``"full"``, ``"depthwise"`` (there separable), ``"dg"`` (dw-separable) and
    ``"pointwise"``.

    Layers are ``layer0`` .. ``layer7``, with their rectifiers ``relu0`` .. ``relu7``, then
    ``pool``, ``flatten``, ``head0``, ``relu8`` and ``head1``; with a group also ``lift`` at the
    start and ``group_pool`` before ``pool``. Convolutions start as in the paper, at the gain of a
    rectifier; all biases start at zero.

    Args:
        kind: paths joined by ``+`` in any order: ``"fc"`` (eq. 1), ``"conv"`` (3x3, circular,
            eq. 3), ``"f_fc"`` (factored, eq. 5), ``"s_fc"`` and ``"s_conv"`` (sparsified, eqs. 7
            and 6), and ``"gconv"`` (group convolution, F.3).
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
        group: rotations and reflections of the plane, on which all maps live; by default P4 if
            there is a path ``gconv``, and otherwise none.
        separability: of ``gconv``, see :class:`margeq.layers.GroupConv2d`.

    Returns:
        ``[n, in_channels, *size] -> [n, num_classes]``.

    Raises:
        ConfigError: for an unknown or repeated path, a size or width that is no positive whole
            number, ``reference`` with a group, or an argument that a layer refuses.

    Reference:
        van der Ouderaa, Immer & van der Wilk 2023, section 5, F.3 and tables 6 and 7.

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
    group = P4 if group is None and "gconv" in names else group
    _check_group(group, reference)
    path_anchors = _path_anchors(anchors, reference)
    pool = BatchPolyphaseSubsample if reference else PolyphaseSubsample
    modules: dict[str, nn.Module] = {} if group is None else {"lift": Lift(group)}
    for number, step in enumerate(_steps(in_channels, width, shape, pool, group, separability)):
        # a seed for each layer, shared with no layer of another seed
        options = {**sparse, "seed": len(_WIDTHS) * seed + number}
        paths = {
            name: _PATHS[name](step, options | {"anchors": path_anchors.get(name)})
            for name in names
        }
        modules[f"layer{number}"] = ResidualPathways(paths, reduction, *step.subsampling(names))
        modules[f"relu{number}"] = nn.ReLU()
    modules |= {} if group is None else {"group_pool": GroupPool(group)}
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
    group: FiniteGroup | None
    separability: str

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of ordinary maps, those of each element."""
        order = 1 if self.group is None else self.group.order
        return self.in_channels * order, self.out_channels * order

    @property
    def maps(self) -> tuple[int, int, Shape, Shape]:
        """Channels and sizes, in the order in which layers between maps take them."""
        return *self.channels, self.in_shape, self.out_shape

    @property
    def halves(self) -> bool:
        """Whether the map gets smaller."""
        return self.out_shape != self.in_shape

    def subsampling(self, names: Sequence[str]) -> tuple[nn.Module | None, tuple[str, ...]]:
        """The subsampling that convolutions on a group share, and their names."""
        convolutions = tuple(name for name in names if name in _CONVOLUTIONS)
        if self.group is None or not self.halves or not convolutions:
            return None, ()
        return self.pool(), convolutions

    def pooled(self, convolution: nn.Module) -> nn.Module:
        """A convolution with the subsampling that it does not share, its weights named alike."""
        if self.group is not None:
            return self.merged(convolution)
        return nn.Sequential(convolution, *([self.pool()] if self.halves else []))

    def merged(self, layer: nn.Module) -> nn.Module:
        """A layer between ordinary maps, put between maps of the group if there is one."""
        if self.group is None:
            return layer
        return nn.Sequential(MergeGroup(), layer, SplitGroup(self.group))


def _steps(
    in_channels: int,
    width: int,
    shape: Shape,
    pool: Callable[[], nn.Module],
    group: FiniteGroup | None,
    separability: str,
) -> Iterator[_Step]:
    channels = [in_channels, *(multiple * width for multiple in _WIDTHS)]
    for number, (before, after) in enumerate(pairwise(channels)):
        halves = number in _POOLED and not any(extent % 2 for extent in shape)
        reduced = tuple(extent // 2 for extent in shape) if halves else shape
        yield _Step(before, after, shape, reduced, pool, group, separability)
        shape = reduced


def _fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return step.merged(Linear2d(*step.maps))


def _f_fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return step.merged(FactoredLinear2d(*step.maps))


def _s_fc(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    return step.merged(SparseFactoredLinear2d(*step.maps, **sparse))


def _conv(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    conv = nn.Conv2d(*step.channels, _KERNEL, padding=1, padding_mode="circular")
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    _zero_bias(conv)
    return step.pooled(conv)


def _s_conv(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    conv = SparseConv2d(*step.channels, _KERNEL, padding=1, padding_mode="circular", **sparse)
    with torch.no_grad():
        conv.weight.mul_(math.sqrt(2.0))  # from unit gain to that of a rectifier
    return step.pooled(conv)


def _gconv(step: _Step, sparse: Mapping[str, Any]) -> nn.Module:
    assert step.group is not None
    conv = GroupConv2d(
        step.in_channels, step.out_channels, _KERNEL, group=step.group,
        separability=step.separability, padding=1, padding_mode="circular",
    )  # fmt: skip
    return with_rectifier_gain(conv)


_PATHS: dict[str, Callable[[_Step, Mapping[str, Any]], nn.Module]] = {
    "fc": _fc,
    "f_fc": _f_fc,
    "s_fc": _s_fc,
    "conv": _conv,
    "s_conv": _s_conv,
    "gconv": _gconv,
}
_CONVOLUTIONS = ("conv", "s_conv", "gconv")
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


def _check_group(group: FiniteGroup | None, reference: bool) -> None:
    if group is None:
        return
    require_group(group)
    if reference:
        raise ConfigError(f"reference=True on {group!r}: no published network is computed like it")


def _check_sizes(shape: Shape, **counts: int) -> None:
    if len(shape) != 2:
        raise ConfigError(f"size={shape}: use an int or (height, width)")
    require_counts(size=shape, **counts)
