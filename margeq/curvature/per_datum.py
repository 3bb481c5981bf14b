"""Gradients of single data, from recorded calls: what Kronecker factors average away.

    g[n,b,o,i] = sum_t output_grads[n,t,b,o] inputs[n,t,b,i]

summed over shared positions and over all calls that use the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from margeq.curvature.capture import Use
from margeq.curvature.io import InputRows, Layout

__all__ = ["Call", "CallReader", "chunks", "gradient"]

_CHUNK_NUMBERS = 2**22


@dataclass(frozen=True)
class Call:
    """Inputs and output gradients of one weight in one call.

    Attributes:
        inputs: ``[n, t, b, i]``.
        grads: ``[n, t, b, o]``.
    """

    inputs: Tensor
    grads: Tensor

    @property
    def is_shared(self) -> bool:
        """Whether the call uses the weight at several positions."""
        return self.inputs.shape[1] > 1


class CallReader:
    """Translates recorded calls and gradients into one list of calls per weight.

    Args:
        transform: what to do with the inputs of a weight, once per batch instead of per column.
    """

    def __init__(self, transform: Callable[[str, Tensor], Tensor] | None = None) -> None:
        self._transform = transform
        self._first: weakref.ref[Use] | None = None
        self._inputs: list[dict[str, Tensor]] = []
        self.layouts: dict[str, Layout] = {}

    @torch.no_grad()
    def read(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> dict[str, list[Call]]:
        """All calls of each weight that the output depends on, for one column of the root.

        Returns:
            Weight name -> its calls.
        """
        self._read_inputs(uses)
        calls: dict[str, list[Call]] = {}
        for use, inputs, grad in zip(uses, self._inputs, grads, strict=True):
            if grad is None:
                continue
            by_local = use.rule.output_grads(use.layer, use.x, grad[None])
            for local, name in use.names.items():
                values = _promoted(by_local[local][0])
                if inputs[name].shape[1] < values.shape[1]:  # a bias: one input, many positions
                    values = values.sum(1, keepdim=True)
                calls.setdefault(name, []).append(Call(inputs[name], values))
        return calls

    def _read_inputs(self, uses: Sequence[Use]) -> None:
        # all columns of a batch share their inputs; a weak reference keeps no graph alive
        if not uses or (self._first is not None and self._first() is uses[0]):
            return
        self._first = weakref.ref(uses[0])
        self._inputs = [self._inputs_of(use) for use in uses]

    def _inputs_of(self, use: Use) -> dict[str, Tensor]:
        found = {}
        for local, rows in use.rule.inputs(use.layer, use.x, _everywhere).items():
            if local in use.names:
                name = use.names[local]
                self.layouts[name] = rows.layout
                values = _promoted(_distinct(rows.expanded()))
                found[name] = values if self._transform is None else self._transform(name, values)
        return found


def gradient(calls: Sequence[Call], data: slice) -> Tensor:
    """Gradients ``[n, b, o, i]`` of some of the data."""
    parts = [
        torch.einsum("ntbo,ntbi->nboi", call.grads[data], call.inputs[data].to(call.grads.dtype))
        for call in calls
    ]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def chunks(calls: Sequence[Call]) -> Iterator[slice]:
    """Slices of the data whose gradients fit into a limited memory."""
    inputs, grads = calls[0].inputs, calls[0].grads
    per_datum = inputs.shape[2] * inputs.shape[3] * grads.shape[3]
    size = max(1, _CHUNK_NUMBERS // per_datum)
    for start in range(0, len(inputs), size):
        yield slice(start, start + size)


def _everywhere(_: int) -> None:
    return None


def _distinct(rows: InputRows) -> Tensor:
    """The inputs, without the copies of a bias's constant ones."""
    return rows.rows[:, :1] if rows.is_bias else rows.rows


def _promoted(values: Tensor) -> Tensor:
    """Half precision as float32, the least that curvature is formed in."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.detach().float() if half else values.detach()
