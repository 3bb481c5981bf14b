"""A learned part of the rotations and reflections of the plane, for maps on samples of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.group_distributions import Bernoulli, Interval
from margeq.groups.planar import C, D
from margeq.shares import from_share, share_between
from margeq.subsets import LearnedSubset

__all__ = ["PlanarSubset"]

_OWNERS = ("evidence", "loss", None)

_SLACK = 1e-4
"""Of a number of samples, which rounding of the width should not raise by one."""


class PlanarSubset(nn.Module):
    """Rotations within a learned angle, and reflections with a learned probability.

        g = R(a) M^m,   a ~ U(-u pi, u pi),   m ~ Bernoulli(v)

    In training, angles are a regular grid at a random offset, and all reflections are in or out
    together, so that they have half of the weight with probability ``v``; in evaluation, angles are
    midpoints and reflections have ``v / 2`` of the weight. As many angles are answered as fall into
    the subset, reflections of weight 0 only where a gradient in ``v`` is wanted: a smaller subset
    costs less. Where the number of angles changes, at multiples of one over it, outputs jump, which
    no gradient sees: by a tenth for untrained networks with eight angles.

    ``u = v = 1`` is the whole group, ``u = v = 0`` the identity alone, and both are reached
    exactly. At ``v = 0`` and at whole groups a gradient that leads inwards passes; a width of 0
    stays, as what is behind it does not change to first order, until :meth:`set_shares`.

    Args:
        rotations: whether there are any.
        mirrors: whether there are reflections.
        width: initial ``u``, from 0 to 1; without rotations ignored.
        mirror: initial ``v``, from 0 to 1; without reflections ignored.
        trained_by: ``"evidence"``: hyperparameters, which the training loss does not see.
            ``"loss"``: ordinary parameters without a prior, to be left out of ``parameters`` of
            :func:`margeq.optimize_marglik`. ``None``: buffers, which nothing moves.

    Raises:
        ConfigError: for an argument out of range, or a group of the identity alone, for which
            there is :class:`IdentityElement`.

    Reference:
        Romero & Lohit 2022, section 3.4, here with gradients in every sample.

    Example:
        >>> subset = PlanarSubset(True, True, width=0.5, mirror=0.25)
        >>> angles, mirrors, weights = subset.quadrature(8)
        >>> (angles / math.pi).detach(), mirrors, weights.detach()
        (tensor([-0.2500,  0.2500, -0.2500,  0.2500]), tensor([ 1.,  1., -1., -1.]),
         tensor([0.4375, 0.4375, 0.0625, 0.0625]))
    """

    raw_width: Tensor | None
    raw_mirror: Tensor | None

    def __init__(
        self,
        rotations: bool,
        mirrors: bool,
        width: float = 0.8,
        mirror: float = 0.8,
        trained_by: Literal["evidence", "loss"] | None = "evidence",
    ) -> None:
        super().__init__()
        if not (rotations or mirrors):
            raise ConfigError(
                "PlanarSubset: neither rotations nor mirrors; for the identity use IdentityElement"
            )
        if trained_by not in _OWNERS:
            raise ConfigError(f"PlanarSubset: trained_by={trained_by!r}: use one of {_OWNERS}")
        self.has_rotations, self.has_mirrors = bool(rotations), bool(mirrors)
        self.trained_by = trained_by
        learned = trained_by is not None
        self.raw_width = _raw("width", width, learned) if rotations else None
        self.raw_mirror = _raw("mirror", mirror, learned) if mirrors else None
        by_evidence = trained_by == "evidence"
        self.hyperparameter_names = ("raw_width", "raw_mirror") if by_evidence else ()
        self._pinned: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be computed again."""
        return self.__dict__ | {"_pinned": None}

    @classmethod
    def whole(cls, rotations: bool, mirrors: bool) -> Self:
        """All of the group, without parameters."""
        return cls(rotations, mirrors, 1.0, 1.0, None)

    @property
    def width(self) -> Tensor:
        """``u``, the share of the rotations that is left."""
        return self._shares()[0]

    @property
    def mirror(self) -> Tensor:
        """``v``, the probability of reflections; 0 in a group without any."""
        return self._shares()[1]

    def _shares(self) -> Tensor:
        """``(u, v)``."""
        return self._computed() if self._pinned is None else self._pinned

    def _computed(self) -> Tensor:
        ascend = self.trained_by == "evidence"
        known = next(raw for raw in (self.raw_width, self.raw_mirror) if raw is not None)
        u, v = known.new_ones(()), known.new_zeros(())
        if self.raw_width is not None:
            u = share_between(self.raw_width, 0.0, ascend=ascend)
        if self.raw_mirror is not None:
            v = share_between(self.raw_mirror, 0.0, ascend=ascend)
        return torch.stack([u, v])

    @contextmanager
    def pinned(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Both shares computed once, and a leaf in their place while the context is open.

        Whether a gradient leads inwards can only be said of a whole one: it ends at the leaf, and
        goes back once in the end.

        Yields:
            The shares with their graph, and the leaf.
        """
        shares = self._computed()
        self._pinned = shares.detach().requires_grad_(shares.requires_grad)
        try:
            yield shares, self._pinned
        finally:
            self._pinned = None

    def quadrature(self, n_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed elements, at the midpoints of equal parts of the subset.

        Args:
            n_samples: elements of the whole group, with reflections half of them rotations. Of a
                part of it there are ``ceil(u n)`` angles, from two on: one would not depend on it.

        Returns:
            Angles, mirrors and weights, reflections last.
        """
        u, v = self._shares()
        return self._elements(Interval(u).quadrature(self._n_angles(n_samples)).points, v)

    def sample(
        self, n_samples: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random elements, as many as fixed ones.

        Args:
            n_samples: as for :meth:`quadrature`.
            generator: of the offset of the angles, and of the choice of the reflections.

        Returns:
            Angles, mirrors and weights, reflections last. Angles have their derivative in the
            width, inclusions that of a relaxed choice.
        """
        u, v = self._shares()
        angles = Interval(u).sample(self._n_angles(n_samples), generator).points
        inclusion = Bernoulli(-torch.ones_like(v[None]).detach(), v[None]).inclusions(generator)
        return self._elements(angles, inclusion[0])

    def _n_angles(self, n_samples: int) -> int:
        width = float(self.width.detach())
        if not self.has_rotations or width == 0.0:
            return 1
        most = math.ceil(n_samples / (1 + self.has_mirrors))
        if self.trained_by is not None and most < 2:
            raise ConfigError(
                f"PlanarSubset: n_samples={n_samples} leaves one angle, from which no width can be "
                f"learned; use at least {2 * (1 + self.has_mirrors)}"
            )
        return min(most, max(2, math.ceil(most * width - _SLACK)))

    def _elements(self, angles: Tensor, inclusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations, and reflections that share all there is with them as far as included."""
        if not self.has_rotations:
            angles = torch.zeros_like(angles)
        ones, half = torch.ones_like(angles).detach(), inclusion / 2.0
        n_angles = len(angles)
        if not self.has_mirrors or not (inclusion > 0 or self._wants_mirrors()):
            return angles, ones, ones / n_angles
        weights = torch.cat([ones * (1.0 - half), ones * half]) / n_angles
        return torch.cat([angles, angles]), torch.cat([ones, -ones]), weights

    def _wants_mirrors(self) -> bool:
        """Whether a gradient in their probability is wanted, which a weight of 0 has too."""
        learns = self.raw_mirror is not None and self.raw_mirror.requires_grad
        return learns and torch.is_grad_enabled()

    @torch.no_grad()
    def set_shares(self, width: float | None = None, mirror: float | None = None) -> None:
        """Leave other shares, in place.

        Args:
            width: ``u``; ``None`` leaves it as it is, as does a group without rotations.
            mirror: ``v``; the same.

        Raises:
            ConfigError: for a share out of range; nothing has changed then.
        """
        pairs = (("width", self.raw_width, width), ("mirror", self.raw_mirror, mirror))
        found = [(raw, _checked(name, share)) for name, raw, share in pairs if share is not None]
        for raw, value in found:
            if raw is not None:
                raw.fill_(value)

    def to_whole(self) -> None:
        """Leave the whole group."""
        self.set_shares(1.0, 1.0)

    def to_identity(self) -> None:
        """Leave the identity alone."""
        self.set_shares(0.0, 0.0)

    @torch.no_grad()
    def learned_subset(self) -> LearnedSubset:
        """What is left of the group, for a report.

        Returns:
            Its description; ``str()`` of it is a phrase.
        """
        width, mirror = self._computed().tolist()
        return _description(width, mirror, self.has_rotations, self.has_mirrors)

    def extra_repr(self) -> str:
        """Present shares, for ``print(model)``."""
        width, mirror = self._computed().tolist()
        shown = [f"width={width:.3g}"] if self.has_rotations else []
        shown += [f"mirror={mirror:.3g}"] if self.has_mirrors else []
        shown += [f"trained_by={self.trained_by!r}"] if self.trained_by != "evidence" else []
        return ", ".join(shown)


def _description(width: float, mirror: float, rotations: bool, mirrors: bool) -> LearnedSubset:
    """Of the continuous group; no finite subgroup is near all or a part of the circle."""
    nearest = None
    if not rotations or width == 0.0:
        nearest = D(1) if mirror > 0.5 else C(1)
    n_rotations = None if rotations else 1
    return LearnedSubset(180.0 * width, mirror if mirrors else None, n_rotations, nearest)


def _raw(name: str, share: float, learned: bool) -> Tensor:
    value = torch.tensor(_checked(name, share))
    return nn.Parameter(value) if learned else nn.Buffer(value)


def _checked(name: str, share: float) -> float:
    if not (isinstance(share, int | float) and 0.0 <= share <= 1.0):
        raise ConfigError(f"PlanarSubset: {name}={share!r} must lie between 0 and 1")
    return from_share(share, 0.0)
