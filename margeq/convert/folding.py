"""Convolutions that are added up, as one convolution.

A filter of size k, dilation d and l pixels of padding looks at the offsets ``d j - l`` around
``s`` times the output position. Filters of one stride add up on the union of their offsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["folded", "scaled"]

_WORTH = 2.0
"""One convolution may have this many times the weights of those that it stands for."""


@dataclass(frozen=True)
class _Axis:
    """Where a filter looks along one axis."""

    offsets: range
    right: int
    """Pixels of padding on the far side."""

    @property
    def left(self) -> int:
        """Pixels of padding on the near side."""
        return -self.offsets[0]

    @property
    def balance(self) -> int:
        """Equal for filters whose outputs have the same size for every input size."""
        return self.right - self.offsets[-1]

    @property
    def pads(self) -> bool:
        """Whether the filter sees anything but the map."""
        return self.left > 0 or self.right > 0


def folded(convs: Sequence[nn.Conv2d]) -> list[nn.Conv2d]:
    """Fewer convolutions with the same sum.

    Args:
        convs: of the same channels, on the same input.

    Returns:
        Those that cannot be added up stay apart: other strides, paddings that see other values or
        leave other sizes, or a sum of more than twice the weights, as of a depthwise and a
        pointwise convolution.
    """
    found: list[nn.Conv2d] = []
    for conv in convs:
        for number, other in enumerate(found):
            both = _sum(other, conv)
            if both is not None:
                found[number] = both
                break
        else:
            found.append(conv)
    return found


def scaled(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    """The convolution times a number."""
    kernel, step = conv.kernel_size, conv.dilation
    weight = factor * conv.weight.detach().double()
    bias = None if conv.bias is None else factor * conv.bias.detach().double()
    return _like(conv, weight, bias, kernel, step, conv.padding, conv.padding_mode)


def _sum(a: nn.Conv2d, b: nn.Conv2d) -> nn.Conv2d | None:
    if a.stride != b.stride or a.weight.dtype != b.weight.dtype:
        return None
    pairs = list(zip(_axes(a), _axes(b), strict=True))
    both = [_union(one, other) for one, other in pairs]
    modes = {
        conv.padding_mode
        for conv, axes in ((a, _axes(a)), (b, _axes(b)))
        if any(axis.pads for axis in axes)
    }
    aligned = all(one.balance == other.balance for one, other in pairs)
    even = all(axis.left == axis.right >= 0 for axis in both)
    if len(modes) > 1 or not (aligned and even):
        return None
    groups = math.gcd(a.groups, b.groups)
    size = math.prod(len(axis.offsets) for axis in both)
    count = a.out_channels * a.in_channels // groups * size
    if count > _WORTH * (a.weight.numel() + b.weight.numel()):
        return None
    weight = sum(_placed(conv, groups, both) for conv in (a, b))
    biases = [conv.bias.detach().double() for conv in (a, b) if conv.bias is not None]
    assert isinstance(weight, Tensor)
    bias = torch.stack(biases).sum(0) if biases else None
    kernel = tuple(len(axis.offsets) for axis in both)
    step = tuple(axis.offsets.step for axis in both)
    padding = tuple(axis.left for axis in both)
    return _like(a, weight, bias, kernel, step, padding, next(iter(modes), "zeros"), groups)


def _axes(conv: nn.Conv2d) -> list[_Axis]:
    found = []
    for axis in range(2):
        size, step = conv.kernel_size[axis], conv.dilation[axis]
        extent = step * (size - 1)
        if conv.padding == "valid":
            left = right = 0
        elif conv.padding == "same":
            left, right = extent // 2, extent - extent // 2
        else:
            left = right = int(conv.padding[axis])
        found.append(_Axis(range(-left, extent - left + 1, step), right))
    return found


def _union(a: _Axis, b: _Axis) -> _Axis:
    first = min(a.offsets[0], b.offsets[0])
    last = max(a.offsets[-1], b.offsets[-1])
    offsets = {*a.offsets, *b.offsets}
    step = math.gcd(*(offset - first for offset in offsets)) or 1
    return _Axis(range(first, last + 1, step), a.balance + last)


def _placed(conv: nn.Conv2d, groups: int, axes: Sequence[_Axis]) -> Tensor:
    """The filters among zeros, between the channels of other groups and at other offsets."""
    weight = conv.weight.detach().double()
    blocks = conv.groups // groups  # of channels that a new group holds
    eye = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
    by_block = weight.unflatten(0, (groups, blocks, -1))
    dense = torch.einsum("gboiyx,bc->gbociyx", by_block, eye).flatten(3, 4).flatten(0, 2)
    placed = dense.new_zeros(*dense.shape[:2], *(len(axis.offsets) for axis in axes))
    rows, columns = (
        torch.tensor([new.offsets.index(offset) for offset in old.offsets], device=weight.device)
        for new, old in zip(axes, _axes(conv), strict=True)
    )
    placed[:, :, rows[:, None], columns] = dense
    return placed


def _like(
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str | tuple[int, ...],
    padding_mode: str,
    groups: int | None = None,
) -> nn.Conv2d:
    """A convolution with these filters, in the mode of the given one, where its weights are."""
    with torch.device("meta"):
        new = nn.Conv2d(
            conv.in_channels, conv.out_channels, kernel, conv.stride, padding, dilation,  # pyright: ignore[reportArgumentType]
            conv.groups if groups is None else groups, bias is not None, padding_mode,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    place = conv.weight
    new.weight = nn.Parameter(weight.to(place), requires_grad=place.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(place), requires_grad=place.requires_grad)
    return new.train(conv.training)
