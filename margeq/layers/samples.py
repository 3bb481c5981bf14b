"""Elements of a group of the plane at which maps are sampled, shared between layers.

    g = R(angle) M^(mirror = -1),   M (x, y) = (-x, y)

A map ``[n, c, s, y, x]`` is its tensor alone; at which elements its axis s stands is known to the
:class:`GroupSampler` that the layer before and the layers behind it have in common.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["GroupDistribution", "GroupSampler", "GroupSamples", "IdentityElement", "redraw"]

_LARGEST_SEED = 2**62


class GroupSamples(NamedTuple):
    """Elements of a group of the plane, and how much each of them counts.

    Attributes:
        angles: ``[S]``, in radians.
        mirrors: ``[S]``, 1 or -1 for an element that mirrors before it rotates.
        weights: ``[S]``, not negative; only their ratios matter.
    """

    angles: Tensor
    mirrors: Tensor
    weights: Tensor


@runtime_checkable
class GroupDistribution(Protocol):
    """A distribution on rotations and reflections of the plane.

    Elements of weight 0 have no effect. They may be answered if a gradient in their weight is
    wanted, and then come last; else they are best left out.
    """

    @property
    def has_rotations(self) -> bool:
        """Whether elements have different angles."""
        ...

    @property
    def has_mirrors(self) -> bool:
        """Whether there are reflections."""
        ...

    def quadrature(self, n_samples: int, /) -> tuple[Tensor, Tensor, Tensor]:
        """Angles, mirrors and weights ``[S]`` of fixed elements that stand for all."""
        ...

    def sample(
        self, n_samples: int, /, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of random elements, differentiable in its parameters."""
        ...


class IdentityElement:
    """The distribution that knows nothing but the identity; maps on it are ordinary ones.

    Args:
        has_rotations: whether filters are those of rotations, on a disk.
        has_mirrors: whether they are those of reflections.
    """

    def __init__(self, has_rotations: bool = False, has_mirrors: bool = False) -> None:
        self.has_rotations, self.has_mirrors = has_rotations, has_mirrors

    def quadrature(self, n_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """The identity."""
        return torch.zeros(1), torch.ones(1), torch.ones(1)

    def sample(self, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The identity."""
        return self.quadrature(n_samples)


class GroupSampler(nn.Module):
    """The elements on which one map is sampled: in training random, in evaluation fixed.

    All layers that write or read the map hold the same sampler. It draws the same elements again
    until :func:`redraw`, as a function of the distribution's present parameters: what is called
    several times within a step sees the same elements, and gradients reach the parameters.
    :func:`margeq.optimize_marglik` draws for each batch; a training loop of one's own calls
    :func:`redraw`, unless the network does.

    It is a module with as many names as layers hold it. ``torch.func.functional_call``, and so
    ``vmap(grad)`` of a whole network, puts parameters of such modules back under one of them only:
    use it on a copy.

    Args:
        distribution: of the elements.
        n_samples: what the distribution is asked for, fixed or random; it may answer with others.

    Raises:
        ConfigError: for something that is no distribution, or no number of samples.
    """

    def __init__(self, distribution: GroupDistribution, n_samples: int) -> None:
        super().__init__()
        if not isinstance(distribution, GroupDistribution):
            raise ConfigError(
                f"GroupSampler: {type(distribution).__name__} is no distribution; it needs "
                f"quadrature(), sample(n_samples, generator), has_rotations and has_mirrors"
            )
        if not is_count(n_samples):
            raise ConfigError(f"GroupSampler: n_samples={n_samples!r}: use a whole number from 1")
        self.distribution, self.n_samples = distribution, n_samples
        # a tensor: a compiler takes other values of a number for another program
        self._seed = torch.zeros((), dtype=torch.int64, device="cpu")

    def forward(self) -> GroupSamples:
        """The elements of the present draw, or in evaluation the fixed ones."""
        if self.training:
            generator = torch.Generator("cpu").manual_seed(int(self._seed))
            return GroupSamples(*self.distribution.sample(self.n_samples, generator))
        return GroupSamples(*self.distribution.quadrature(self.n_samples))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Other elements from now on, in training."""
        self._seed = torch.randint(_LARGEST_SEED, (), generator=generator, device="cpu")

    def counted(self, maps: Tensor, axis: int) -> Tensor:
        """The part of a map on elements that count, of which alone curvature is taken.

        Args:
            maps: on the present elements, with or without those of weight 0.
            axis: of the elements.

        Returns:
            Without them.
        """
        with torch.no_grad():
            counts = self().weights > 0
        maps = maps.narrow(axis, 0, len(counts))
        return maps if bool(counts.all()) else maps.index_select(axis, _places(counts, maps))

    def extra_repr(self) -> str:
        """Number of samples, for ``print(model)``."""
        return f"n_samples={self.n_samples}"


def _places(chosen: Tensor, maps: Tensor) -> Tensor:
    return chosen.nonzero().flatten().to(maps.device)


def redraw(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Give every map of a network other random elements, as training wants for each batch.

    Args:
        model: with :class:`GroupSampler` modules.
        generator: by default torch's global one.
    """
    for module in model.modules():
        if isinstance(module, GroupSampler):
            module.redraw(generator)
