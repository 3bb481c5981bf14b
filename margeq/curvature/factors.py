"""Running sums of the Kronecker factors of every weight, from recorded calls and gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.curvature.capture import Use, used_differently
from margeq.curvature.copies import mixed_rows
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.fourier import GroupCirculant
from margeq.curvature.input_terms import (
    InputTerm,
    input_term,
    promoted,
    reduced_positions,
    summed_rows,
    times_roots,
)
from margeq.curvature.io import InputRows, Layout
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.curvature.sampling import sample_positions
from margeq.linalg import accumulation_dtype, gram

__all__ = ["FactorSums", "Factors", "InputCovCache"]

_INPUT_FIELDS = ("input_cov", "n_shared", "layout", "resolution", "is_bias", "joint", "n_frames")


@dataclass
class Factors:
    """Running sums of one weight tensor."""

    grad_cov: Tensor | None = None
    input_cov: Tensor | None = None
    n_shared: float = 0.0
    layout: Layout = "obi"
    resolution: float = 0.0
    is_bias: bool = False
    joint: bool = False
    n_frames: int = 1
    frame_weights: Tensor | None = None
    symmetry: GroupCirculant | None = None
    from_data: bool | None = None

    def take_inputs(self, other: Factors) -> None:
        """Use the input sums of another pass over the same data."""
        self.input_cov, self.n_shared = other.input_cov, other.n_shared
        self.layout, self.is_bias, self.resolution = other.layout, other.is_bias, other.resolution
        self.joint = other.joint
        self.n_frames, self.symmetry = other.n_frames, other.symmetry

    def input_state(self) -> dict[str, Any]:
        """What :meth:`take_inputs` takes over, as plain values and tensors."""
        symmetry = None if self.symmetry is None else self.symmetry.state_dict()
        return {name: getattr(self, name) for name in _INPUT_FIELDS} | {"symmetry": symmetry}

    @classmethod
    def from_input_state(cls, state: Mapping[str, Any], device: torch.device) -> Factors:
        """Input sums of a state, on a device."""
        values = dict(state)
        symmetry, cov = values.pop("symmetry"), values.pop("input_cov")
        return cls(
            **values,
            input_cov=None if cov is None else cov.to(device),
            symmetry=None if symmetry is None else GroupCirculant.from_state(symmetry, device),
            from_data=True,
        )

    def describe(self, rows: InputRows, from_data: bool) -> None:
        """Note what the inputs of one call say about the weight."""
        self.layout, self.is_bias, self.n_frames = rows.layout, rows.is_bias, rows.n_frames
        self.frame_weights, self.joint = rows.frame_weights, rows.joint
        self.from_data = from_data and self.from_data is not False

    def add_inputs(
        self, cov: Tensor, n_shared: int, symmetry: GroupCirculant | None = None
    ) -> None:
        """Add an input covariance over ``n_shared`` shared positions of all data together."""
        self.resolution = max(self.resolution, torch.finfo(cov.dtype).eps)
        is_first = self.input_cov is None
        self.symmetry = symmetry if is_first or self.symmetry == symmetry else None
        self.input_cov = _added(self.input_cov, cov)
        self.n_shared += n_shared

    def add_grads(self, cov: Tensor) -> None:
        """Add a gradient covariance."""
        self.grad_cov = _added(self.grad_cov, cov)

    def kron(self, numel: int) -> BlockKron | None:
        """The finished sums of ``numel`` numbers, or ``None`` for a weight out of use."""
        if self.input_cov is None:
            return None
        n_shared, grad_cov = self.input_cov.new_tensor(self.n_shared), self.grad_cov
        if grad_cov is None:
            # data that keep no column of the root: others do, and need the sums of all inputs
            blocks, inner, _ = self.input_cov.shape
            out = numel // (blocks * inner)
            grad_cov = self.input_cov.new_zeros(1 if self.joint else blocks, out, out)
        return BlockKron(
            grad_cov, self.input_cov, n_shared, self.layout, self.resolution, self.symmetry
        )


@dataclass
class InputCovCache:
    """Input factors of layers that read the data directly, kept while the data stay the same.

    A pass with another checksum than the stored one is repeated without the cache.
    """

    checksum: int | None = None
    factors: dict[str, Factors] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        factors = {name: kept.input_state() for name, kept in self.factors.items()}
        return {"checksum": self.checksum, "factors": factors}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what was known, to the last digit: sums depend on the order of batches."""
        self.checksum = state["checksum"]
        self.factors = {
            name: Factors.from_input_state(kept, device) for name, kept in state["factors"].items()
        }

    def has(self, names: Mapping[str, str]) -> bool:
        """Whether the input factors of all these weights are known."""
        return self.checksum is not None and self.factors.keys() >= set(names.values())

    def fill(self, checksum: int, factors: Mapping[str, Factors]) -> None:
        """Keep the factors that come from the data alone, unless some are kept already."""
        if self.checksum is None:
            self.checksum = checksum
            self.factors = {name: f for name, f in factors.items() if f.from_data}


class FactorSums:
    """Kronecker factors of all weights, as plain sums over the calls that are added.

    Args:
        weights: by name.
        options: how to approximate.
        cache: input factors known from an earlier pass.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        options: KfacOptions,
        cache: InputCovCache | None = None,
    ) -> None:
        self._weights, self._options = weights, options
        self._cache = InputCovCache() if cache is None else cache
        self._factors = {name: Factors() for name in weights}

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Add the input covariances of one batch; arguments as for :meth:`input_terms`."""
        with torch.no_grad():
            for term in self.input_terms(uses, inputs, keys):
                cov, seen = term.gram(), self._factors[term.name].input_cov
                if seen is not None and seen.shape != cov.shape:
                    raise used_differently(term.name)
                self._factors[term.name].add_inputs(cov, term.n_shared, term.symmetry)

    def input_terms(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> list[InputTerm]:
        """The rows whose products one batch adds to the input covariances.

        Args:
            uses: its recorded calls.
            inputs: what the model was called with.
            keys: one key per datum, for the sample of positions.

        Returns:
            Terms, differentiable in whatever the recorded inputs are.
        """
        terms: list[InputTerm] = []
        means: dict[str, tuple[Tensor, int]] = {}
        for name, rows, from_data in self._rows(uses, inputs, keys):
            self._factors[name].describe(rows, from_data)
            if all(self._reduces(name)):
                total, count = means.get(name, (0.0, 0))
                means[name] = total + summed_rows(rows), count + rows.n_positions
            else:
                terms.append(input_term(name, rows, *self._reduces(name)))
        for name, (total, n_positions) in means.items():
            terms.append(InputTerm(name, total / n_positions, 1.0, len(keys)))
        return terms

    def _rows(
        self, uses: Sequence[Use], inputs: Any, keys: Tensor
    ) -> Iterator[tuple[str, InputRows, bool]]:
        """What each call of a weight read, and whether from the data; copies are one call."""
        mixed: dict[tuple[str, Hashable], InputRows] = {}
        for use in uses:
            from_data = _is_first(use, inputs)
            if from_data and self._cache.has(use.names):
                for name in use.names.values():
                    self._factors[name].take_inputs(self._cache.factors[name])
                continue
            for local, rows in use.rule.inputs(use.layer, use.x, self._sampler(use, keys)).items():
                if local not in use.names:
                    continue
                name = use.names[local]
                if use.share is None:
                    yield name, rows, from_data
                else:
                    key = (name, use.call)
                    mixed[key] = mixed_rows(mixed.get(key), rows, use.share)
        for (name, _), rows in mixed.items():
            yield name, rows, False

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add the gradient covariances of one column; arguments as for :meth:`grad_terms`."""
        with torch.no_grad():
            grams: dict[object, Tensor] = {}
            for name, rows in self.grad_terms(uses, grads):
                # without shared positions a bias has its weight's rows
                identity = (rows.data_ptr(), rows.shape, rows.stride())
                if identity not in grams:
                    grams[identity] = gram(rows)
                self._factors[name].add_grads(grams[identity])

    def grad_terms(
        self, uses: Sequence[Use], grads: Sequence[Tensor | None]
    ) -> list[tuple[str, Tensor]]:
        """The rows whose products one column of the root adds to the gradient covariances.

        Args:
            uses: recorded calls, whose inputs were added before.
            grads: the gradient of each call's output, ``None`` where it does not matter.

        Returns:
            Pairs of a weight's name and rows ``[n, t, b, o]``, differentiable like ``grads``.
        """
        sums: dict[tuple[str, Hashable], Tensor] = {}
        for use, grad in zip(uses, grads, strict=True):
            if grad is None:
                continue
            by_name = use.rule.output_grads(use.layer, use.x, grad[None])
            for local, name in use.names.items():
                values = promoted(by_name[local].squeeze(0))
                reduces, factors = self._reduces(name), self._factors[name]
                if reduces[1]:
                    values = times_roots(values, factors.frame_weights)
                values = reduced_positions(values, factors.n_frames, *reduces)
                # the products of all calls together, or those of each call
                key = (name, None if all(reduces) else use.call)
                sums[key] = sums[key] + values if key in sums else values
        return [(name, values) for (name, _), values in sums.items()]

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradient covariances so far, by weight; those to come are summed anew."""
        taken = {n: f.grad_cov for n, f in self._factors.items() if f.grad_cov is not None}
        self.forget_gradients()
        return taken

    def forget_gradients(self) -> None:
        """Begin anew with the gradient covariances."""
        for factors in self._factors.values():
            factors.grad_cov = None

    def finish(self, checksum: int) -> BlockCurvature:
        """The curvature of every weight; fills the cache."""
        self._cache.fill(checksum, self._factors)
        return BlockCurvature(
            {
                name: f.kron(self._weights[name].numel()) or self._empty(name)
                for name, f in self._factors.items()
            }
        )

    def _empty(self, name: str) -> BlockKron:
        """Zero curvature of a weight that the network does not use, e.g. of an off path."""
        weight = self._weights[name]
        dtype = accumulation_dtype(weight.device)
        zeros = torch.zeros(weight.numel(), 1, 1, dtype=dtype, device=weight.device)
        return BlockKron(zeros, zeros, zeros.sum())

    def _sampler(self, use: Use, keys: Tensor) -> Callable[[int], Tensor | None]:
        fraction = self._options.position_fraction
        stream = 2 + crc32(use.prefix.encode()) % 2**24
        # means over positions need all of them
        if fraction >= 1.0 or any(self._options.reduces(n)[0] for n in use.names.values()):
            return lambda _: None
        return lambda n_positions: sample_positions(keys, stream, n_positions, fraction)

    def _reduces(self, name: str) -> tuple[bool, bool]:
        """Whether places, and whether frames, are summed before products are formed."""
        if self._factors[name].is_bias:
            exact = self._options.bias_approx == "exact"
            return exact, exact
        places, frames = self._options.reduces(name)
        one_axis = self._factors[name].n_frames == 1
        return places, places if one_axis else frames


def _added(total: Tensor | None, cov: Tensor) -> Tensor:
    """The sum in the accumulation dtype, formed in place; ``cov`` itself is never kept."""
    if total is None:
        return cov.to(accumulation_dtype(cov.device), copy=True)
    return total.add_(cov)


def _is_first(use: Use, inputs: Any) -> bool:
    """Whether a call's input factors come from the data alone."""
    if not (isinstance(inputs, Tensor) and _same_memory(use.x, inputs)):
        return False
    if getattr(use.layer, "first_factors", ()):
        return False  # what later factors of a product see moves with the first ones
    # running statistics, a basis, or whatever else of the layer's state is no weight may change
    # what the weights see; buffers outside of the state follow from the layer's arguments
    return use.layer.state_dict().keys() == use.names.keys()


def _same_memory(x: Tensor, data: Tensor) -> bool:
    return x.data_ptr() == data.data_ptr() and x.shape == data.shape
