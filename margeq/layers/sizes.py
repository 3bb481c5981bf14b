"""Sizes of maps at which strides and pooling keep quarter turns and mirrors exact.

A window of size k, dilation d and stride s on a map of N pixels, p of padding at each end, stops at

    (N + 2 p - d (k - 1) - 1) mod s

pixels before the far end. Turned by 180 degrees the map is covered in the same way only if there
are none; otherwise the network is not equivariant, however its filters are tied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.curvature.capture import eval_mode
from margeq.errors import ConfigError, DataError, EquivarianceWarning
from margeq.groups.action import maps_pixels_to_pixels
from margeq.groups.finite import FiniteGroup
from margeq.groups.planar import require_planar
from margeq.layers.slides import Slide, has_unknown_window, is_pool, slides_of, spreads_of

__all__ = ["SizeFault", "check_sizes", "require_exact_sizes"]

_Found = tuple[str, str, bool]
"""Reason, remedy, and whether it is certain."""


@dataclass(frozen=True)
class SizeFault:
    """A layer that breaks the symmetry of a group at the size of the map that it gets, or may.

    Attributes:
        layer: its name in the model.
        kind: its type.
        extents: rows and columns of its input.
        reason: what is wrong.
        remedy: what can be changed, the nearest sizes that work first.
        judged: False for a module of a type without a rule here, which may be fine or not.
    """

    layer: str
    kind: str
    extents: tuple[int, int]
    reason: str
    remedy: str
    judged: bool = True

    def __str__(self) -> str:
        """One sentence on the fault, one on its remedy."""
        name = self.layer or "the model itself"
        size = " x ".join(map(str, self.extents))
        return f"{name} ({self.kind}) on {size} pixels {self.reason}; {self.remedy}"


def check_sizes(
    model: nn.Module, input_shape: tuple[int, ...], group: FiniteGroup
) -> list[SizeFault]:
    """Find strides, pooling and paddings that break quarter turns or mirrors of the input.

        (N + 2 p - d (k - 1) - 1) mod s = 0   for each axis that the group reverses

    The rule of convolutions and of maximum, average and power-average pooling (with ``ceil_mode``
    too), of ``torch.nn`` in two or three dimensions and of this package, inside :class:`PerElement`
    or not. Polyphase subsampling needs even sizes; ``padding="same"`` and padding layers have to
    pad both ends equally; a group that swaps the axes needs the same window along both; and a
    window in three dimensions that also slides along the group axis keeps no symmetry but where it
    pools all elements into one. Other modules with a ``kernel_size`` or a ``padding``, and without
    parts, cannot be judged: they are listed as faults with ``judged=False``. Functions and slices
    such as ``x[..., ::2, ::2]`` are no modules, and modules without these two attributes are not
    asked: :func:`margeq.testing.equivariance_error` sees everything.

    One forward of a zero input in evaluation mode; flags and random state are restored.

    Args:
        model: any network.
        input_shape: of one datum, ``(c, y, x)`` or ``(c, g, y, x)``.
        group: rotations and reflections; of others than quarter turns and mirrors nothing is
            asked, they are not exact at any size.

    Returns:
        The faults, in the order in which the layers run; none if all sizes are fine.

    Raises:
        ConfigError: for a group that does not act on the plane, or a shape that is none.
        DataError: for an input that is not square, if the group swaps its axes.

    Example:
        >>> from margeq.groups import P4M
        >>> pool = nn.MaxPool2d(3, stride=2, padding=1)
        >>> print(*check_sizes(pool, (1, 32, 32), P4M))
        the model itself (MaxPool2d) on 32 x 32 pixels with stride 2 leaves 1 of 34 pixels (padding
        included) over at the end of rows and columns; use maps of 31 or 33 pixels, or kernel_size=2
        or 4
        >>> check_sizes(pool, (1, 33, 33), P4M)
        []
    """
    symmetry = _Symmetry.of(group)
    _require_shape(input_shape)
    height, width = input_shape[-2:]
    if symmetry.swaps and height != width:
        raise DataError(f"{group!r} needs square maps, got input_shape={tuple(input_shape)}")
    faults: list[SizeFault] = []
    x = _example(model, input_shape)
    kept = torch.random.fork_rng([x.device] if x.is_cuda else [])
    with eval_mode(model), torch.no_grad(), kept, _watched(model, symmetry, faults):
        try:
            model(x)
        except DataError:
            if not faults:  # a faulty layer may itself refuse the map
                raise
    return list(dict.fromkeys(faults))


def require_exact_sizes(
    model: nn.Module,
    input_shape: tuple[int, ...],
    group: FiniteGroup,
    *,
    action: Literal["raise", "warn"] = "raise",
) -> None:
    """Refuse, or warn of, a model whose strides break the symmetry at the given size.

    Layers that cannot be judged are never refused, only warned of.

    Args:
        model: any network.
        input_shape: of one datum, as in :func:`check_sizes`.
        group: rotations and reflections of the plane.
        action: ``"raise"``, or ``"warn"`` with an :class:`~margeq.errors.EquivarianceWarning`.

    Raises:
        ConfigError: naming each layer, its size and the remedy.
    """
    if action not in ("raise", "warn"):
        raise ConfigError(f"action={action!r}: use 'raise' or 'warn'")
    faults = check_sizes(model, input_shape, group)
    if not faults:
        return
    broken = any(fault.judged for fault in faults)
    listed = "".join(f"\n- {fault}" for fault in faults)
    what = "not equivariant" if broken else "perhaps not equivariant"
    message = f"{what} to {group!r} for inputs {tuple(input_shape)}:{listed}"
    if broken and action == "raise":
        raise ConfigError(message)
    warnings.warn(message, EquivarianceWarning, stacklevel=2)


@dataclass(frozen=True)
class _Symmetry:
    """Axes (0: rows, 1: columns) that some exact element reverses, and whether one swaps them.

    ``order`` is that of the group, or 1 if none of its elements but the identity is exact.
    """

    order: int
    reversed_axes: tuple[int, ...]
    swaps: bool

    @classmethod
    def of(cls, group: FiniteGroup) -> _Symmetry:
        require_planar(group)
        exact = [group.matrices[u] for u in range(group.order) if maps_pixels_to_pixels(group, u)]
        matrices = torch.stack(exact).round()
        # matrices act on (x, y), maps have rows first
        reverses = (matrices == -1).any(1).any(0).flip(0)
        return cls(
            group.order if len(exact) > 1 else 1,
            tuple(reverses.nonzero().flatten().tolist()),
            bool((matrices[:, 0, 1] != 0).any()),
        )


def _faults(module: nn.Module, x: Tensor, symmetry: _Symmetry) -> Iterator[_Found]:
    """Reasons, remedies, and whether they are certain."""
    slides, spreads = slides_of(module), spreads_of(module)
    if spreads is not None:
        yield from _spread_faults(spreads, x, symmetry)
    elif slides is None:
        if symmetry.order > 1 and has_unknown_window(module):
            remedy = "measure it with margeq.testing.equivariance_error"
            yield "cannot be judged, there is no rule for its type", remedy, False
    if slides is None:
        return
    if len(slides) == 3 and x.ndim == 5 and x.shape[2] == symmetry.order > 1:
        yield from _group_axis_faults(module, slides[0], symmetry.order)
    for reason, remedy in _plane_faults(slides[-2], slides[-1], x.shape[-2:], symmetry):
        yield reason, remedy, True


def _spread_faults(
    spreads: list[tuple[int, ...]], x: Tensor, symmetry: _Symmetry
) -> Iterator[_Found]:
    """A transposed convolution is even at both ends of an axis, but for what it adds at one."""
    if len(spreads) == 3 and x.ndim == 5 and x.shape[2] == symmetry.order > 1:
        if spreads[0] != (1, 1, 0, spreads[0][3], 0):
            reason = "mixes elements: its window spreads along the group axis"
            yield reason, "use kernel and stride 1, and no padding, along that axis", True
    rows, columns = spreads[-2:]
    if symmetry.swaps and rows != columns:
        yield "has another window along rows than along columns", "use the same for both", True
        return
    for axis, (*_, extra) in zip((0, 1), (rows, columns), strict=True):
        if extra and axis in symmetry.reversed_axes:
            reason = f"adds {extra} pixels at the end of {('columns', 'rows')[axis]} only"
            yield reason, "leave output_padding out, and crop or pad both ends alike", True


def _group_axis_faults(module: nn.Module, slide: Slide, order: int) -> Iterator[_Found]:
    pools_all = is_pool(module) and slide == Slide(order, slide.step)
    if pools_all or slide == Slide(1, spacing=slide.spacing):
        return
    reason = (
        f"mixes elements: its window of {slide.size} (stride {slide.step}, padding "
        f"{slide.before} and {slide.after}) slides along the group axis"
    )
    yield reason, f"use 1, 1 and 0 along that axis, or pool all {order} elements into one", True


def _plane_faults(
    rows: Slide, columns: Slide, extents: tuple[int, ...], symmetry: _Symmetry
) -> Iterator[tuple[str, str]]:
    if symmetry.swaps and rows != columns:
        yield "has another window along rows than along columns", "use the same for both"
        return
    if symmetry.swaps:  # maps are square
        cases = [(rows, extents[0], "rows and columns")] if symmetry.reversed_axes else []
    else:
        # the first axis runs down the columns
        both = ((rows, extents[0], "columns"), (columns, extents[1], "rows"))
        cases = [both[a] for a in symmetry.reversed_axes]
    for slide, extent, axis in cases:
        fault = slide.fault(extent, axis)
        if fault is not None:
            yield fault


def _require_shape(input_shape: object) -> None:
    shape = input_shape if isinstance(input_shape, Sequence) else ()
    if len(shape) not in (3, 4) or not all(map(is_count, shape)):
        raise ConfigError(
            f"input_shape={input_shape!r}: use the shape of one datum, (c, y, x) or (c, g, y, x)"
        )


@contextmanager
def _watched(model: nn.Module, symmetry: _Symmetry, faults: list[SizeFault]) -> Iterator[None]:
    """Collect the faults of all modules that run inside."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim >= 4:
                height, width = args[0].shape[-2:]
                kind = type(module).__name__
                for found in _faults(module, args[0], symmetry):
                    faults.append(SizeFault(name, kind, (height, width), *found))

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """A zero input like the model's first floating-point tensor."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.new_zeros(1, *input_shape)
    return torch.zeros(1, *input_shape)
