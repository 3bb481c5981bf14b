"""The usual groups of networks on samples, whole and with parts of them that are learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as bind
from typing import Literal, TypedDict

from margeq.errors import ConfigError
from margeq.layers import GroupDistribution, IdentityElement, PlanarSubset

__all__ = ["Distributions", "SampledGroup", "TrainedBy", "distributions"]

SampledGroup = Literal["T(2)", "SE(2)", "E(2)", "mirror"]
TrainedBy = Literal["evidence", "loss"]

_HAS = {"SE(2)": (True, False), "E(2)": (True, True), "mirror": (False, True)}


class Distributions(TypedDict):
    """What makes the distributions of a network."""

    whole: Callable[[], GroupDistribution]
    partial: Callable[[], GroupDistribution] | None


def distributions(group: SampledGroup, partial: bool, trained_by: TrainedBy) -> Distributions:
    """Makers of the distributions on a group.

    Args:
        group: translations with nothing, rotations, both, or reflections.
        partial: whether parts of it are learned.
        trained_by: of what is learned, see :class:`~margeq.layers.PlanarSubset`.

    Returns:
        The arguments ``whole`` and ``partial`` of a network.

    Raises:
        ConfigError: for an unknown group, or a part of nothing.
    """
    if group == "T(2)":
        if partial:
            raise ConfigError("group='T(2)' has no part to be learned; leave partial=False")
        # with the filters of rotations, of the same size
        return {"whole": bind(IdentityElement, has_rotations=True), "partial": None}
    if group not in _HAS:
        raise ConfigError(f"group={group!r}: use 'T(2)' or one of {tuple(_HAS)}")
    learned = bind(PlanarSubset, *_HAS[group], trained_by=trained_by)
    return {
        "whole": bind(PlanarSubset.whole, *_HAS[group]),
        "partial": learned if partial else None,
    }
