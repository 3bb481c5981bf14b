"""Sparsified convolution (S-CONV, ELLA eq. 6): filters from few anchors, in a basis.

The chain rule puts the basis in front of a plain convolution, so the curvature is that of the
convolution on projected patches (ELLA eqs. 39-42).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from margeq.bases import Anchors
from margeq.curvature.io import InputRows, PositionSampler, Rule, register_split_rule
from margeq.errors import ConfigError
from margeq.layers.basis import AnchorBasis, lengthscale_penalty, patches_at_anchors
from margeq.layers.convolution import conv_inputs, conv_output_grads

__all__ = ["SparseConv2d"]


class SparseConv2d(nn.Conv2d):
    """Convolution whose filters are smooth functions through few values (S-CONV, ELLA eq. 6).

        w[d,c,x] = sum_m u[d,c,m] Psi(l)[m,x],   y = conv(x, w) + b

    The weights are ``u``; lengthscales (and anchors, if learned) are hyperparameters.

    Args:
        in_channels: ``C``.
        out_channels: ``D``.
        kernel_size: as in ``torch.nn.Conv2d``, like the next six.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        bias: see there.
        padding_mode: see there; every mode of ``torch.nn.Conv2d``.
        anchors: ``"grid"``, a share of the pixels, a number, or positions ``[M, 2]`` in pixels.
        learn_anchors: whether the evidence moves the anchors.
        basis: ``"rbf"``, ``"exponential"`` or ``"identity"``.
        lengthscale: initial value in pixels.
        per_filter: one lengthscale per output channel instead of one per layer.
        lengthscale_spread: standard deviation of the normal prior of the log lengthscales around
            the initial value (a penalty in the evidence), ``None`` for none; by default 1 for
            lengthscales per filter and none for one per layer.
        seed: of randomly placed anchors.

    Shapes:
        ``[n, C, H, W] -> [n, D, H', W']``; ``weight [D, C / groups, M]``.

    Raises:
        ConfigError: for an argument out of range.

    Example:
        >>> layer = SparseConv2d(2, 3, 3, padding=1, padding_mode="circular")
        >>> layer.weight.shape, layer(torch.zeros(1, 2, 8, 8)).shape
        (torch.Size([3, 2, 5]), torch.Size([1, 3, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        anchors: Anchors = 0.5,
        learn_anchors: bool = False,
        basis: str = "rbf",
        lengthscale: float = 1.0,
        per_filter: bool = False,
        lengthscale_spread: float | str | None = "auto",
        seed: int = 0,
    ) -> None:
        _check_sizes(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size,
            stride=stride, dilation=dilation,
        )  # fmt: skip
        if not isinstance(padding, str):
            _check_sizes(smallest=0, padding=padding)
        try:
            super().__init__(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                padding_mode,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"SparseConv2d: {error}") from error
        self.basis = AnchorBasis(
            self.kernel_size,
            anchors=anchors,
            learn_anchors=learn_anchors,
            kernel=basis,
            lengthscale=lengthscale,
            n_filters=out_channels if per_filter else 1,
            lengthscale_spread=lengthscale_penalty(lengthscale_spread, per_filter),
            seed=seed,
        )
        # the weights are the values at the anchors, not the filters
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, self.basis.n_anchors)
        )
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> SparseConv2d:
        """The sparsified layer whose filters come closest to those of a convolution.

        Args:
            conv: an ordinary convolution, left as it is.
            **options: anchors, basis, lengthscale, ... of the new layer.

        Returns:
            A new layer on the convolution's device, in its dtype.

        Raises:
            ConfigError: for anything but an ordinary ``nn.Conv2d``, or an option out of range.
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv, SparseConv2d):
            raise ConfigError(f"from_conv takes an ordinary nn.Conv2d, not {type(conv).__name__}")
        padding: Any = conv.padding
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding,  # pyright: ignore[reportArgumentType]
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, **options,  # pyright: ignore[reportArgumentType]
        ).to(conv.weight)  # fmt: skip
        with torch.no_grad():
            filters = conv.weight.flatten(2)
            grouped = filters if layer.basis.n_filters > 1 else filters[None]
            layer.weight.copy_(layer.basis.fit(grouped).reshape(layer.weight.shape))
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    @property
    def lengthscale(self) -> Tensor:
        """In pixels, ``[1]`` or ``[D]``."""
        return self.basis.lengthscale

    def reset_parameters(self) -> None:
        """Normal weights under which filters have unit gain, zero biases."""
        if "basis" not in self._modules:
            return  # the parent's constructor, before there is a basis
        if self.weight.is_meta:
            return  # nothing to write to, and no basis to read
        with torch.no_grad():
            self.weight.normal_(0.0, self.fan_in("weight") ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white inputs: the function scale."""
        return self.in_channels // self.groups * self.basis.square_norm()

    def bases(self) -> dict[str, tuple[str, AnchorBasis]]:
        """Weight -> on which side of it a basis stands, and that basis."""
        return {"weight": ("input", self.basis)}

    def filters(self) -> Tensor:
        """The filters that the layer convolves with, ``[D, C / groups, *kernel_size]``."""
        induced = torch.einsum("dcm,dmx->dcx", self.weight, self.basis().to(self.weight.dtype))
        return induced.reshape(*self.weight.shape[:2], *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[n, C, H, W]`` with the filters."""
        return self._conv_forward(input, self.filters(), self.bias)


def _check_sizes(smallest: int = 1, **sizes: int | tuple[int, int]) -> None:
    """Refuse what ``nn.Conv2d`` lets pass and then trips over, if it does not compute nonsense."""
    for name, value in sizes.items():
        extents = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(extent, int) and extent >= smallest for extent in extents):
            raise ConfigError(
                f"SparseConv2d: {name}={value!r} needs whole numbers of at least {smallest}"
            )


def _inputs(layer: SparseConv2d, x: Tensor, sampler: PositionSampler) -> Mapping[str, InputRows]:
    found = conv_inputs(layer, x, sampler)
    rows = patches_at_anchors(
        layer.basis, found["weight"].rows, layer.in_channels // layer.groups,
        layer.out_channels // layer.groups,
    )  # fmt: skip
    found["weight"] = InputRows(rows, found["weight"].n_positions, "boi")
    return found


def _grads(layer: SparseConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    found = conv_output_grads(layer, x, grad_y)
    if layer.basis.n_filters > 1:
        found["weight"] = found["weight"].flatten(3)[..., None]
    return found


register_split_rule(SparseConv2d, rule=Rule(_inputs, _grads))
