"""The demonstration's network: three blocks of candidate paths and a read-out blind to place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from margeq.errors import ConfigError
from margeq.layers import FactoredLinear2d, PolyphaseSubsample, ResidualPathways

__all__ = ["digit_network"]


def digit_network(
    n_classes: int,
    *,
    paths: Sequence[str] = ("conv", "fc"),
    widths: Sequence[int] = (8, 16, 32),
    in_channels: int = 1,
    size: int = 16,
) -> nn.Sequential:
    """Blocks of CONV (3x3, circular, polyphase) and F-FC, each halving the map.

    The head sees the mean over positions, so that CONV alone cannot tell where anything is.

    Args:
        n_classes: number of outputs.
        paths: ``"conv"``, ``"fc"``, or both.
        widths: channels after each block.
        in_channels: channels of the picture.
        size: its height and width, a multiple of ``2 ** len(widths)``.

    Returns:
        ``[n, in_channels, size, size] -> [n, n_classes]``.

    Raises:
        ConfigError: for a size that cannot be halved that often, or an unknown path.
    """
    if size % 2 ** len(widths):
        raise ConfigError(f"size={size} must be a multiple of {2 ** len(widths)}")
    unknown = set(paths) - {"conv", "fc"}
    if unknown:
        raise ConfigError(f"paths={tuple(paths)}: use 'conv' and 'fc'")
    modules: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, 1):
        candidates = {path: _path(path, in_channels, width, size) for path in paths}
        modules[f"layer{number}"] = ResidualPathways(candidates, reduction="sum")
        modules[f"relu{number}"] = nn.ReLU()
        in_channels, size = width, size // 2
    modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    modules["head"] = nn.Linear(in_channels, n_classes)
    return nn.Sequential(OrderedDict(modules))


def _path(path: str, in_channels: int, out_channels: int, size: int) -> nn.Module:
    if path == "fc":
        half = (size // 2, size // 2)
        return FactoredLinear2d(in_channels, out_channels, (size, size), half)
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv, PolyphaseSubsample())
