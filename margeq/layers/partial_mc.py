"""Convolutions between maps on samples of a continuous group (Romero & Lohit 2022, eqs. 4 and 6).

A sum over samples of a distribution on the group, divided by their weights, stands for an integral:

    y[n,o](h, x) = sum_g p_g sum_i psi[o,i](h^-1 g, h^-1 .) * f[n,i](g, .)(x),   sum_g p_g = 1

How many samples there are, and in how much of the group, does not change the size of the output.
"""

from __future__ import annotations

from torch import Tensor

from margeq.curvature.io import register_split_rule
from margeq.errors import DataError
from margeq.layers.sampled import SAMPLED_RULE, SampledConv
from margeq.layers.samples import GroupSampler
from margeq.layers.window import PaddingMode, Window

__all__ = ["MonteCarloGroupConv2d", "MonteCarloLiftingConv2d"]


class MonteCarloLiftingConv2d(SampledConv):
    """Convolution of a picture with filters turned by samples of a continuous group.

        y[n,o](h, x) = sum_i psi[o,i](h^-1 .) * f[n,i](x) + b[o]

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters; with rotations, of the disk in them.
        outputs: elements of the map it writes.
        stride: as in ``torch.nn.Conv2d``, like the next four; one number for both axes.
        padding: pixels on each side, or ``"same"``.
        dilation: see there.
        bias: one per output channel.
        padding_mode: see there.
        nonlinearity: see :class:`~margeq.layers.ImplicitKernel`.
        omega_0: initial frequency; by default ``(kernel_size - 1) / 2``, about what pixels can
            show. It grows with the filter: 10 is too much for 3 x 3.
        hidden: width of the hidden layers of the filters.

    Shapes:
        ``[n, I, y, x] -> [n, O, S, y', x']``; ``weight [O, I, hidden + 1]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no picture with ``I`` channels.

    Reference:
        Romero & Lohit 2022, eq. 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        outputs: GroupSampler,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        nonlinearity: str = "siren",
        omega_0: float | None = None,
        hidden: int = 32,
    ) -> None:
        window = Window(kernel_size, stride, padding, dilation, padding_mode)
        super().__init__(
            in_channels, out_channels, window, outputs, None, bias, omega_0,
            nonlinearity=nonlinearity, hidden=hidden,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, y, x]`` to ``[n, O, S, y', x']``."""
        if x.ndim != 4:
            raise DataError(
                f"MonteCarloLiftingConv2d takes pictures [n, {self.in_channels}, y, x], got "
                f"{tuple(x.shape)}"
            )
        return self.convolve(x)


class MonteCarloGroupConv2d(SampledConv):
    """Convolution between maps on samples of a continuous group.

        y[n,o](h, x) = sum_g p_g sum_i psi[o,i](h^-1 g, h^-1 .) * f[n,i](g, .)(x) + b[o]

    with shares ``p_g`` of the samples that sum to 1. Samples of the whole group make it equivariant
    in expectation, samples of a part of it partially so. Angles enter as cosine and sine, so that
    filters do not jump where an element passes another.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters; with rotations, of the disk in them.
        inputs: elements of the map it reads, the ``outputs`` of the layer before.
        outputs: elements of the map it writes.
        stride: as in ``torch.nn.Conv2d``, like the next four; one number for both axes.
        padding: pixels on each side, or ``"same"``.
        dilation: see there.
        bias: one per output channel.
        padding_mode: see there.
        nonlinearity: see :class:`~margeq.layers.ImplicitKernel`.
        omega_0: initial frequency; by default ``(kernel_size - 1) / 2``.
        hidden: width of the hidden layers of the filters.

    Shapes:
        ``[n, I, S, y, x] -> [n, O, S', y', x']``; ``weight [O, I, hidden + 1]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map with ``I`` channels on the samples of ``inputs``.

    Reference:
        Romero & Lohit 2022, eqs. 4 and 6; Finzi et al. 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        inputs: GroupSampler,
        outputs: GroupSampler,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        nonlinearity: str = "siren",
        omega_0: float | None = None,
        hidden: int = 32,
    ) -> None:
        window = Window(kernel_size, stride, padding, dilation, padding_mode)
        super().__init__(
            in_channels, out_channels, window, outputs, inputs, bias, omega_0,
            nonlinearity=nonlinearity, hidden=hidden,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, S, y, x]`` to ``[n, O, S', y', x']``."""
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise DataError(
                f"MonteCarloGroupConv2d takes maps [n, {self.in_channels}, S, y, x], got "
                f"{tuple(x.shape)}"
            )
        return self.convolve(x.flatten(1, 2))


register_split_rule(MonteCarloLiftingConv2d, MonteCarloGroupConv2d, rule=SAMPLED_RULE)
