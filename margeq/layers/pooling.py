"""Subsampling that keeps shift equivariance exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from margeq.errors import DataError

__all__ = ["BatchPolyphaseSubsample", "PolyphaseSubsample"]


class PolyphaseSubsample(nn.Module):
    """Keep the one of the four phases ``x[a::2, b::2]`` with the largest l2 norm, per sample.

    The norm runs over channels (and any group axis) jointly and each sample chooses for itself,
    so predictions do not depend on the batch and circular shifts commute with the network. So do
    the turns and mirrors of a group that acts on the channels' elements and on the pixels. Paths
    that are added up need one phase for all: ``ResidualPathways(..., subsample=...)``.

    Shapes:
        ``[n, ..., H, W] -> [n, ..., H/2, W/2]`` with even ``H`` and ``W``.

    Raises:
        DataError: for odd sizes, whose phases differ in size.

    Reference:
        Chaman & Dokmanic 2021; ELLA 5.

    Example:
        >>> import torch
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> PolyphaseSubsample()(x)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Select the phase of each sample."""
        phases = _phases(x)
        energies = phases.detach().square().flatten(2).sum(-1)
        return phases[torch.arange(len(x), device=x.device), energies.argmax(1)]


class BatchPolyphaseSubsample(nn.Module):
    """Keep, for the whole batch, the phase ``x[a::2, b::2]`` that holds the largest entry.

    What the published code of ELLA computes, for reproductions only: the maximum is signed and runs
    over the batch, so the prediction for a sample depends on the samples beside it and circular
    shifts do not commute with the network. Use :class:`PolyphaseSubsample` for anything else.

    Shapes:
        ``[n, ..., H, W] -> [n, ..., H/2, W/2]`` with even ``H`` and ``W``.

    Raises:
        DataError: for odd sizes, whose phases differ in size.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 2, 2)
        >>> x[..., 0, 1], x[..., 1, 0] = 1.0, -3.0
        >>> BatchPolyphaseSubsample()(x)
        tensor([[[[1.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Select one phase for all samples."""
        phases = _phases(x)
        if not len(x):
            return phases[:, 0]  # an empty batch has no largest entry
        best = phases.detach().transpose(0, 1).flatten(1).amax(1).argmax()
        return phases.index_select(1, best[None])[:, 0]


def _phases(x: Tensor) -> Tensor:
    """The four phases ``[n, 4, ..., H/2, W/2]``."""
    *leading, height, width = x.shape
    if height % 2 or width % 2:
        raise DataError(
            f"polyphase subsampling needs even sizes, got a map of {height} x {width}; pad or "
            f"crop the input to a multiple of two at each level"
        )
    split = x.reshape(*leading, height // 2, 2, width // 2, 2)
    return split.movedim((-3, -1), (1, 2)).flatten(1, 2)
