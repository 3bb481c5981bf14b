"""ResNet44 with pre-activation on groups of the plane (Lengyel & van Gemert 2021)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.groups import P4M, Z2, FiniteGroup
from margeq.models.planar_layers import PlanarLayers, require_counts, warned

__all__ = ["resnet44"]

_BLOCKS = 7
_STAGES = 3
_WIDTHS = {
    (Z2, "full"): (32, 64, 128),
    (P4M, "full"): (11, 23, 45),
    (P4M, "g"): (19, 38, 76),
    (P4M, "gc"): (28, 56, 112),
}


class PreActivationBlock(nn.Module):
    """Two convolutions, each after normalisation and a rectifier, and a shortcut around them.

        y = conv2(relu(norm2(conv1(relu(norm1(x)))))) + shortcut(x)

    The shortcut is the identity, or where channels or sizes change a 1 x 1 convolution, which is
    never separable, with normalisation.

    Args:
        layers: makes the layers.
        in_channels: of the map.
        out_channels: of the result.
        stride: of the first convolution and the shortcut.
    """

    def __init__(
        self, layers: PlanarLayers, in_channels: int, out_channels: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.norm1, self.relu1 = layers.norm(in_channels), nn.ReLU()
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2, self.relu2 = layers.norm(out_channels), nn.ReLU()
        self.conv2 = layers.conv(out_channels, out_channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                layers.conv(in_channels, out_channels, 1, full=True, stride=stride),
                layers.norm(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions find to the shortcut."""
        y = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(y))) + self.shortcut(x)


def resnet44(
    group: FiniteGroup,
    widths: tuple[int, int, int] | None = None,
    separability: str = "full",
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    size: int | None = None,
    head: Literal["flatten", "pool"] = "flatten",
) -> nn.Sequential:
    """A convolution, three stages of seven residual blocks, and the mean over positions.

    Stages 2 and 3 halve the map with stride 2, which is exactly equivariant to rotations only where
    its size is odd, as it is for pictures of ``4 m + 1`` pixels. Convolutions have no bias.

    Layers are ``conv``, ``stage1`` .. ``stage3`` of blocks ``0`` .. ``6``, ``norm``, ``relu``,
    ``pool``, ``group_pool``, ``flatten`` and ``head``.

    Args:
        group: rotations and reflections of the plane; ``Z2`` for an ordinary network.
        widths: channels of each stage; by default those of the paper, for Z2, and for P4M with
            ``"full"``, ``"g"`` and ``"gc"``.
        separability: of the 3 x 3 convolutions between maps, see
            :class:`margeq.layers.GroupConv2d`.
        num_classes: number of outputs.
        in_channels: channels of the picture.
        size: pixels of the pictures, if known: layers that break the group's symmetry there are
            named in an :class:`~margeq.errors.EquivarianceWarning`.
        head: ``"flatten"``, as published: it tells the elements apart; or ``"pool"``, invariant:
            it sees their mean.

    Returns:
        ``[n, in_channels, y, x] -> [n, num_classes]``.

    Raises:
        ConfigError: for a group without published widths, an unknown head, or an argument that a
            layer refuses.

    Reference:
        He et al. 2016; Lengyel & van Gemert 2021, table 2.

    Example:
        >>> from margeq.groups import P4M
        >>> model = resnet44(P4M, separability="gc")
        >>> sum(parameter.numel() for parameter in model.parameters())
        1884270
    """
    layers = PlanarLayers(group, separability, bias=False)
    widths = _WIDTHS.get((group, separability)) if widths is None else widths
    if widths is None or len(widths) != _STAGES:
        raise ConfigError(
            f"widths={widths} on {group!r} with separability={separability!r}: give three, one "
            f"for each stage"
        )
    if head not in ("flatten", "pool"):
        raise ConfigError(f"head={head!r}: use 'flatten' or 'pool'")
    require_counts(widths=widths, num_classes=num_classes, in_channels=in_channels)
    conv = layers.conv(in_channels, widths[0], 3, lifts=True, padding=1)
    modules: dict[str, nn.Module] = {"conv": conv}
    for number, (before, width) in enumerate(pairwise((widths[0], *widths)), 1):
        modules[f"stage{number}"] = _stage(layers, before, width, stride=1 if number == 1 else 2)
    modules |= {"norm": layers.norm(widths[-1]), "relu": nn.ReLU()}
    modules["pool"] = layers.on_pictures(nn.AdaptiveAvgPool2d(1))
    modules["group_pool"] = layers.group_pool("mean") if head == "pool" else nn.Identity()
    elements = 1 if head == "pool" else group.order
    modules |= {"flatten": nn.Flatten(), "head": nn.Linear(elements * widths[-1], num_classes)}
    return warned(nn.Sequential(OrderedDict(modules)), group, in_channels, size)


def _stage(layers: PlanarLayers, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    rest = (PreActivationBlock(layers, channels, channels) for _ in range(_BLOCKS - 1))
    return nn.Sequential(PreActivationBlock(layers, in_channels, channels, stride), *rest)
