"""Sizes of maps at which strides and pooling keep quarter turns and mirrors exact.

A window of size k, dilation d and stride s on a map of N pixels, p of padding at each end, stops at

    (N + 2 p - d (k - 1) - 1) mod s

pixels before the far end. Turned by 180 degrees the map is covered in the same way only if there
are none; otherwise the network is not equivariant, however its filters are tied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from margeq.curvature.capture import eval_mode
from margeq.errors import ConfigError, DataError, EquivarianceWarning
from margeq.groups.action import maps_pixels_to_pixels
from margeq.groups.finite import FiniteGroup
from margeq.groups.planar import require_planar
from margeq.layers.pooling import BatchPolyphaseSubsample, PolyphaseSubsample
from margeq.layers.window import Window

__all__ = ["SizeFault", "check_sizes", "require_exact_sizes"]

_FURTHEST = 3
"""Pixels by which a suggested kernel or padding may differ from the given one."""


@dataclass(frozen=True)
class SizeFault:
    """A layer that breaks the symmetry of a group at the size of the map that it gets.

    Attributes:
        layer: its name in the model.
        kind: its type.
        extents: rows and columns of its input.
        reason: what is wrong.
        remedy: what can be changed, the nearest sizes that work first.
    """

    layer: str
    kind: str
    extents: tuple[int, int]
    reason: str
    remedy: str

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

    The rule of convolutions, of maximum and average pooling (with ``ceil_mode`` too), inside
    :class:`PerElement` or not; polyphase subsampling needs even sizes; ``padding="same"`` has to
    pad both ends equally; and a group that swaps the axes needs the same window along both. Slices
    such as ``x[..., ::2, ::2]`` are no modules and stay unseen:
    :func:`margeq.testing.equivariance_error` sees everything.

    One forward of a zero input in evaluation mode; flags and random state are restored.

    Args:
        model: any network.
        input_shape: of one datum, ``(c, y, x)`` or ``(c, g, y, x)``.
        group: rotations and reflections; of others than quarter turns and mirrors nothing is
            asked, they are not exact at any size.

    Returns:
        The faults, in the order in which the layers run; none if all sizes are fine.

    Raises:
        ConfigError: for a group that does not act on the plane.
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
    listed = "".join(f"\n- {fault}" for fault in faults)
    message = f"not equivariant to {group!r} for inputs {tuple(input_shape)}:{listed}"
    if action == "raise":
        raise ConfigError(message)
    warnings.warn(message, EquivarianceWarning, stacklevel=2)


@dataclass(frozen=True)
class _Symmetry:
    """Axes (0: rows, 1: columns) that some exact element reverses, and whether one swaps them."""

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
            tuple(reverses.nonzero().flatten().tolist()), bool((matrices[:, 0, 1] != 0).any())
        )


@dataclass(frozen=True)
class _Slide:
    """A window along one axis."""

    size: int
    step: int = 1
    before: int = 0
    after: int = 0
    spacing: int = 1

    def fault(self, extent: int, axis: str) -> tuple[str, str] | None:
        """Reason and remedy, if it does not cover an axis of a map evenly."""
        if self.before != self.after:
            reason = f"pads {self.before} pixels at the start, {self.after} at the end of {axis}"
            return reason, "use an odd kernel_size, or a padding in pixels"
        padded = extent + 2 * self.before
        rest = (padded - self.spacing * (self.size - 1) - 1) % self.step
        if not rest:
            return None
        reason = (
            f"with stride {self.step} leaves {rest} of {padded} pixels (padding included) over at "
            f"the end of {axis}"
        )
        return reason, self._remedy(extent, rest)

    def _remedy(self, extent: int, rest: int) -> str:
        below, above = extent - rest, extent + self.step - rest
        ways = [f"use maps of {f'{below} or {above}' if below > 0 else above} pixels"]
        half = self.spacing * self.size // 2  # more padding than that is no good idea
        paddings = _nearest(self.before, lambda d: (rest + 2 * d) % self.step == 0, 0, half)
        kernels = _nearest(self.size, lambda d: (rest - self.spacing * d) % self.step == 0, 1)
        for name, values in (("padding", paddings), ("kernel_size", kernels)):
            ways += [f"{name}={' or '.join(map(str, values))}"] if values else []
        return ", or ".join(ways)


def _nearest(
    value: int, works: Callable[[int], bool], least: int, most: int | None = None
) -> list[int]:
    """The nearest values below and above under whose difference the rule holds."""
    found = []
    for sign in (-1, 1):
        changed = (value + sign * d for d in range(1, _FURTHEST + 1) if works(sign * d))
        found += [other for other in changed if other >= least and (most is None or other <= most)][
            :1
        ]
    return found


def _slides(module: nn.Module) -> tuple[_Slide, _Slide] | None:
    """The window of a module along rows and along columns, if it has one."""
    window = getattr(module, "window", None)
    if isinstance(window, Window):
        slide = _Slide(window.size, window.step, window.margin, window.margin, window.spacing)
        return slide, slide
    if isinstance(module, PolyphaseSubsample | BatchPolyphaseSubsample):
        return _Slide(2, 2), _Slide(2, 2)  # phases are of one size under the same condition
    if isinstance(module, nn.Conv2d):
        left, right, top, bottom = module._reversed_padding_repeated_twice
        pads = ((top, bottom), (left, right))
    elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        pads = [(p, p) for p in _pair(module.padding)]
    else:
        return None
    sizes, steps = _pair(module.kernel_size), _pair(module.stride)
    spacings = _pair(getattr(module, "dilation", 1))
    rows, columns = (
        _Slide(k, s, *p, d) for k, s, p, d in zip(sizes, steps, pads, spacings, strict=True)
    )
    return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _faults(
    module: nn.Module, extents: tuple[int, int], symmetry: _Symmetry
) -> Iterator[tuple[str, str]]:
    """Reasons and remedies."""
    slides = _slides(module)
    if slides is None:
        return
    if symmetry.swaps and slides[0] != slides[1]:
        yield "has another window along rows than along columns", "use the same for both"
        return
    if symmetry.swaps:  # maps are square
        cases = [(slides[0], extents[0], "rows and columns")] if symmetry.reversed_axes else []
    else:
        names = ("columns", "rows")  # the first axis runs down the columns
        cases = [(slides[a], extents[a], names[a]) for a in symmetry.reversed_axes]
    for slide, extent, axis in cases:
        fault = slide.fault(extent, axis)
        if fault is not None:
            yield fault


@contextmanager
def _watched(model: nn.Module, symmetry: _Symmetry, faults: list[SizeFault]) -> Iterator[None]:
    """Collect the faults of all modules that run inside."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim >= 4:
                height, width = args[0].shape[-2:]
                kind = type(module).__name__
                for reason, remedy in _faults(module, (height, width), symmetry):
                    faults.append(SizeFault(name, kind, (height, width), reason, remedy))

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
