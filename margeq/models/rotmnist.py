"""The networks for rotated digits of Cohen & Welling 2016 and of Lengyel & van Gemert 2021."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P4, P4M, Z2
from margeq.models.planar_layers import PlanarLayers, require_counts

__all__ = ["rotmnist_cnn"]

_KERNELS = (3, 3, 3, 3, 3, 3, 4)
_POOLED = 2  # after this layer
_SMALLEST = 28

_KINDS = {
    "z2": (Z2, "full"),
    "c-z2": (Z2, "gc"),
    "p4": (P4, "full"),
    "g-p4": (P4, "g"),
    "gc-p4": (P4, "gc"),
    "p4m": (P4M, "full"),
    "g-p4m": (P4M, "g"),
    "gc-p4m": (P4M, "gc"),
}


def rotmnist_cnn(
    kind: str,
    width: int,
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = _SMALLEST,
    readout: Literal["max", "mean"] = "max",
) -> nn.Sequential:
    """Seven convolutions, each with normalisation and a rectifier, and an invariant read-out.

        28 -> 26 -> 24 -> (pool) 12 -> 10 -> 8 -> 6 -> 4 -> 1

    Layer 1 maps from pictures and is never separable; layers 1 to 6 have 3 x 3 filters, layer 7 has
    4 x 4. Nothing is padded, so that the network on a group is invariant to its elements, exactly.

    Layers are ``conv1``, ``norm1``, ``relu1``, .. ``relu7``, with ``pool2``; then ``group_pool``,
    ``pool``, ``flatten`` and ``head``.

    Args:
        kind: the group, ``"z2"``, ``"p4"`` or ``"p4m"``, after ``"g-"`` or ``"gc-"`` for separable
            convolutions; ``"c-z2"`` is an ordinary network of 1 x 1 and depthwise convolutions.
        width: channels of every layer.
        num_classes: number of outputs.
        in_channels: channels of the picture.
        size: its height and width, even and at least 28; what is left of the map after layer 7 is
            pooled.
        readout: of the group and the positions, ``"max"`` as published or ``"mean"``.

    Returns:
        ``[n, in_channels, size, size] -> [n, num_classes]``.

    Raises:
        ConfigError: for an unknown kind or read-out, or a size out of range.

    Reference:
        Cohen & Welling 2016, section 8.1; Lengyel & van Gemert 2021, table 1.

    Example:
        >>> model = rotmnist_cnn("gc-p4", width=10)
        >>> sum(parameter.numel() for parameter in model.parameters())
        3420
    """
    if kind not in _KINDS:
        raise ConfigError(f"kind={kind!r}: use one of {', '.join(_KINDS)}")
    if readout not in ("max", "mean"):
        raise ConfigError(f"readout={readout!r}: use 'max' or 'mean'")
    require_counts(width=width, num_classes=num_classes, in_channels=in_channels, size=size)
    if size < _SMALLEST or size % 2:
        raise ConfigError(
            f"size={size}: seven convolutions and a pooling by two need an even size of at least "
            f"{_SMALLEST}; resize or pad the pictures"
        )
    layers = PlanarLayers(*_KINDS[kind])
    modules: dict[str, nn.Module] = {}
    for number, kernel in enumerate(_KERNELS, 1):
        channels = in_channels if number == 1 else width
        modules[f"conv{number}"] = layers.conv(channels, width, kernel, lifts=number == 1)
        modules[f"norm{number}"] = layers.norm(width)
        modules[f"relu{number}"] = nn.ReLU()
        if number == _POOLED:
            modules[f"pool{number}"] = layers.on_pictures(nn.MaxPool2d(2))
    modules["group_pool"] = layers.group_pool(readout)
    modules["pool"] = nn.AdaptiveMaxPool2d(1) if readout == "max" else nn.AdaptiveAvgPool2d(1)
    modules |= {"flatten": nn.Flatten(), "head": nn.Linear(width, num_classes)}
    return nn.Sequential(OrderedDict(modules))
