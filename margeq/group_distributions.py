"""Distributions on groups: which transformations a layer keeps, and how evenly.

Small immutable objects. All of them have an entropy, a deterministic quadrature (for evaluation and
curvature) and random samples that move with the parameters (for Monte Carlo), as nodes

    integral f(g) p(g) dg  ~  sum_i weights[i] f(points[i]) .

(Romero & Lohit 2022, section 3.4, here with gradients in every sample.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = [
    "Bernoulli",
    "Distribution",
    "Interval",
    "Nodes",
    "Product",
]

_COLDEST = 0.05
"""Temperature below which relaxed choices have hardly a gradient left, and it overflows."""

_EDGE = 0.05
"""Distance of a relaxed choice from never and always, where it has no gradient."""


class Nodes(NamedTuple):
    """Points of a group with weights.

    Attributes:
        points: ``[n]`` of one factor, ``[n, d]`` of a product: angles, logarithms of scales, ...
        weights: ``[n]``, which sum to 1, for random inclusions on average.
    """

    points: Tensor
    weights: Tensor


class Distribution(Protocol):
    """What all distributions offer."""

    def entropy(self) -> Tensor:
        """In nats."""
        ...

    def quadrature(self, n: int, /) -> Nodes:
        """The same nodes in every call."""
        ...

    def sample(self, n: int, /, generator: torch.Generator | None = None) -> Nodes:
        """Random nodes, differentiable in the parameters."""
        ...


@dataclass(frozen=True)
class Interval:
    """Uniform on ``[-width * extent, width * extent]``, a part of the circle if no extent is given.

    Attributes:
        width: ``u``, a number or a scalar from 0 to 1.
        extent: largest distance from the identity: pi for rotations, the logarithm of the largest
            scale for dilations, ...

    Raises:
        ConfigError: for numbers out of range.

    Example:
        >>> Interval(0.5).overlaps(4)
        tensor([1.0000, 0.5000, 0.0000, 0.5000])
    """

    width: Tensor | float
    extent: float = math.pi

    def __post_init__(self) -> None:
        if isinstance(self.width, int | float) and not 0.0 < self.width <= 1.0:
            raise ConfigError(f"Interval: width={self.width!r} must be above 0 and at most 1")
        if not (math.isfinite(self.extent) and self.extent > 0):
            raise ConfigError(f"Interval: extent={self.extent!r} must be positive and finite")

    @property
    def reach(self) -> Tensor:
        """Half the length of the interval."""
        return torch.as_tensor(self.width) * self.extent

    def overlaps(self, n: int) -> Tensor:
        """How much of each cell of a regular grid of rotations lies in the interval.

            w_j = |cell_j and [-u pi, u pi]| / |cell_j|,   cell_j = 2 pi (j -+ 1/2) / n

        The cell of the identity always counts in full, so ``sum_j w_j / n = u`` for ``u >= 1/n``.

        Args:
            n: number of cells of the circle, cell j around ``2 pi j / n``.

        Returns:
            ``[n]``, piecewise linear in the width; at a kink the derivative is that of the cells on
            both sides, so that it leads away from ``u = 1`` and from ``u = 1/n``.

        Raises:
            ConfigError: if ``n`` is no positive whole number.
        """
        steps = self._steps(n)
        # the cell opposite to the identity is entered from both sides
        sides = torch.where(2 * steps == n, 2.0, 1.0)
        inside = (torch.as_tensor(self.width) * n / 2 + 0.5 - steps) * sides.to(steps)
        return torch.where(steps == 0, torch.ones_like(inside), inside.clamp(0.0, 1.0))

    def touches(self, n: int) -> Tensor:
        """Cells with an overlap, or that get one as soon as the interval grows, ``[n]``."""
        steps = self._steps(n)
        slack = math.sqrt(torch.finfo(steps.dtype).eps)
        return steps <= torch.as_tensor(self.width).detach() * n / 2 + 0.5 + slack

    def _steps(self, n: int) -> Tensor:
        """Distance of each cell from the identity, in cells."""
        _require_count("overlaps", n)
        width = torch.as_tensor(self.width)
        cells = torch.arange(n, dtype=width.dtype, device=width.device)
        return torch.minimum(cells, n - cells)

    def contains(self, points: Tensor) -> Tensor:
        """Whether points lie in the interval; rotations are taken from -pi to pi."""
        if self.extent == math.pi:
            points = torch.remainder(points + math.pi, 2.0 * math.pi) - math.pi
        return points.abs() <= self.reach

    def entropy(self) -> Tensor:
        """``log(2 u extent)``."""
        return (2.0 * self.reach).log()

    def quadrature(self, n: int) -> Nodes:
        """Midpoints of ``n`` equal parts of the interval."""
        _require_count("quadrature", n)
        return self._nodes(self._midpoints(n))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Nodes:
        """A regular grid at a random offset: ``g = u * extent * t``, so ``dg/du = g/u``."""
        _require_count("sample", n)
        middle = self._midpoints(n)
        offset = _uniform(middle.new_empty(()), generator)
        return self._nodes(middle + (2.0 * offset - 1.0) / n)

    def _midpoints(self, n: int) -> Tensor:
        """Of equal parts of ``[-1, 1]``."""
        width = torch.as_tensor(self.width)
        return (2 * torch.arange(n, dtype=width.dtype, device=width.device) + 1 - n) / n

    def _nodes(self, places: Tensor) -> Nodes:
        return Nodes(self.reach * places, torch.full_like(places, 1.0 / len(places)))


@dataclass(frozen=True)
class Bernoulli:
    """Independent inclusion of each of some elements, with a probability of its own.

    Attributes:
        elements: ``[k]``, for instance 1 and -1 for identity and mirror.
        probability: ``[k]``; 1 for elements that are always there.
        temperature: of the relaxation whose gradient stands in for that of the choice; at least
            0.05 is used.

    Example:
        >>> mirror = Bernoulli(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.25]))
        >>> mirror.quadrature().weights
        tensor([0.8000, 0.2000])
    """

    elements: Tensor
    probability: Tensor
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.elements.shape != self.probability.shape or self.elements.ndim != 1:
            raise ConfigError(
                f"Bernoulli: elements {tuple(self.elements.shape)} and probability "
                f"{tuple(self.probability.shape)} have to be lists of one length"
            )

    def touches(self) -> Tensor:
        """Elements that are ever included, ``[k]``."""
        return self.probability > 0

    def entropy(self) -> Tensor:
        """``-sum_k p log p + (1 - p) log(1 - p)``, of all choices together."""
        p = self.probability
        return -(torch.xlogy(p, p) + torch.xlogy(1.0 - p, 1.0 - p)).sum()

    def quadrature(self, n: int = 1) -> Nodes:
        """All elements, each with its share of the probabilities."""
        return Nodes(self.elements, self.probability / self.probability.sum())

    def inclusions(self, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones of mean ``p``, with the gradient of a relaxed choice.

            z = [a >= 1 - p],   dz/dp = d/dp sigmoid((logit p + logit a) / T),   a ~ U(0, 1)

        The relaxation is at most that of 0.05 and 0.95: at 0 and 1 it has no gradient, and a choice
        would stay there for ever.

        Args:
            generator: of ``a``.

        Returns:
            ``[k]``.

        Reference:
            Jang, Gu & Poole 2017 (straight-through Gumbel-softmax, of two classes).
        """
        p = self.probability
        noise = _uniform(p, generator)
        hard = (noise >= 1.0 - p).to(p)  # exact for 0 and 1
        inside = p + (p.clamp(_EDGE, 1.0 - _EDGE) - p).detach()
        logits = torch.logit(inside) + torch.logit(noise, torch.finfo(p.dtype).eps)
        soft = (logits / max(self.temperature, _COLDEST)).sigmoid()
        return hard + (soft - soft.detach())

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Nodes:
        """All elements, those left out with weight 0; on average the quadrature."""
        return Nodes(self.elements, self.inclusions(generator) / self.probability.sum())


@dataclass(frozen=True)
class Product:
    """Independent factors: rotations and a mirror, rotations and dilations, ...

    Attributes:
        factors: at least one.

    Raises:
        ConfigError: without factors.

    Example:
        >>> similarity = Product((Interval(0.5), Interval(1.0, extent=math.log(2.0))))
        >>> similarity.quadrature(3).points.shape
        torch.Size([9, 2])
    """

    factors: Sequence[Distribution]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ConfigError("Product: factors is empty; give at least one distribution")

    def entropy(self) -> Tensor:
        """The sum over the factors."""
        return torch.stack([factor.entropy() for factor in self.factors]).sum()

    def quadrature(self, n: int) -> Nodes:
        """All combinations of the nodes of the factors, ``points [N, d]``."""
        return _combined([factor.quadrature(n) for factor in self.factors])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Nodes:
        """All combinations of a sample of each factor."""
        return _combined([factor.sample(n, generator) for factor in self.factors])


def _combined(nodes: Sequence[Nodes]) -> Nodes:
    points = torch.cartesian_prod(*(node.points for node in nodes))
    weights = nodes[0].weights
    for node in nodes[1:]:
        weights = (weights[:, None] * node.weights).flatten()
    return Nodes(points.reshape(len(weights), len(nodes)), weights)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers from 0 to 1 of one shape, type and device, wherever the generator is."""
    device = like.device if generator is None else generator.device
    noise = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)


def _require_count(name: str, n: object) -> None:
    if not is_count(n):
        raise ConfigError(f"Interval: {name}({n!r}) needs a whole number of at least 1")
