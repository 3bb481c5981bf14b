"""The sliding window of a convolution on pictures: everything but channels and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["PaddingMode", "Window"]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Window:
    """A square window, equal along both axes: rotations swap them.

    Attributes:
        size: extent of the window.
        step: distance between its positions.
        padding: pixels added on each side, or ``"same"``.
        spacing: distance between the pixels that it looks at.
        padding_mode: as in ``torch.nn.Conv2d``.
        groups: independent blocks of channels.

    Raises:
        ConfigError: for a number out of range, an unknown mode, or ``"same"`` with an even window
            or steps, which would shift the map.
    """

    size: int
    step: int = 1
    padding: int | str = 0
    spacing: int = 1
    padding_mode: PaddingMode = "zeros"
    groups: int = 1

    def __post_init__(self) -> None:
        named = {"kernel_size": self.size, "stride": self.step, "dilation": self.spacing}
        for name, value in {**named, "groups": self.groups}.items():
            if not is_count(value):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if self.padding_mode not in _MODES:
            raise ConfigError(f"padding_mode={self.padding_mode!r}: use one of {_MODES}")
        if self.padding == "same":
            if self.step != 1 or (self.spacing * (self.size - 1)) % 2:
                raise ConfigError(
                    f"padding='same' with kernel_size={self.size}, stride={self.step} pads the two "
                    f"sides unequally, which breaks equivariance; use a number of pixels"
                )
        elif not is_count(self.padding, least=0):
            raise ConfigError(f"padding={self.padding!r}: use a whole number, or 'same'")
        for name in ("size", "step", "padding", "spacing", "groups"):  # numpy's integers are others
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else int(value))

    @property
    def margin(self) -> int:
        """Pixels added on each side."""
        if isinstance(self.padding, int):
            return self.padding
        return self.spacing * (self.size - 1) // 2

    @property
    def kernel_size(self) -> tuple[int, int]:
        """As in ``torch.nn.Conv2d``."""
        return self.size, self.size

    @property
    def stride(self) -> tuple[int, int]:
        """As in ``torch.nn.Conv2d``."""
        return self.step, self.step

    @property
    def dilation(self) -> tuple[int, int]:
        """As in ``torch.nn.Conv2d``."""
        return self.spacing, self.spacing

    @property
    def pads(self) -> tuple[int, ...]:
        """Pixels added at the left, right, top and bottom."""
        return (self.margin,) * 4

    def with_groups(self, groups: int) -> Window:
        """The same window over other blocks of channels."""
        return replace(self, groups=groups)

    def convolve(self, x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
        """Correlate ``[n, C, H, W]`` with filters ``[D, C / groups, k, k]``."""
        margin = self.margin
        if margin and self.padding_mode != "zeros":
            x, margin = torch.nn.functional.pad(x, self.pads, mode=self.padding_mode), 0
        return torch.nn.functional.conv2d(
            x, filters, bias, self.step, margin, self.spacing, self.groups
        )

    def remainder(self, extent: int) -> int:
        """Pixels of a map that the last position of the window does not reach.

        Windows cover a map evenly, so that turning it turns the result, if there are none.

        Returns:
            ``(N + 2 p - d (k - 1) - 1) mod s``.
        """
        return (extent + 2 * self.margin - self.spacing * (self.size - 1) - 1) % self.step

    def describe(self) -> str:
        """Arguments that differ from their defaults, for ``print(model)``."""
        shown = [f"kernel_size={self.size}"]
        for name, value, default in (
            ("stride", self.step, 1), ("padding", self.padding, 0), ("dilation", self.spacing, 1),
            ("padding_mode", self.padding_mode, "zeros"), ("groups", self.groups, 1),
        ):  # fmt: skip
            shown += [f"{name}={value!r}"] if value != default else []
        return ", ".join(shown)
