"""The residual network of Romero & Lohit 2022, figure 3, on samples of a continuous group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.layers import (
    GroupDistribution,
    GroupSampler,
    IdentityElement,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    SampleBatchNorm,
    SampleInstanceNorm,
    SamplePool,
    redraw,
)
from margeq.models.planar_layers import require_counts
from margeq.models.sampled_groups import SampledGroup, TrainedBy, distributions

__all__ = ["PartialResNet"]

_HEADS = ("max", "mlp", "t2")


@dataclass(frozen=True)
class _Kernels:
    """Options of all filters."""

    size: int
    functions: Mapping[str, Any]

    def spatial(self) -> dict[str, Any]:
        return {"kernel_size": self.size, **self.functions}

    def before_norm(self) -> dict[str, Any]:
        """A norm of each datum takes every bias away."""
        return {**self.spatial(), "padding": "same", "bias": False}

    def pointwise(self) -> dict[str, Any]:
        hidden = max(1, self.functions["hidden"] // 2)
        return {"kernel_size": 1, **self.functions, "hidden": hidden, "bias": False}


class PartialBlock(nn.Module):
    """Two convolutions with normalised outputs, and a shortcut around them.

        y = relu(pool(norm(relu(n2(conv2(dropout(relu(n1(conv1(x))))))) + shortcut(x))))

    ``n1`` and ``n2`` normalise each channel of each datum over elements and positions, in which
    elements count with their weight. The shortcut
    is a convolution of 1 x 1 pixels over the elements where channels or elements change.

    Args:
        in_channels: of the map.
        out_channels: of the result.
        samplers: elements of the map that is read, of the one between, and of the result.
        kernels: options of the filters.
        pools: whether to halve the map.
        dropout: probability.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        samplers: tuple[GroupSampler, GroupSampler, GroupSampler],
        kernels: _Kernels,
        pools: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        first, between, last = samplers
        self.conv1 = MonteCarloGroupConv2d(
            in_channels, out_channels, inputs=first, outputs=between, **kernels.before_norm(),
        )  # fmt: skip
        self.conv2 = MonteCarloGroupConv2d(
            out_channels, out_channels, inputs=between, outputs=last, **kernels.before_norm(),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or first is not last:
            self.shortcut = MonteCarloGroupConv2d(
                in_channels, out_channels, inputs=first, outputs=last, **kernels.pointwise()
            )
        self.norm1, self.norm2 = SampleInstanceNorm(between), SampleInstanceNorm(last)
        self.norm, self.dropout = SampleBatchNorm(out_channels, last), nn.Dropout(dropout)
        self.pool = _pool() if pools else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions find to the shortcut."""
        y = self.dropout(torch.relu(self.norm1(self.conv1(x))))
        y = torch.relu(self.norm2(self.conv2(y))) + self.shortcut(x)
        return torch.relu(self.pool(self.norm(y)))


class PartialResNet(nn.Module):
    """Lifting, two residual blocks, a last convolution, and a read-out.

    In training every batch sees other elements of the group, in evaluation always the same. Without
    ``partial`` all maps have the same elements; with it each convolution on the group has its own
    distribution, whose width is to be learned, and only the lifting sees the whole group. See
    :meth:`on` for the usual groups.

    The hidden layers and frequencies of filters are hyperparameters, which
    :func:`margeq.optimize_marglik` moves by the evidence; to another optimiser, of the task's loss,
    they are parameters like all others. So are distributions, as long as they are made with
    ``trained_by="loss"``.

    Differences to the published network: angles enter the filters as cosine and sine, one
    coordinate more; sums over elements are means; features are normalised; the frequency of each
    filter is a parameter; and convolutions before a normalisation of each datum have no bias, which
    it would take away.

    Args:
        whole: makes the distribution on the whole group.
        n_samples: of each distribution.
        partial: makes the distributions that are learned.
        num_classes: number of outputs.
        in_channels: channels of the picture.
        width: channels, twice as many from the second block on.
        kernel_size: extent of all filters, odd.
        hidden: width of the hidden layers of the filters.
        omega_0: initial frequency of the filters.
        nonlinearity: of the hidden layers, see :class:`~margeq.layers.kernel.ImplicitKernel`.
        pool_after: maps that are halved: 0 the lifted one, 1 and 2 those of the blocks.
        dropout: probability, within the blocks.
        head: ``"max"`` over elements and positions; ``"mlp"``, a hidden layer on all elements (the
            paper does not state its sizes: here as wide as the map), whose number is fixed, so
            that the last map stands on the whole group; or ``"t2"``, a last convolution whose
            outputs stand at the identity alone.

    Shapes:
        ``[n, in_channels, y, x] -> [n, num_classes]``; after pooling, maps of at least
        ``kernel_size`` pixels.

    Raises:
        ConfigError: for an unknown head, a map that does not exist, or an argument out of range.

    Reference:
        Romero & Lohit 2022, section 5.

    Example:
        >>> from margeq.layers import IdentityElement
        >>> model = PartialResNet(lambda: IdentityElement(has_rotations=True), 1)
        >>> sum(parameter.numel() for parameter in model.parameters())
        450065
    """

    def __init__(
        self,
        whole: Callable[[], GroupDistribution],
        n_samples: int,
        partial: Callable[[], GroupDistribution] | None = None,
        *,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 32,
        kernel_size: int = 7,
        hidden: int = 32,
        omega_0: float = 10.0,
        nonlinearity: str = "siren",
        pool_after: Collection[int] = (0, 1),
        dropout: float = 0.0,
        head: Literal["max", "mlp", "t2"] = "max",
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        if head not in _HEADS:
            raise ConfigError(f"head={head!r}: use one of {_HEADS}")
        if not set(pool_after) <= {0, 1, 2}:
            raise ConfigError(f"pool_after={tuple(pool_after)}: use any of 0, 1 and 2")
        functions = {"hidden": hidden, "omega_0": omega_0, "nonlinearity": nonlinearity}
        kernels = _Kernels(kernel_size, functions)
        first, *others = _samplers(whole, partial, n_samples, head)
        self.conv = MonteCarloLiftingConv2d(
            in_channels, width, outputs=first, padding="same", **kernels.spatial()
        )
        self.norm = SampleBatchNorm(width, first)
        self.pool = _pool() if 0 in pool_after else nn.Identity()
        self.block1 = PartialBlock(
            width, width, (first, others[0], others[1]), kernels, 1 in pool_after, dropout
        )
        self.block2 = PartialBlock(
            width, 2 * width, (others[1], others[2], others[3]), kernels, 2 in pool_after, dropout
        )
        self.last = MonteCarloGroupConv2d(
            2 * width, 2 * width, inputs=others[3], outputs=others[4], **kernels.spatial()
        )
        self.last_norm = SampleBatchNorm(2 * width, others[4])
        self.readout: nn.Module = nn.Sequential(
            SamplePool(others[4]), nn.AdaptiveMaxPool2d(1), nn.Flatten()
        )
        if head == "mlp":
            angles, *_ = others[4].distribution.quadrature(n_samples)
            self.readout = _mlp(2 * width, len(angles))
        self.head = nn.Linear(2 * width, num_classes)

    @classmethod
    def on(
        cls,
        group: SampledGroup,
        n_samples: int = 8,
        *,
        partial: bool = False,
        trained_by: TrainedBy = "evidence",
        **options: Any,
    ) -> Self:
        """The network on a usual group.

        Args:
            group: ``"T(2)"`` (the identity alone, with the filters of ``"SE(2)"``), ``"SE(2)"``
                (rotations), ``"E(2)"`` (and reflections), or ``"mirror"`` (reflections alone).
            n_samples: of the whole group.
            partial: whether each convolution on it learns a part of it.
            trained_by: of what is learned, see :class:`~margeq.layers.PlanarSubset`.
            options: further arguments, such as ``head``.

        Returns:
            The network.

        Raises:
            ConfigError: for an argument out of range.

        Example:
            >>> model = PartialResNet.on("SE(2)", partial=True)
            >>> sum(parameter.numel() for parameter in model.parameters())
            467799
        """
        return cls(n_samples=n_samples, **distributions(group, partial, trained_by), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pictures, in training with elements of their own."""
        if self.training:
            redraw(self)
        y = torch.relu(self.pool(self.norm(self.conv(x))))
        y = self.last(self.block2(self.block1(y)))
        return self.head(self.readout(torch.relu(self.last_norm(y))))


def _samplers(
    whole: Callable[[], GroupDistribution],
    partial: Callable[[], GroupDistribution] | None,
    n_samples: int,
    head: str,
) -> list[GroupSampler]:
    """Elements of the lifted map and of the five that follow."""
    first = GroupSampler(whole(), n_samples)
    found = [first]
    for _ in range(5):
        found.append(first if partial is None else GroupSampler(partial(), n_samples))
    if head == "t2":
        found[-1] = GroupSampler(IdentityElement(), 1)
    if head == "mlp" and partial is not None:
        found[-1] = GroupSampler(whole(), n_samples)
    return found


def _pool() -> nn.Module:
    return nn.MaxPool3d((1, 2, 2))


def _mlp(channels: int, n_elements: int) -> nn.Sequential:
    """The largest value of each channel at each element, and a hidden layer on all of them."""
    return nn.Sequential(
        nn.AdaptiveMaxPool3d((None, 1, 1)), nn.Flatten(),
        nn.Linear(n_elements * channels, channels), nn.ReLU(),
    )  # fmt: skip
