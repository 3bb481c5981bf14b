"""How far a network is from commuting with a group, measured on given inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.errors import ConfigError, DataError
from margeq.groups.action import Interpolation, Kind, disk, is_shift, maps_pixels_to_pixels
from margeq.groups.finite import FiniteGroup
from margeq.groups.planar import require_planar
from margeq.testing.motion import Key, Motion, Probe

__all__ = ["EquivarianceError", "EquivarianceReport", "equivariance_error"]

_SHIFTS = ((0, 0), (0, 1), (1, 0), (2, 3))
"""No shift, odd ones along each axis, and one along both."""


@dataclass(frozen=True)
class EquivarianceError:
    """Errors of a set of elements, each the largest over all shifts.

    Attributes:
        per_element: element -> relative error.
        standard_error: element -> Monte Carlo standard error of that error; 0 for one draw.
        per_layer: name of a module -> the largest error of its output over all elements.
    """

    per_element: Mapping[int, float]
    standard_error: Mapping[int, float]
    per_layer: Mapping[str, float] = field(default_factory=dict)

    @property
    def max(self) -> float:
        """The largest error of an element; 0 without elements."""
        return max(self.per_element.values(), default=0.0)

    @property
    def mean(self) -> float:
        """The mean over all elements; 0 without elements."""
        return sum(self.per_element.values()) / max(len(self.per_element), 1)


@dataclass(frozen=True)
class EquivarianceReport:
    """Errors of a network, apart for elements of two kinds, which mean different things.

    Attributes:
        group: the group.
        exact: of quarter turns and mirrors; of an equivariant network rounding errors.
        approximate: of all other elements; interpolation of the pictures adds errors of its own.
    """

    group: FiniteGroup
    exact: EquivarianceError
    approximate: EquivarianceError


def equivariance_error(
    model: nn.Module,
    group: FiniteGroup,
    x: Tensor,
    *,
    out: Kind | Literal["auto"] = "auto",
    per_layer: bool = False,
    mode: Literal["auto", "exact", "approximate"] = "auto",
    shifts: bool | Sequence[tuple[int, int]] = False,
    n_draws: int = 1,
    interpolation: Interpolation = "bicubic",
    share: float = 0.5,
) -> EquivarianceReport:
    """Measure how far a network is from commuting with each element of a group.

        error(u) = || f(L_u x) - L_u f(x) || / || f(x) ||

    over the whole batch, where ``L_u`` moves pictures by ``f(u^-1 x)``, maps by
    ``f(u^-1 g, u^-1 x)``, and leaves vectors as they are. *Exact* is the comparison for quarter
    turns and mirrors. It is *approximate* for all other elements: the input, cut to the largest
    disk, is interpolated, and outputs are compared in a central disk, so use smooth pictures. A
    random network is compared *in expectation*: the error is that of the mean over ``n_draws`` and
    has a standard error; an error below about three of them is none.

    The network runs in its present mode, without gradients; its buffers and the random state are
    left as they were. Outputs that are all zero have an error of 0: a network that returns the same
    whatever it gets cannot be told from an equivariant one. The error of an inner layer is that of
    all layers up to it; outputs whose shape says nothing about the group are left out, and those
    with merged channels count as maps or pictures, whichever fits better.

    Args:
        model: maps a batch to a tensor.
        group: rotations and reflections of the plane.
        x: pictures ``[n, c, y, x]`` or maps ``[n, c, g, y, x]``.
        out: what the output is; ``"auto"`` goes by its number of axes: ``"vector"`` ``[n, k]``,
            ``"elements"`` ``[n, c, g]``, ``"picture"`` or ``"map"``.
        per_layer: measure all modules with such outputs too.
        mode: ``"exact"`` or ``"approximate"`` for the elements of one kind only.
        shifts: also circular shifts of the input, ``(rows, columns)``, joint with each element;
            ``True`` for some. Outputs that are ``s`` times smaller may shift by either whole number
            next to ``1 / s`` of it, each datum by its own.
        n_draws: passes of a random network.
        interpolation: ``"bicubic"`` or ``"bilinear"``, of approximate elements.
        share: radius of the central disk, as a share of that of the largest one.

    Returns:
        Errors per element, and per layer if asked, for both kinds of elements.

    Raises:
        ConfigError: for a group that does not act on the plane, an argument out of range, a mode
            without elements, shifts together with draws, or a random network without draws.
        DataError: for an input or output that the group does not act on.

    Example:
        >>> from margeq.groups import P4
        >>> from margeq.layers import GroupConv2d, GroupPool, LiftingConv2d
        >>> x = torch.randn(2, 1, 7, 7, dtype=torch.float64)
        >>> model = nn.Sequential(
        ...     LiftingConv2d(1, 3, 3, group=P4, padding=1), nn.ReLU(),
        ...     GroupConv2d(3, 2, 3, group=P4), GroupPool(P4),
        ... ).double()
        >>> equivariance_error(model, P4, x).exact.max < 1e-12
        True
        >>> plain = nn.Conv2d(1, 3, 3, padding=1).double()
        >>> equivariance_error(plain, P4, x).exact.max > 0.1
        True
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share={share!r}: use more than 0 and at most 1")
    require_planar(group)
    exact, approximate = _elements(group, mode)
    moves, kind = _moves(shifts, n_draws), _kind_of_input(x, group)
    extents = (x.shape[-2], x.shape[-1])
    probe = Probe(model, group, kind, extents, out, per_layer, n_draws, interpolation, share)
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        return EquivarianceReport(
            group,
            _measure(probe, x, [[Motion(u, shift, False) for shift in moves] for u in exact]),
            _measure(probe, x, [[Motion(u, shift, True) for shift in moves] for u in approximate]),
        )


def _measure(probe: Probe, x: Tensor, motions: Sequence[Sequence[Motion]]) -> EquivarianceError:
    """Errors of some elements, each with its shifts."""
    if not motions:
        return EquivarianceError({}, {})
    if motions[0][0].masked:
        x = x * disk(*probe.extents).to(x)
    still = None if probe.n_draws > 1 else probe.fixed_outputs(x)
    per_element: dict[int, float] = {}
    standard_error: dict[int, float] = {}
    worst: dict[Key, float] = {}
    for of_element in motions:
        element = of_element[0].element
        found = [probe.errors(x, still, motion) for motion in of_element]
        per_element[element], standard_error[element] = max(
            values for errors in found for key, values in errors.items() if not key[0]
        )
        for errors in found:
            for key, (error, _) in errors.items():
                worst[key] = max(error, worst.get(key, 0.0))
    return EquivarianceError(per_element, standard_error, _by_layer(worst))


def _by_layer(worst: Mapping[Key, float]) -> dict[str, float]:
    """The largest error over the calls of a module, taken for what fits best."""
    calls: dict[tuple[str, int], float] = {}
    for (name, call, _), error in worst.items():
        calls[name, call] = min(error, calls.get((name, call), math.inf))
    layers: dict[str, float] = {}
    for (name, _), error in calls.items():
        if name:
            layers[name] = max(error, layers.get(name, 0.0))
    return layers


def _elements(group: FiniteGroup, mode: str) -> tuple[list[int], list[int]]:
    """Elements to compare exactly and approximately."""
    if mode not in ("auto", "exact", "approximate"):
        raise ConfigError(f"mode={mode!r}: use 'auto', 'exact' or 'approximate'")
    exact = [u for u in range(group.order) if maps_pixels_to_pixels(group, u)]
    approximate = [u for u in range(group.order) if u not in exact]
    if mode == "approximate" and not approximate:
        raise ConfigError(f"mode='approximate': all elements of {group!r} are exact; use 'exact'")
    return ([] if mode == "approximate" else exact), ([] if mode == "exact" else approximate)


def _moves(shifts: bool | Sequence[tuple[int, int]], n_draws: int) -> Sequence[tuple[int, int]]:
    if not is_count(n_draws) or (n_draws > 1 and shifts):
        raise ConfigError(
            f"n_draws={n_draws!r}, shifts={shifts!r}: use a whole number of draws, and shifts "
            f"with a single one only"
        )
    if isinstance(shifts, bool):
        return _SHIFTS if shifts else _SHIFTS[:1]
    if not isinstance(shifts, Sequence) or not all(map(is_shift, shifts)):
        raise ConfigError(f"shifts={shifts!r}: use pairs of whole numbers, [(rows, columns), ...]")
    return (*_SHIFTS[:1], *shifts)


def _kind_of_input(x: Tensor, group: FiniteGroup) -> Kind:
    if x.ndim == 4 and len(x):
        return "picture"
    if x.ndim == 5 and len(x) and x.shape[2] == group.order:
        return "map"
    raise DataError(
        f"inputs {tuple(x.shape)} are neither pictures [n, c, y, x] nor maps "
        f"[n, c, {group.order}, y, x] of {group!r}"
    )
