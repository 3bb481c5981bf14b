"""Inputs that a weight sees from several frames: the same patch, turned and mirrored.

A group convolution is a weight shared over ``|H| * positions``: at element h it meets the patch
moved back by h. All frames of a patch hold the same numbers, so their covariance follows from that
of the patches alone,

    A = sum_h P_h A_patches P_h^T .
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from margeq.curvature.fourier import GroupCirculant
from margeq.groups import FiniteGroup

__all__ = ["BasisFrames", "Frames", "PixelFrames"]


class Frames(ABC):
    """The linear maps ``P_h`` from a patch ``[c, u, x]`` to what the weight sees at element h."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Number of frames."""

    @property
    def symmetry(self) -> GroupCirculant | None:
        """What commutes with covariances over all frames, where decompositions can profit."""
        return None

    @abstractmethod
    def apply(self, rows: Tensor) -> Tensor:
        """Rows ``[n, m, b, i]`` in all frames, ``[n, (h m), b, j]``."""

    @abstractmethod
    def conjugate(self, cov: Tensor) -> Tensor:
        """``sum_h P_h A P_h^T`` of covariances ``[b, i, i]``."""


@dataclass(frozen=True, eq=False)
class PixelFrames(Frames):
    """Frames that reorder the entries of a patch.

    Attributes:
        index: ``[h, l]``, the entry of the patch that stands at place l in frame h, within each of
            the channels.
        group: whose elements the frames are, ``index[g h, l] = index[g, index[h, l]]``.
    """

    index: Tensor
    group: FiniteGroup | None = None

    @property
    def order(self) -> int:
        """Number of frames."""
        return len(self.index)

    @property
    def symmetry(self) -> GroupCirculant | None:
        """The group, if no element but the identity leaves any entry in its place."""
        return None if self.group is None else GroupCirculant.of(self.group, self.index)

    def apply(self, rows: Tensor) -> Tensor:
        """Rows ``[n, m, b, (c l)]`` in all frames, ``[n, (h m), b, (c l)]``."""
        by_channel = rows.unflatten(-1, (-1, self.index.shape[1]))
        framed = by_channel[..., self.index]  # [n, m, b, c, h, l]
        return framed.movedim(4, 1).flatten(1, 2).flatten(-2)

    def conjugate(self, cov: Tensor) -> Tensor:
        """``sum_h P_h A P_h^T`` of covariances ``[b, i, i]``."""
        length = self.index.shape[1]
        channels = torch.arange(cov.shape[-1] // length, device=cov.device)
        order = (channels[:, None] * length + self.index[:, None]).flatten(1)
        return sum(
            (cov.index_select(1, o).index_select(2, o) for o in order), torch.zeros_like(cov)
        )


@dataclass(frozen=True, eq=False)
class BasisFrames(Frames):
    """Frames in which a patch is compared with rotated functions.

    Attributes:
        source: ``[h, u]``, the group element of the patch that stands at place u in frame h.
        basis: ``[h, m, x]``, the functions of each frame on the pixels of the patch.
    """

    source: Tensor
    basis: Tensor

    @property
    def order(self) -> int:
        """Number of frames."""
        return len(self.basis)

    def apply(self, rows: Tensor) -> Tensor:
        """Rows ``[n, t, b, (c u x)]`` in all frames, ``[n, (h t), b, (c u m)]``."""
        split = rows.unflatten(-1, (-1, self.source.shape[1], self.basis.shape[2]))
        basis = self.basis.to(rows.dtype)
        framed = torch.einsum("ntbchux,hmx->nhtbcum", split[..., self.source, :], basis)
        return framed.flatten(1, 2).flatten(-3)

    def conjugate(self, cov: Tensor) -> Tensor:
        """``sum_h P_h A P_h^T`` of covariances ``[b, i, i]``."""
        shape = (-1, self.source.shape[1], self.basis.shape[2])
        split = cov.unflatten(2, shape).unflatten(1, shape)
        total = torch.zeros((), dtype=cov.dtype, device=cov.device)
        for source, basis in zip(self.source, self.basis.to(cov.dtype), strict=True):
            moved = split.index_select(2, source).index_select(5, source)
            total = total + torch.einsum("mx,bcuxdvy,ky->bcumdvk", basis, moved, basis)
        return total.flatten(4).flatten(1, 3)
