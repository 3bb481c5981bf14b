"""A gate on the elements of a group: how much of a symmetry a layer keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError
from margeq.group_distributions import Interval
from margeq.groups.finite import FiniteGroup, require_group
from margeq.groups.planar import C, D
from margeq.layers.elements import place_elements, take_elements
from margeq.shares import from_share, share_between
from margeq.subsets import LearnedSubset

__all__ = ["GroupGate"]

TrainedBy = Literal["evidence", "loss"]
GateScale = Literal["variance", "mean"]
_SCALES = ("variance", "mean")

_LEAST = 1e-14
"""Stands in for a zero whose derivative is wanted: a ReLU, or a root, has none at zero itself."""


class GroupGate(nn.Module):
    """Weights on the elements of a group, from all alike to the identity alone.

        y[n,c,g] = x[n,c,g] w_g / s,   s = sqrt(sum_g w_g^2 / |H|)   or   s = sum_g w_g / |H|

    Element g is a rotation r after no mirror or one: ``w_g = w_r(u) v^mirrored``, where ``w_r(u)``
    is how much of the cell of r lies in ``[-u pi, u pi]``, see
    :meth:`margeq.group_distributions.Interval.overlaps`. At ``u = v = 1`` it is the identity map
    and the network stays equivariant; at ``u = 1/n, v = 0`` the identity element is left, of group
    convolutions a plain one; between lie rotations up to ``±u pi``, preferred but not exactly
    (Romero & Lohit 2022).

    The next layer sums over elements with independent weights. With ``scale="variance"`` the
    variance of that sum is the same at every width, so that prior precisions keep their meaning;
    with ``"mean"`` the mean over elements is the weighted mean, as before a
    :class:`GroupPool` of means. ReLUs and dropout commute with the gate; normalisation layers
    belong in front of it, their shift would fill elements that are off. Gradients of the evidence
    can vanish at either end, so runs start between them, and :func:`margeq.optimize_marglik` also
    from both ends (``restarts="auto"``, or ``"current@whole"`` and the like). Where nothing stands
    between a convolution and its gate, :class:`PartialGroupConv2d` is faster, and its Kronecker
    curvature leaves elements that are off out, which is closer to the exact one.

    Args:
        group: ``C(n)`` or ``D(n)``.
        width: initial ``u``, from ``1/n`` to 1. Kinks lie at odd multiples of ``1/n``.
        mirror: initial ``v``, from 0 to 1; of groups without reflections ignored.
        trained_by: ``"evidence"``: a hyperparameter, which the training loss does not see.
            ``"loss"``: an ordinary parameter without a prior, to be left out of ``parameters`` of
            :func:`margeq.optimize_marglik`; the loss alone has no reason to keep a symmetry.
        scale: ``"variance"`` or ``"mean"``.

    Shapes:
        ``[n, c, |H|, *space] -> [n, c, |H|, *space]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: if an input has another group axis.

    Reference:
        Romero & Lohit 2022, here deterministic.

    Example:
        >>> from margeq.groups import P4
        >>> gate = GroupGate(P4, width=0.5)
        >>> gate.weights().detach()
        tensor([1.0000, 0.5000, 0.0000, 0.5000])
        >>> print(gate.learned_subset())
        rotations within ±90°
    """

    hyperparameter_names: tuple[str, ...]
    raw_width: nn.Parameter | None
    raw_mirror: nn.Parameter | None

    def __init__(
        self,
        group: FiniteGroup,
        width: float = 0.8,
        mirror: float = 0.8,
        *,
        trained_by: TrainedBy = "evidence",
        scale: GateScale = "variance",
    ) -> None:
        super().__init__()
        if trained_by not in ("evidence", "loss"):
            raise ConfigError(f"GroupGate: trained_by={trained_by!r}: use 'evidence' or 'loss'")
        if scale not in _SCALES:
            raise ConfigError(f"GroupGate: scale={scale!r}: use one of {_SCALES}")
        self.group, self.trained_by, self.scale = group, trained_by, scale
        require_group(group)
        self.n_rotations, self.has_mirror = _structure(group)
        self.raw_width = self.raw_mirror = None
        if self.n_rotations > 1:
            self.raw_width = _parameter(_raw("width", width, 1.0 / self.n_rotations))
        if self.has_mirror:
            self.raw_mirror = _parameter(_raw("mirror", mirror, 0.0))
        by_evidence = trained_by == "evidence"
        self.hyperparameter_names = ("raw_width", "raw_mirror") if by_evidence else ()
        self._pinned: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be computed again."""
        return self.__dict__ | {"_pinned": None}

    @property
    def width(self) -> Tensor:
        """``u``, the share of the rotations that is left."""
        return self._shares()[0]

    @property
    def mirror(self) -> Tensor:
        """``v``, the weight of the reflections; 0 in a group without any."""
        return self._shares()[1]

    def _shares(self) -> Tensor:
        return self._computed() if self._pinned is None else self._pinned

    def _computed(self) -> Tensor:
        width = self._share(self.raw_width, 1.0 / self.n_rotations)
        return torch.stack([width, self._share(self.raw_mirror, 0.0) * self.has_mirror])

    @torch.no_grad()
    def set_shares(self, width: float | None = None, mirror: float | None = None) -> None:
        """Leave other shares of the group, in place; ends are reached exactly.

        Args:
            width: ``u``, from ``1/n`` to 1; ``None`` leaves it, of a single rotation ignored.
            mirror: ``v``, from 0 to 1; ``None`` leaves it, of groups without reflections ignored.

        Raises:
            ConfigError: for a number out of range; nothing has changed then.
        """
        asked = [
            ("width", self.raw_width, width, 1.0 / self.n_rotations),
            ("mirror", self.raw_mirror, mirror, 0.0),
        ]
        found = [
            (parameter, _raw(name, share, low))
            for name, parameter, share, low in asked
            if parameter is not None and share is not None
        ]
        for parameter, raw in found:
            parameter.fill_(raw)

    def to_whole(self) -> None:
        """Leave the whole group."""
        self.set_shares(1.0, 1.0)

    def to_identity(self) -> None:
        """Leave the identity alone."""
        self.set_shares(1.0 / self.n_rotations, 0.0)

    def _share(self, raw: Tensor | None, low: float) -> Tensor:
        if raw is None:
            return next(self.parameters(), torch.empty(())).new_ones(())
        return share_between(raw, low, ascend=self.trained_by == "evidence")

    def weights(self) -> Tensor:
        """``w``, from 0 to 1, ``[|H|]``."""
        width, mirror = self._shares()
        rotations = Interval(width).overlaps(self.n_rotations)
        return torch.cat([rotations, rotations * mirror]) if self.has_mirror else rotations

    def factors(self) -> Tensor:
        """``w / s``, with which maps are multiplied, ``[|H|]``."""
        weights = self.weights()
        if self.scale == "mean":
            return weights / weights.mean()
        return weights / weights.square().mean().sqrt()

    @contextmanager
    def pinned(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The shares computed once, and a leaf in their place while the context is open.

        Whether a gradient leads inwards can only be said of a whole one, of data and priors: it
        ends at the leaf, and goes back to the parameters once in the end.

        Yields:
            The shares ``[u, v]`` with their graph, and the leaf.
        """
        shares = self._computed()
        self._pinned = shares.detach().requires_grad_(shares.requires_grad)
        try:
            yield shares, self._pinned
        finally:
            self._pinned = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the identity map, which leaves the symmetry as it is."""
        return bool((self.weights().detach() == 1.0).all())

    @property
    def n_profiles(self) -> int:
        """Number of linearly independent weightings of the elements between its two ends."""
        # rotations to both sides count alike
        return (self.n_rotations // 2 + 1) * (1 + self.has_mirror)

    @torch.no_grad()
    def touched(self) -> Tensor:
        """Indices of elements that count, or would as soon as a parameter moved inwards."""
        rotations = Interval(self.width).touches(self.n_rotations)
        both = torch.cat([rotations, rotations]) if self.has_mirror else rotations
        return both.nonzero().flatten()

    def live(self) -> Tensor:
        """Indices of the elements that have to be computed.

        Returns:
            Those that count, the identity first; where a gradient in the gate is wanted, all that
            are touched: at its edge a weight is zero, but not its derivative.
        """
        factors = self.factors()
        if torch.is_grad_enabled() and factors.requires_grad:
            return self.touched()
        return (factors.detach() > 0).nonzero().flatten()

    def live_factors(self, live: Tensor) -> Tensor:
        """Factors of live elements, at least 1e-14."""
        factors = self.factors()[live]
        return factors + _LEAST * (factors.detach() == 0)

    def forward(self, x: Tensor) -> Tensor:
        """Weight each element."""
        if x.ndim < 3 or x.shape[2] != self.group.order:
            raise DataError(
                f"GroupGate takes maps [n, c, {self.group.order}, ...] on {self.group!r}, got "
                f"{tuple(x.shape)}"
            )
        live = self.live()
        factors = self.live_factors(live).to(x)
        weighted = take_elements(x, live) * factors.reshape(-1, *[1] * (x.ndim - 3))
        return place_elements(weighted, live, self.group.order)

    @torch.no_grad()
    def learned_subset(self) -> LearnedSubset:
        """What is left of the group, for a report.

        Returns:
            Its description; ``str()`` of it is a phrase.
        """
        width, mirror, n = float(self.width), float(self.mirror), self.n_rotations
        whole, alone = width > 1.0 - 0.5 / n, width < 1.5 / n
        nearest = None
        if whole or alone:
            left = n if whole else 1
            nearest = D(left) if mirror > 0.5 else C(left)
        return LearnedSubset(180.0 * width, mirror if self.has_mirror else None, n, nearest)

    def extra_repr(self) -> str:
        """Group and present gates, for ``print(model)``."""
        mirror = f", mirror={self.mirror.item():.3g}" if self.has_mirror else ""
        kind = "" if self.scale == "variance" else f", scale={self.scale!r}"
        owner = "" if self.trained_by == "evidence" else f", trained_by={self.trained_by!r}"
        return f"{self.group!r}, width={self.width.item():.3g}{mirror}{owner}{kind}"


def _structure(group: FiniteGroup) -> tuple[int, bool]:
    """Number of rotations, and whether there are reflections."""
    for has_mirror, make in ((False, C), (True, D)):
        n = group.order // (1 + has_mirror)
        if n and group == make(n):
            return n, has_mirror
    raise ConfigError(f"GroupGate: group={group!r} must be C(n) or D(n), in their own order")


def _raw(name: str, share: float, low: float) -> float:
    if not (isinstance(share, int | float) and math.isfinite(share) and low <= share <= 1.0):
        raise ConfigError(f"GroupGate: {name}={share!r} must lie between {low:.4g} and 1")
    return from_share(share, low)


def _parameter(raw: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(raw))
