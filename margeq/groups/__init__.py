"""Finite groups: rotations and reflections of the plane, permutations, and their structure."""

from margeq.groups.action import act
from margeq.groups.finite import FiniteGroup, S
from margeq.groups.intertwiners import intertwiners, invariants
from margeq.groups.irreps import irreps
from margeq.groups.planar import P2, P4, P4M, PM, Z2, C, D, is_exact, stencil
from margeq.groups.representations import (
    LieRepresentation,
    Representation,
    regular,
    rotations,
    standard,
    trivial,
)

__all__ = [
    "P2",
    "P4",
    "P4M",
    "PM",
    "Z2",
    "C",
    "D",
    "FiniteGroup",
    "LieRepresentation",
    "Representation",
    "S",
    "act",
    "intertwiners",
    "invariants",
    "irreps",
    "is_exact",
    "regular",
    "rotations",
    "standard",
    "stencil",
    "trivial",
]
