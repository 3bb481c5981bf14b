"""All-CNN-C on groups of the plane: nothing but convolutions (Cohen & Welling 2016)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P4, P4M, Z2, FiniteGroup
from margeq.models.planar_layers import PlanarLayers, require_counts, warned

__all__ = ["all_cnn_c"]

_LAYERS = (  # which of the two widths, extent of the filters, stride
    (0, 3, 1), (0, 3, 1), (0, 3, 2), (1, 3, 1), (1, 3, 1), (1, 3, 2), (1, 3, 1), (1, 1, 1),
)  # fmt: skip
_WIDTHS = {Z2: (96, 192), P4: (48, 96), P4M: (32, 64)}


def all_cnn_c(
    group: FiniteGroup,
    widths: tuple[int, int] | None = None,
    separability: str = "full",
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    size: int | None = None,
) -> nn.Sequential:
    """Nine convolutions, two of them with stride 2, each with normalisation; mean read-out.

    Convolutions 1 to 7 have 3 x 3 filters and a border of zeros, 8 and 9 have 1 x 1 and are never
    separable. Convolution 9 has a channel for each class, whose mean over group and positions are
    the logits: there is no dense layer, and every size works. Layers with stride 2 are exactly
    equivariant to rotations only where the map's size is odd, as it is for pictures of
    ``4 m + 1`` pixels.

    Other than in the published networks, no rectifier follows the last normalisation, which would
    keep logits from being negative, and there is no dropout.

    Layers are ``conv1``, ``norm1``, ``relu1``, .. ``conv9``, ``norm9``, ``group_pool``, ``pool``
    and ``flatten``.

    Args:
        group: rotations and reflections of the plane; ``Z2`` for an ordinary network.
        widths: channels of layers 1 to 3 and of layers 4 to 8; by default those of the paper, for
            Z2, P4 and P4M.
        separability: of layers 2 to 7, see :class:`margeq.layers.GroupConv2d`.
        num_classes: number of outputs.
        in_channels: channels of the picture.
        size: pixels of the pictures, if known: layers that break the group's symmetry there are
            named in an :class:`~margeq.errors.EquivarianceWarning`.

    Returns:
        ``[n, in_channels, y, x] -> [n, num_classes]``.

    Raises:
        ConfigError: for a group without published widths, or an argument that a layer refuses.

    Reference:
        Springenberg et al. 2015; Cohen & Welling 2016, section 8.2.

    Example:
        >>> from margeq.groups import P4
        >>> model = all_cnn_c(P4)
        >>> sum(parameter.numel() for parameter in model.parameters())
        1371006
    """
    layers = PlanarLayers(group, separability)
    widths = _WIDTHS.get(group) if widths is None else widths
    if widths is None or len(widths) != 2:
        raise ConfigError(f"widths={widths} on {group!r}: give two, the first for layers 1 to 3")
    require_counts(widths=widths, num_classes=num_classes, in_channels=in_channels)
    modules: dict[str, nn.Module] = {}
    channels = in_channels
    for number, (place, kernel, stride) in enumerate(_LAYERS, 1):
        modules[f"conv{number}"] = layers.conv(
            channels, widths[place], kernel, lifts=number == 1, full=kernel == 1, stride=stride,
            padding=kernel // 2,
        )  # fmt: skip
        channels = widths[place]
        modules[f"norm{number}"] = layers.norm(channels)
        modules[f"relu{number}"] = nn.ReLU()
    modules["conv9"] = layers.conv(channels, num_classes, 1, full=True)
    modules |= {"norm9": layers.norm(num_classes), "group_pool": layers.group_pool("mean")}
    modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return warned(nn.Sequential(OrderedDict(modules)), group, in_channels, size)
