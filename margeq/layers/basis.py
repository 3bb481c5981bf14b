"""The fixed basis in front of, or behind, the plain map of a sparsified layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from margeq.bases import Anchors, Kernel, grid, group_grid, interpolation, place_anchors
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.remembered import Remembered
from margeq.linalg import accumulation_dtype, project

__all__ = ["AnchorBasis", "lengthscale_penalty", "patches_at_anchors"]

_LENGTHSCALES = (1e-6, 1e9)
"""In pixels. Beyond, filters hardly change; within, every entry and derivative is finite."""


class AnchorBasis(nn.Module):
    """``Psi(l) [G, M, X]``: filters over ``X`` pixels from values at ``M`` anchors (ELLA eq. 6).

    Its lengthscales, and its anchors if they are learned, are hyperparameters: the evidence
    moves them, the training loss never does. A small lengthscale leaves the pixels independent,
    an infinite one makes filters constant.

    Args:
        shape: extents of the filter, ``X`` pixels; with ``group`` those in the plane.
        anchors: see :func:`margeq.bases.place_anchors`.
        learn_anchors: whether the evidence moves the anchors too.
        kernel: ``"rbf"``, ``"exponential"``, or ``"identity"`` for one free value per pixel.
        lengthscale: initial value, in pixels, from 1e-6 to 1e9.
        n_filters: ``G``, number of lengthscales.
        group: of filters on a group of the plane, whose ``X`` points are all pixels for each
            element. Each filter then has two lengthscales, in pixels and along the group, where
            two rotations are ``2 sin(angle / 2)`` apart. The second starts with turns that, at
            the middle of the filter's sides, move a point by the first.
        lengthscale_spread: standard deviation of the normal prior of ``log l`` around its initial
            value, a penalty in the evidence; ``None`` for no penalty.
        seed: of randomly placed anchors.

    Raises:
        ConfigError: for an argument out of range.
    """

    hyperparameter_names: ClassVar[tuple[str, ...]] = ("log_lengthscale", "anchors")
    anchors: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        anchors: Anchors = 0.5,
        learn_anchors: bool = False,
        kernel: Kernel | str = "rbf",
        lengthscale: float = 1.0,
        n_filters: int = 1,
        group: FiniteGroup | None = None,
        lengthscale_spread: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_scales(lengthscale, lengthscale_spread)
        known = (*get_args(Kernel), "identity")
        if kernel not in known:
            raise ConfigError(f"basis={kernel!r}: use one of {known}")
        self.kernel, self.n_filters, self.group = kernel, n_filters, group
        self.lengthscale_spread = lengthscale_spread
        self.shape = torch.Size(shape)
        dtype = torch.get_default_dtype()
        positions = place_anchors(anchors, shape, seed, group)
        positions = positions.to(torch.get_default_device(), dtype)
        # part of the state: the penalty of a checkpoint is about its own initial value
        self.log_center = nn.Buffer(self._initial_logs(lengthscale).to(dtype))
        if kernel == "identity":
            if not isinstance(anchors, str) or learn_anchors:
                raise ConfigError("basis='identity' needs anchors='grid', which do not move")
            self.register_parameter("log_lengthscale", None)
        else:
            logs = self.log_center.repeat(n_filters, *[1] * self.log_center.ndim)
            self.log_lengthscale = nn.Parameter(logs)
        self.anchors = nn.Parameter(positions) if learn_anchors else nn.Buffer(positions)
        self._remembered = Remembered()
        self._pinned: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be computed again."""
        return self.__dict__ | {"_pinned": None}

    @property
    def pixels(self) -> Tensor:
        """Positions of the pixels ``[X, d]``; no state, so that a checkpoint is complete."""
        device = self.anchors.device
        dtype = accumulation_dtype(device)
        if self.group is None:
            return grid(self.shape, dtype=dtype, device=device)
        return group_grid(self.group, self.shape, dtype=dtype, device=device)

    @property
    def n_anchors(self) -> int:
        """``M``."""
        return len(self.anchors)

    @property
    def n_pixels(self) -> int:
        """``X``."""
        return self.shape.numel() * (1 if self.group is None else self.group.order)

    @property
    def lengthscale(self) -> Tensor:
        """Lengthscales in pixels ``[G]``, with a group ``[G, 2]``; of the identity basis, zeros."""
        if self.log_lengthscale is None:
            return self.anchors.new_zeros(self.n_filters, *self.log_center.shape)
        return self.log_lengthscale.exp()

    def forward(self, log_lengthscale: Tensor | None = None) -> Tensor:
        """``Psi [G, M, X]``, at other lengthscales than the present ones if asked."""
        if log_lengthscale is None and self._pinned is not None:
            return self._pinned
        if log_lengthscale is not None:
            return self._computed(log_lengthscale)
        # training meets the same basis in every step, and its factorisation may cost as much
        tensors = [t for t in (self.log_lengthscale, self.anchors) if t is not None]
        return self._remembered.of(self._computed, tensors)

    @contextmanager
    def pinned(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The basis computed once, and a leaf in its place while the context is open.

        Gradients then end at the leaf, and can go back to the lengthscales once in the end.

        Yields:
            The basis with its graph, and the leaf.
        """
        psi = self._computed(None)
        self._pinned = psi.detach().requires_grad_(psi.requires_grad)
        try:
            yield psi, self._pinned
        finally:
            self._pinned = None

    def _computed(self, log_lengthscale: Tensor | None = None) -> Tensor:
        logs = self.log_lengthscale if log_lengthscale is None else log_lengthscale
        if logs is None:
            eye = torch.eye(self.n_anchors, dtype=self.anchors.dtype, device=self.anchors.device)
            return eye.expand(self.n_filters, -1, -1)
        wide = accumulation_dtype(logs.device)
        low, high = map(math.log, _LENGTHSCALES)
        bounded = logs.to(wide).clamp(low, high)
        if self.group is not None:  # two axes of the plane, four of the matrices
            bounded = bounded[:, [0, 0, 1, 1, 1, 1]]
        kernel = cast(Kernel, self.kernel)
        psi = interpolation(self.pixels, self.anchors.to(wide), bounded, kernel)
        return psi.to(self.anchors.dtype if log_lengthscale is None else wide)

    def _initial_logs(self, lengthscale: float) -> Tensor:
        """In the plane ``[]``, on a group of the plane ``[2]``."""
        if self.group is None:
            return torch.tensor(math.log(lengthscale))
        radius = max(1.0, *((extent - 1) / 2 for extent in self.shape))
        return torch.tensor([lengthscale, lengthscale / radius]).log()

    def square_norm(self) -> float:
        """``|Psi|^2`` of one filter: the output variance of unit weights on white pixels.

        Returns:
            A positive number, the mean over filters with lengthscales of their own.

        Raises:
            ConfigError: if every filter is zero, because no anchor reaches a pixel.
        """
        norm = float(self.forward().detach().square().sum()) / self.n_filters
        if norm == 0.0:
            raise ConfigError(
                "no anchor reaches a pixel: every filter would be zero; use a longer lengthscale, "
                "anchors='grid', or anchors nearer to the pixels"
            )
        return norm

    def fit(self, filters: Tensor) -> Tensor:
        """Values at the anchors whose filters come closest to some filters, by least squares.

        Directions that the basis damps below the resolution of the filters' dtype are left out;
        their values would be noise.

        Args:
            filters: ``[G, ..., X]``.

        Returns:
            ``[G, ..., M]``.
        """
        wide = accumulation_dtype(filters.device)
        psi = self.forward().detach().to(wide)
        flat = filters.detach().to(wide).reshape(len(filters), -1, filters.shape[-1])
        resolution = max(psi.shape[1:]) * torch.finfo(filters.dtype).eps
        inverse = torch.linalg.pinv(psi, rtol=resolution)
        return (flat @ inverse).reshape(*filters.shape[:-1], -1).to(filters.dtype)

    def log_hyperprior(self, log_lengthscale: Tensor | None = None) -> Tensor:
        """Penalty of the lengthscales in the evidence, in nats; of other ones if asked."""
        logs = self.log_lengthscale if log_lengthscale is None else log_lengthscale
        if self.lengthscale_spread is None or logs is None:
            return self.anchors.new_zeros(())
        scaled = (logs - self.log_center) / self.lengthscale_spread
        return -0.5 * scaled.square().sum()

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.kernel!r}, n_anchors={self.n_anchors}, n_pixels={self.n_pixels}" + (
            f", n_filters={self.n_filters}" if self.n_filters > 1 else ""
        )


def _check_scales(lengthscale: float, spread: float | None) -> None:
    low, high = _LENGTHSCALES
    if not (isinstance(lengthscale, int | float) and low <= lengthscale <= high):
        raise ConfigError(
            f"lengthscale={lengthscale!r}: use a number of pixels from {low:g} to {high:g}"
        )
    if spread is not None and not (math.isfinite(spread) and spread > 0):
        raise ConfigError(
            f"lengthscale_spread={spread!r} must be positive and finite; None is no penalty"
        )


def lengthscale_penalty(spread: float | str | None, per_filter: bool) -> float | None:
    """The spread that ``"auto"`` means: 1 for lengthscales per filter, no penalty for a shared one.

    Returns:
        A standard deviation of the log lengthscale, or ``None``.

    Raises:
        ConfigError: for another word.
    """
    if not isinstance(spread, str):
        return spread
    if spread != "auto":
        raise ConfigError(f"lengthscale_spread={spread!r}: use 'auto', None or a number")
    return 1.0 if per_filter else None


def patches_at_anchors(
    basis: AnchorBasis, patches: Tensor, channels: int, filters_per_block: int
) -> Tensor:
    """What the weight of a convolution behind a basis sees.

    Filters with lengthscales of their own see inputs of their own: one block per filter.

    Args:
        basis: of the filters.
        patches: ``[n, t, b, (c X)]``.
        channels: input channels of a block.
        filters_per_block: output channels of a block.

    Returns:
        ``[n, t, b, (c M)]``, or with a lengthscale per filter ``[n, t, D, (c M)]``.
    """
    psi = basis().to(patches.dtype)
    if basis.n_filters > 1:
        patches = patches.repeat_interleave(filters_per_block, dim=2)
        psi = psi.repeat_interleave(channels, dim=0)
    blocks = patches.shape[2]
    by_channel = patches.unflatten(3, (channels, -1)).flatten(2, 3)
    return project(by_channel, psi).unflatten(2, (blocks, channels)).flatten(3)
