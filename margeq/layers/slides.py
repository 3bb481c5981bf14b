"""The windows that modules slide along the axes of a map, and when they cover an axis evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from margeq.layers.pooling import BatchPolyphaseSubsample, PolyphaseSubsample
from margeq.layers.window import Window

__all__ = ["Slide", "has_unknown_window", "is_pool", "slides_of", "spreads_of"]

_FURTHEST = 3
"""Pixels by which a suggested kernel or padding may differ from the given one."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_POOLS_2D = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
_POOLS_3D = (nn.MaxPool3d, nn.AvgPool3d, nn.LPPool3d)
_PADS = tuple(getattr(nn, name) for name in nn.modules.padding.__all__)


@dataclass(frozen=True)
class Slide:
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
            return reason, "use an odd kernel_size, or a padding in pixels, the same at both ends"
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


def slides_of(module: nn.Module) -> tuple[Slide, ...] | None:
    """The windows of a module along the last two or three axes of its input.

    Args:
        module: any.

    Returns:
        One per axis, those along rows and columns last; ``None`` without a window, or without a
        rule for it.

    Example:
        >>> slides_of(nn.MaxPool2d((3, 2), 2))
        (Slide(size=3, step=2, before=0, after=0, spacing=1),
         Slide(size=2, step=2, before=0, after=0, spacing=1))
    """
    window: Any = getattr(module, "window", None)
    padding: Any = getattr(module, "padding", 0)
    if isinstance(window, Window):
        return (Slide(window.size, window.step, window.margin, window.margin, window.spacing),) * 2
    if isinstance(module, PolyphaseSubsample | BatchPolyphaseSubsample):
        return (Slide(2, 2),) * 2  # phases are of one size under the same condition
    if isinstance(module, _PADS):
        pads = _by_axis(padding)
        return tuple(Slide(1, 1, *ends) for ends in ([(0, 0)] * (2 - len(pads)) + pads))
    if isinstance(module, _CONVOLUTIONS):
        return _sliding(module, _by_axis(module._reversed_padding_repeated_twice))
    if is_pool(module):
        n_axes = 3 if isinstance(module, _POOLS_3D) else 2
        return _sliding(module, [(p, p) for p in _each(padding, n_axes)])
    return None


def is_pool(module: nn.Module) -> bool:
    """Whether a module pools in two or three dimensions, in the same way wherever it is."""
    return isinstance(module, _POOLS_2D + _POOLS_3D)


def spreads_of(module: nn.Module) -> list[tuple[int, ...]] | None:
    """Kernel, stride, padding, dilation and output padding along each axis of the map.

    Returns:
        ``None`` for anything but a transposed convolution.
    """
    if not isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "output_padding")
    return list(zip(*(getattr(module, name) for name in names), strict=True))


def has_unknown_window(module: nn.Module) -> bool:
    """Whether a module without parts has a window, of a type that nothing here can read."""
    if spreads_of(module) is not None:
        return False
    named = any(getattr(module, name, None) is not None for name in ("kernel_size", "padding"))
    return named and slides_of(module) is None and not any(True for _ in module.children())


def _sliding(module: Any, pads: Sequence[tuple[int, int]]) -> tuple[Slide, ...]:
    """Windows with one kernel size, stride and dilation per axis, or one for all."""
    # some kinds of pooling keep the default as None
    step = module.kernel_size if module.stride is None else module.stride
    values = (module.kernel_size, step, getattr(module, "dilation", 1))
    sizes, steps, spacings = (_each(value, len(pads)) for value in values)
    per_axis = zip(sizes, steps, pads, spacings, strict=True)
    return tuple(Slide(size, step, *ends, spacing) for size, step, ends, spacing in per_axis)


def _by_axis(padding: Sequence[int]) -> list[tuple[int, int]]:
    """Both ends of each axis, of a padding that lists the last axis first."""
    return list(zip(padding[::2], padding[1::2], strict=True))[::-1]


def _each(value: Any, n_axes: int) -> tuple[int, ...]:
    return (value,) * n_axes if isinstance(value, int) else tuple(value)
