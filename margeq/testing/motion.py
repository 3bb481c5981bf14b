"""One motion of an input, and what it does to the outputs of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, DataError
from margeq.groups.action import Interpolation, Kind, act, disk
from margeq.groups.finite import FiniteGroup

__all__ = ["Key", "Motion", "Probe"]

Outputs = dict[tuple[str, int], Tensor]
"""By the name of the module, ``""`` for the model, and the number of its call."""

Key = tuple[str, int, str]
"""Name of a module, number of its call, what its output is taken for."""

_RANDOM = 1e-3
"""Relative difference of two passes of one input from which a model counts as random."""


@dataclass(frozen=True)
class Motion:
    """A group element, then a circular shift; ``masked`` compares inside of a disk only."""

    element: int
    shift: tuple[int, int]
    masked: bool


@dataclass(frozen=True)
class Probe:
    """A model on inputs of one size, and how it is to be measured."""

    model: nn.Module
    group: FiniteGroup
    kind: Kind
    extents: tuple[int, int]
    out: str
    per_layer: bool
    n_draws: int
    interpolation: Interpolation
    share: float

    def errors(
        self, x: Tensor, still: Outputs | None, motion: Motion
    ) -> dict[Key, tuple[float, float]]:
        """Error and standard error of each output; ``still`` are those of a fixed network."""
        moved_x = self._act(x, self.kind, motion, motion.shift)
        tallies: dict[Key, _Tally] = {}
        for _ in range(self.n_draws):
            before = self._outputs(x) if still is None else still
            after = self._outputs(moved_x)
            for (name, call), y in before.items():
                z = after.get((name, call))
                if z is None or y.shape != z.shape:
                    raise DataError(
                        f"{name or type(self.model).__name__} returned {tuple(y.shape)} for an "
                        f"input, and {z if z is None else tuple(z.shape)} for a moved one"
                    )
                for kind in self._kinds(name, y):
                    pair = self._difference(name, y, z, kind, motion)
                    if pair is not None:
                        tallies.setdefault((name, call, kind), _Tally()).add(*pair)
        return {key: tally.errors() for key, tally in tallies.items()}

    def fixed_outputs(self, x: Tensor) -> Outputs:
        """Outputs of a model that is not random.

        Returns:
            Those of one pass.

        Raises:
            ConfigError: if two passes differ.
        """
        still = self._outputs(x)
        y, again = still["", 0], self._outputs(x)["", 0]
        if y.shape != again.shape or float((y - again).norm()) > _RANDOM * float(y.norm()):
            raise ConfigError(
                f"{type(self.model).__name__} is random, two passes of one input differ: pass "
                f"n_draws=100 or more, or call .eval() first"
            )
        return still

    def _outputs(self, x: Tensor) -> Outputs:
        found: Outputs = {}
        recorded = _recorded(self.model, found) if self.per_layer else nullcontext()
        with _copied_buffers(self.model), recorded:
            y = self.model(x)
        if not isinstance(y, Tensor) or not bool(y.isfinite().all()):
            what = "values that are not finite" if isinstance(y, Tensor) else type(y).__name__
            raise DataError(f"{type(self.model).__name__} returned {what}; expected one tensor")
        return {**found, ("", 0): y}

    def _kinds(self, name: str, y: Tensor) -> tuple[str, ...]:
        """What an output may be."""
        order = self.group.order
        found = {2: ("vector",), 3: ("elements",), 4: ("picture",), 5: ("map",)}.get(y.ndim, ())
        if y.ndim in (3, 5) and y.shape[2] != order:
            found = ()
        if name:  # an inner layer may have merged channels
            return (*found, "merged") if y.ndim == 4 and y.shape[1] % order == 0 else found
        if not found or self.out not in ("auto", *found):
            wanted = "vector, picture or map" if self.out == "auto" else self.out
            raise DataError(
                f"{type(self.model).__name__} returned {tuple(y.shape)}, which is no {wanted} of "
                f"{self.group!r}"
            )
        return found

    def _difference(
        self, name: str, y: Tensor, z: Tensor, kind: str, motion: Motion
    ) -> tuple[Tensor, Tensor] | None:
        """``f(L_u x) - L_u f(x)`` and ``f(x)``, in double precision, as maps if merged."""
        y, z = y.double(), z.double()
        own: Any = kind
        if kind == "merged":
            own, order = "map", self.group.order
            y, z = y.unflatten(1, (-1, order)), z.unflatten(1, (-1, order))
        spatial = own in ("map", "picture")
        shifts = self._expected_shifts(name, motion.shift, y) if spatial else [(0, 0)]
        if not shifts:
            return None
        differences = torch.stack([z - self._act(y, own, motion, shift) for shift in shifts])
        if motion.masked and spatial:
            inside = disk(y.shape[-2], y.shape[-1], self.share).to(y)
            differences, y = differences * inside, y * inside
        best = differences.flatten(2).norm(dim=-1).argmin(0)
        return differences[best, torch.arange(len(best), device=best.device)], y

    def _act(self, x: Tensor, kind: Kind, motion: Motion, shift: tuple[int, int]) -> Tensor:
        return act(
            x, self.group, motion.element, kind, shift=shift, interpolation=self.interpolation
        )

    def _expected_shifts(
        self, name: str, shift: tuple[int, int], y: Tensor
    ) -> list[tuple[int, int]]:
        """Shifts of a smaller map that belong to one of the input; none if it is no part of it."""
        if not any(shift):
            return [(0, 0)]
        if any(extent % own for extent, own in zip(self.extents, y.shape[-2:], strict=True)):
            if name:
                return []
            raise DataError(
                f"circular shifts of {self.extents} pixels mean nothing to an output of "
                f"{tuple(y.shape[-2:])}; use circular padding, or shifts=False"
            )
        steps = (extent // own for extent, own in zip(self.extents, y.shape[-2:], strict=True))
        choices = [sorted({d // s, -(-d // s)}) for d, s in zip(shift, steps, strict=True)]
        return [(rows, columns) for rows, columns in product(*choices)]


@dataclass
class _Tally:
    """Sums over draws of a difference and of what it is relative to."""

    difference: Tensor | float = 0.0
    reference: Tensor | float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, difference: Tensor, reference: Tensor) -> None:
        """One draw."""
        self.difference = self.difference + difference
        self.reference = self.reference + reference
        self.squares += float(difference.square().sum())
        self.count += 1

    def errors(self) -> tuple[float, float]:
        """Relative error of the mean, and its standard error."""
        total, size = _norm(self.difference), _norm(self.reference)
        if self.count == 1:
            return _ratio(total, size), 0.0
        # the variance of the mean, summed over entries, times count^2
        variance = max(self.squares - total**2 / self.count, 0.0) * self.count / (self.count - 1)
        return _ratio(total, size), _ratio(math.sqrt(variance), size)


def _norm(values: Tensor | float) -> float:
    return float(values.norm()) if isinstance(values, Tensor) else abs(values)


def _ratio(value: float, size: float) -> float:
    if value == 0.0:
        return 0.0
    return value / size if size > 0.0 else math.inf


@contextmanager
def _copied_buffers(model: nn.Module) -> Iterator[None]:
    """Run on copies of the buffers: normalisation in training mode counts its batches in them."""
    # modules, and buffers, may have several names, and then need one copy
    own = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in own}
    try:
        for module, name, buffer in own:
            setattr(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


@contextmanager
def _recorded(model: nn.Module, found: Outputs) -> Iterator[None]:
    """Keep the outputs of all modules inside."""

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                call = sum(known == name for known, _ in found)
                found[name, call] = y.clone()  # what follows may work in place

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
