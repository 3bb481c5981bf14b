"""The convolutional network of 13 layers of Laine & Aila 2017 on samples of a continuous group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from margeq.layers import (
    GroupDistribution,
    GroupSampler,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    SampleBatchNorm,
    SamplePool,
    redraw,
)
from margeq.models.planar_layers import require_counts
from margeq.models.sampled_groups import SampledGroup, TrainedBy, distributions

__all__ = ["PartialCNN13"]

_N_GROUP_CONVS = 8
_POOL_AFTER = (2, 5)
_DROP_AFTER = (2, 5, 8)


class PartialCNN13(nn.Module):
    """Lifting and eight convolutions on the group, each with normalisation and a rectifier.

    Maps are halved after the convolutions 2 and 5, counted from the lifting as 0; channels are
    dropped after these and the last; the read-out is the mean over elements and positions.

    In training every batch sees other elements of the group, in evaluation always the same. Without
    ``partial`` all maps have the same elements; with it each convolution on the group has its own
    distribution, and only the lifting sees the whole group. Hidden layers and frequencies of
    filters are hyperparameters, see :class:`PartialResNet`.

    Differences to the published network: angles enter the filters as cosine and sine, one
    coordinate more; sums over elements are means; features are normalised, with phases that start
    uniformly and not at zero; and the frequency of each filter is a parameter.

    Args:
        whole: makes the distribution on the whole group.
        n_samples: of each distribution.
        partial: makes the distributions that are learned.
        num_classes: number of outputs.
        in_channels: channels of the picture.
        width: channels of the first two maps, twice as many from the third on.
        kernel_size: extent of all filters, odd.
        hidden: width of the hidden layers of the filters.
        omega_0: initial frequency of the filters. The published 10 is more than 3 x 3 pixels show
            of rotations; 1 is about what they can.
        dropout: probability.

    Shapes:
        ``[n, in_channels, y, x] -> [n, num_classes]``, of at least 4 x 4 pixels.

    Raises:
        ConfigError: for an argument out of range.

    Reference:
        Romero & Lohit 2022, section 5; Laine & Aila 2017, table 5.

    Example:
        >>> import torch
        >>> from margeq.layers import IdentityElement
        >>> model = PartialCNN13(IdentityElement, 1, width=2, hidden=2).eval()
        >>> model(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        whole: Callable[[], GroupDistribution],
        n_samples: int,
        partial: Callable[[], GroupDistribution] | None = None,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 128,
        kernel_size: int = 3,
        hidden: int = 8,
        omega_0: float = 10.0,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        kernel = {"hidden": hidden, "omega_0": omega_0, "padding": "same"}
        before = GroupSampler(whole(), n_samples)
        conv: nn.Module = MonteCarloLiftingConv2d(
            in_channels, width, kernel_size, outputs=before, **kernel
        )
        layers = _layers(conv, 0, width, before, dropout)
        channels = width
        for number in range(1, 1 + _N_GROUP_CONVS):
            after = before if partial is None else GroupSampler(partial(), n_samples)
            outputs = width if number == 1 else 2 * width
            conv = MonteCarloGroupConv2d(
                channels, outputs, kernel_size, inputs=before, outputs=after, **kernel
            )
            layers += _layers(conv, number, outputs, after, dropout)
            channels, before = outputs, after
        self.features = nn.Sequential(*layers)
        self.readout = nn.Sequential(
            SamplePool(before, "mean"), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(channels, num_classes)

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
        """The network on a usual group; arguments as for :meth:`PartialResNet.on`."""
        return cls(n_samples=n_samples, **distributions(group, partial, trained_by), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pictures, in training with elements of their own."""
        if self.training:
            redraw(self)
        return self.head(self.readout(self.features(x)))


def _layers(
    conv: nn.Module, number: int, channels: int, sampler: GroupSampler, dropout: float
) -> list[nn.Module]:
    """One convolution and what follows it."""
    found: list[nn.Module] = [conv, SampleBatchNorm(channels, sampler), nn.ReLU()]
    found += [nn.MaxPool3d((1, 2, 2))] if number in _POOL_AFTER else []
    found += [nn.Dropout3d(dropout)] if number in _DROP_AFTER else []
    return found
