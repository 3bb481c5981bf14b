"""Distributions on rotations and reflections, as small as layers on samples need them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Arc(nn.Module):
    """Angles uniform on ``[-width pi, width pi]``, with or without mirrors of all of them."""

    hyperparameter_names = ("width",)
    has_rotations = True

    def __init__(self, width: float = 1.0, mirrors: bool = False) -> None:
        super().__init__()
        self.has_mirrors = mirrors
        self.width = nn.Parameter(torch.tensor(width))

    def quadrature(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._elements(n, torch.tensor(0.5))

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return self._elements(n, torch.rand((), generator=generator))

    def _elements(self, n: int, jitter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = n // 2 if self.has_mirrors else n
        steps = torch.arange(n) + jitter.to(self.width)
        angles = math.pi * self.width * (2.0 * steps / n - 1.0)
        signs = torch.tensor([1.0, -1.0] if self.has_mirrors else [1.0]).to(angles)
        return (
            angles.repeat(len(signs)),
            signs.repeat_interleave(n),
            torch.ones_like(angles).repeat(len(signs)),
        )


class Points:
    """The same few elements in training and in evaluation, without parameters."""

    def __init__(
        self,
        angles: list[float],
        mirrors: list[float] | None = None,
        weights: list[float] | None = None,
        has_rotations: bool = True,
    ) -> None:
        ones = [1.0] * len(angles)
        values = (angles, mirrors or ones, weights or ones)
        self.elements = tuple(torch.tensor(v, dtype=torch.float64) for v in values)
        self.has_rotations, self.has_mirrors = has_rotations, mirrors is not None

    def quadrature(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.elements

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return self.elements
