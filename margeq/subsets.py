"""Which part of a group each learned gate of a model leaves, and how to move the gates."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from margeq.group_distributions import Interval
from margeq.groups.finite import FiniteGroup

__all__ = [
    "LearnedSubset",
    "Sector",
    "SymmetryGate",
    "gate_label",
    "learned_subsets",
    "named_gates",
    "trained_gates",
]


_ROUNDING = 1e-6
"""Of angles from widths in float32."""


class Sector(NamedTuple):
    """Part of the circle of rotations.

    Attributes:
        centre: in degrees, counter-clockwise, 0 for the identity.
        extent: in degrees, to both sides together; 0 for the identity alone.
        weight: from 0 to 1.
    """

    centre: float
    extent: float
    weight: float


@dataclass(frozen=True)
class LearnedSubset:
    """The part of a group that a gate leaves.

    Attributes:
        degrees: largest rotation, to 180 for all from 180 / n for the identity alone, of a circle
            from 0.
        mirror: weight of the reflections from 0 to 1, ``None`` in a group without any.
        n_rotations: number of rotations of the group, ``None`` for all of the circle.
        nearest: the subgroup with gates of 0 and 1 that the subset is nearest to, or ``None`` for
            rotations that are nearer to a part of the circle.
    """

    degrees: float
    mirror: float | None
    n_rotations: int | None
    nearest: FiniteGroup | None

    @property
    def smallest_width(self) -> float:
        """Share of the rotations that is the identity alone."""
        return 0.0 if self.n_rotations is None else 1.0 / self.n_rotations

    @property
    def sectors(self) -> tuple[Sector, ...]:
        """How much of each rotation is left: one sector per rotation, one alone of a circle."""
        if self.n_rotations is None:
            return (Sector(0.0, 2.0 * self.degrees, 1.0),)
        width = torch.tensor(self.degrees / 180.0, dtype=torch.float64)
        step = 360.0 / self.n_rotations
        weights = Interval(width).overlaps(self.n_rotations).tolist()
        return tuple(Sector(step * r, step, weight) for r, weight in enumerate(weights))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "degrees": self.degrees,
            "mirror": self.mirror,
            "n_rotations": self.n_rotations,
            "nearest": None if self.nearest is None else repr(self.nearest),
            "words": str(self),
        }

    def __str__(self) -> str:
        """In words.

        Returns:
            For instance ``rotations within ±85°, reflections off``.
        """
        if self.degrees <= 180.0 * self.smallest_width * (1.0 + _ROUNDING):
            rotations = "no rotations"
        elif self.degrees >= 180.0 * (1.0 - _ROUNDING):
            rotations = "all rotations"
        else:
            digits = ".0f" if self.degrees >= 1.0 else ".2g"
            rotations = f"rotations within ±{self.degrees:{digits}}°"
        if self.mirror is None:
            return rotations
        ends = {0.0: "off", 1.0: "on"}
        return f"{rotations}, reflections {ends.get(self.mirror, f'at {self.mirror:.0%}')}"


class SymmetryGate(Protocol):
    """What a module offers that learns how much of a group is left."""

    @property
    def hyperparameter_names(self) -> tuple[str, ...]:
        """Its tensors that the evidence moves; none if the training loss does."""
        ...

    @property
    def width(self) -> Tensor:
        """Share of the rotations that is left."""
        ...

    @property
    def mirror(self) -> Tensor:
        """Weight of the reflections, 0 in a group without any."""
        ...

    def learned_subset(self) -> LearnedSubset:
        """What is left of the group."""
        ...

    def set_shares(self, width: float | None = None, mirror: float | None = None) -> None:
        """Leave other shares, in place; ``None`` leaves one as it is."""
        ...

    def to_whole(self) -> None:
        """Leave the whole group."""
        ...

    def to_identity(self) -> None:
        """Leave the identity alone."""
        ...


def named_gates(model: nn.Module) -> dict[str, SymmetryGate]:
    """Module name -> gate that has anything to learn, each once, by the first of its names."""
    return {
        name: cast(SymmetryGate, module)
        for name, module in model.named_modules()
        if hasattr(module, "learned_subset")
        and hasattr(module, "set_shares")
        and any(True for _ in module.parameters())
    }


def trained_gates(model: nn.Module, tensors: Iterable[Tensor]) -> dict[str, SymmetryGate]:
    """The gates of which some parameter is among some tensors, by name."""
    known = {id(tensor) for tensor in tensors}
    return {
        name: gate
        for name, gate in named_gates(model).items()
        if any(id(parameter) in known for parameter in cast(nn.Module, gate).parameters())
    }


def learned_subsets(model: nn.Module) -> dict[str, LearnedSubset]:
    """What each gate leaves, by name."""
    return {name: gate.learned_subset() for name, gate in named_gates(model).items()}


def gate_label(name: str) -> str:
    """Layer and path of a gate.

    Args:
        name: of the gate, as in ``model.named_modules()``.

    Returns:
        Without the words that every such name has.

    Example:
        >>> gate_label("layer1.paths.partial.gate"), gate_label("0.gate"), gate_label("gate")
        ('layer1 partial', '0', 'gate')
        >>> gate_label("block1.conv2.outputs.distribution")
        'block1.conv2'
    """
    layer = name.removesuffix(".gate").removesuffix(".outputs.distribution")
    return re.sub(r"(^|\.)paths\.", " ", layer).strip() or "gate"
