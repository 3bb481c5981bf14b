"""Three blocks that choose between symmetries on maps of a group, blind to place and pose."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P4, FiniteGroup
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    GroupPool,
    LiftingConv2d,
    MergeGroup,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    PolyphaseSubsample,
    ResidualPathways,
    SplitGroup,
)

__all__ = ["group_digit_network"]


def group_digit_network(
    n_classes: int,
    *,
    group: FiniteGroup = P4,
    paths: Sequence[str] = ("gconv", "conv"),
    separability: str = "full",
    widths: Sequence[int] = (4, 8, 16),
    in_channels: int = 1,
    size: int = 16,
) -> nn.Sequential:
    """Blocks of GCONV, CONV and F-FC between maps of a group, each halving the map.

    The spaces are nested, GCONV < CONV < F-FC: CONV has a filter for each pair of group elements.
    Between GCONV and CONV lies PARTIAL: a GCONV, always of the full kind, whose output elements
    count as much as a gate lets them, with a gate of its own in each block.
    All convolutions are 3x3 and circular, and share one polyphase phase per block. The head sees
    the mean over group and positions, so that GCONV alone cannot tell how anything is turned, and
    CONV alone not where it is.

    Args:
        n_classes: number of outputs.
        group: rotations and reflections of the plane.
        paths: any of ``"gconv"``, ``"partial"``, ``"conv"`` and ``"fc"``.
        separability: of GCONV after the first block.
        widths: channels after each block; each has all group elements.
        in_channels: channels of the picture.
        size: its height and width, a multiple of ``2 ** len(widths)``.

    Returns:
        ``[n, in_channels, size, size] -> [n, n_classes]``.

    Raises:
        ConfigError: for a size that cannot be halved that often, or an unknown path.
    """
    if size % 2 ** len(widths):
        raise ConfigError(f"size={size} must be a multiple of {2 ** len(widths)}")
    unknown = set(paths) - set(_PATHS)
    if unknown or not paths:
        raise ConfigError(f"paths={tuple(paths)}: use any of {tuple(_PATHS)}")
    modules: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, 1):
        block = _Block(in_channels, width, size, group, separability, first=number == 1)
        candidates = {path: _PATHS[path](block) for path in paths}
        before = [path for path in paths if path != "fc"]
        subsample = PolyphaseSubsample() if before else None
        modules[f"layer{number}"] = ResidualPathways(candidates, "sum", subsample, before)
        modules[f"relu{number}"] = nn.ReLU()
        in_channels, size = width, size // 2
    modules |= {"group_pool": GroupPool(group, "mean"), "pool": nn.AdaptiveAvgPool2d(1)}
    modules |= {"flatten": nn.Flatten(), "head": nn.Linear(in_channels, n_classes)}
    return nn.Sequential(OrderedDict(modules))


class _Block:
    """Sizes of one block."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        group: FiniteGroup,
        separability: str,
        first: bool,
    ) -> None:
        self.in_channels, self.out_channels, self.size = in_channels, out_channels, size
        self.group, self.separability, self.first = group, separability, first

    @property
    def merged(self) -> tuple[int, int]:
        """Channels in and out, each with all elements that it has."""
        order = self.group.order
        return self.in_channels * (1 if self.first else order), self.out_channels * order

    def on_merged(self, module: nn.Module) -> nn.Sequential:
        """A layer between ordinary maps, put between maps of the group."""
        merge = [] if self.first else [MergeGroup()]
        return nn.Sequential(*merge, module, SplitGroup(self.group))


def _gconv(block: _Block) -> nn.Module:
    channels = (block.in_channels, block.out_channels, 3)
    if block.first:
        return LiftingConv2d(*channels, group=block.group, padding=1, padding_mode="circular")
    return GroupConv2d(
        *channels, group=block.group, separability=block.separability, padding=1,
        padding_mode="circular",
    )  # fmt: skip


def _partial(block: _Block) -> nn.Module:
    # no input_gate: other paths fill elements that the gate of the block before leaves out
    make = PartialLiftingConv2d if block.first else PartialGroupConv2d
    return make(
        block.in_channels, block.out_channels, 3, group=block.group, padding=1,
        padding_mode="circular",
    )  # fmt: skip


def _conv(block: _Block) -> nn.Module:
    return block.on_merged(nn.Conv2d(*block.merged, 3, padding=1, padding_mode="circular"))


def _fc(block: _Block) -> nn.Module:
    half = block.size // 2
    return block.on_merged(FactoredLinear2d(*block.merged, (block.size, block.size), (half, half)))


_PATHS: dict[str, Callable[[_Block], nn.Module]] = {
    "gconv": _gconv,
    "partial": _partial,
    "conv": _conv,
    "fc": _fc,
}
