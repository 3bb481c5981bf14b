"""Three convolutions on maps of a group, each behind it a gate: how much symmetry does it keep?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P4, FiniteGroup
from margeq.layers import GroupConv2d, GroupGate, GroupPool, LiftingConv2d
from margeq.models.planar_layers import require_counts

__all__ = ["partial_cnn"]

_N_LAYERS = 3


def partial_cnn(
    n_classes: int,
    *,
    group: FiniteGroup = P4,
    partial: bool = True,
    width: float = 0.8,
    mirror: float = 0.8,
    trained_by: Literal["evidence", "loss"] = "evidence",
    widths: Sequence[int] = (8, 8, 16),
    in_channels: int = 1,
    kernel_size: int = 5,
) -> nn.Sequential:
    """Lifting and two group convolutions, each with batch normalisation, ReLU and a gate.

    The first map is halved, the last convolution is unpadded, and the largest value over elements
    and positions is read out. Without gates the network is invariant to the group, where the maps
    can be halved exactly (sizes that are a multiple of 2); of ``C(1)`` it is an ordinary CNN.

    Args:
        n_classes: number of outputs.
        group: ``C(n)`` or ``D(n)``.
        partial: whether there are gates.
        width: of the gates at the start, as in :class:`margeq.layers.GroupGate`.
        mirror: see there.
        trained_by: see there.
        widths: channels of the three maps; each has all group elements.
        in_channels: channels of the picture.
        kernel_size: extent of all filters, odd.

    Shapes:
        ``[n, in_channels, y, x] -> [n, n_classes]``; at least ``2 * kernel_size`` pixels.

    Returns:
        The network.

    Raises:
        ConfigError: for an argument out of range.

    Reference:
        Romero & Lohit 2022, here with deterministic gates.

    Example:
        >>> network = partial_cnn(10, width=0.5)
        >>> print(network.gate3.learned_subset())
        rotations within ±90°
    """
    require_counts(n_classes=n_classes, in_channels=in_channels)
    if len(widths) != _N_LAYERS:
        raise ConfigError(f"widths={tuple(widths)}: give {_N_LAYERS} numbers of channels")
    modules: dict[str, nn.Module] = {}
    for number, channels in enumerate(widths, 1):
        padding = 0 if number == _N_LAYERS else kernel_size // 2
        kind = LiftingConv2d if number == 1 else GroupConv2d
        modules[f"conv{number}"] = kind(
            in_channels, channels, kernel_size, group=group, padding=padding
        )
        modules |= {f"norm{number}": nn.BatchNorm3d(channels), f"relu{number}": nn.ReLU()}
        if partial:
            modules[f"gate{number}"] = GroupGate(group, width, mirror, trained_by=trained_by)
        if number == 1:
            modules["halve"] = nn.MaxPool3d((1, 2, 2))
        in_channels = channels
    modules |= {"group_pool": GroupPool(group), "pool": nn.AdaptiveMaxPool2d(1)}
    modules |= {"flatten": nn.Flatten(), "head": nn.Linear(in_channels, n_classes)}
    return nn.Sequential(OrderedDict(modules))
