"""Running sums of the Kronecker factors of every weight, from recorded calls and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.curvature.capture import Use
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.io import InputRows, Layout
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.curvature.sampling import sample_positions
from margeq.linalg import accumulation_dtype, gram

__all__ = ["FactorSums", "Factors", "InputCovCache", "InputTerm"]


@dataclass
class Factors:
    """Running sums of one weight tensor."""

    grad_cov: Tensor | None = None
    input_cov: Tensor | None = None
    n_shared: float = 0.0
    layout: Layout = "obi"
    resolution: float = 0.0
    is_bias: bool = False
    from_data: bool | None = None

    def take_inputs(self, other: Factors) -> None:
        """Use the input sums of another pass over the same data."""
        self.input_cov, self.n_shared = other.input_cov, other.n_shared
        self.layout, self.is_bias, self.resolution = other.layout, other.is_bias, other.resolution

    def describe(self, rows: InputRows, from_data: bool) -> None:
        """Note what the inputs of one call say about the weight."""
        self.layout, self.is_bias = rows.layout, rows.is_bias
        self.from_data = from_data and self.from_data is not False

    def add_inputs(self, cov: Tensor, n_shared: int) -> None:
        """Add an input covariance over ``n_shared`` shared positions of all data together."""
        self.resolution = max(self.resolution, torch.finfo(cov.dtype).eps)
        self.input_cov = _added(self.input_cov, cov)
        self.n_shared += n_shared

    def add_grads(self, cov: Tensor) -> None:
        """Add a gradient covariance."""
        self.grad_cov = _added(self.grad_cov, cov)

    def kron(self) -> BlockKron | None:
        """The finished sums, or ``None`` for a weight that the network does not use."""
        if self.input_cov is None or self.grad_cov is None:
            return None
        n_shared = self.input_cov.new_tensor(self.n_shared)
        return BlockKron(self.grad_cov, self.input_cov, n_shared, self.layout, self.resolution)


@dataclass
class InputCovCache:
    """Input factors of layers that read the data directly, kept while the data stay the same.

    A pass with another checksum than the stored one is repeated without the cache.
    """

    checksum: int | None = None
    factors: dict[str, Factors] = field(default_factory=dict)

    def has(self, names: Mapping[str, str]) -> bool:
        """Whether the input factors of all these weights are known."""
        return self.checksum is not None and self.factors.keys() >= set(names.values())

    def fill(self, checksum: int, factors: Mapping[str, Factors]) -> None:
        """Keep the factors that come from the data alone, unless some are kept already."""
        if self.checksum is None:
            self.checksum = checksum
            self.factors = {name: f for name, f in factors.items() if f.from_data}


@dataclass(frozen=True)
class InputTerm:
    """What one batch adds to an input covariance: ``scale * gram(rows)``."""

    name: str
    rows: Tensor
    scale: float
    n_shared: int


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
                cov = gram(term.rows)
                cov = cov if term.scale == 1.0 else cov * term.scale
                self._factors[term.name].add_inputs(cov, term.n_shared)

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
        for use in uses:
            from_data = _is_first(use, inputs)
            if from_data and self._cache.has(use.names):
                for name in use.names.values():
                    self._factors[name].take_inputs(self._cache.factors[name])
                continue
            for local, rows in use.rule.inputs(use.layer, use.x, self._sampler(use, keys)).items():
                if local not in use.names:
                    continue
                name, values = use.names[local], _promoted(rows.rows)
                self._factors[name].describe(rows, from_data)
                if self._reduces(name):
                    total, count = means.get(name, (0.0, 0))
                    means[name] = total + values.sum(1, keepdim=True), count + rows.n_positions
                else:
                    n_data, n_sampled = values.shape[:2]
                    scale = rows.n_positions / n_sampled
                    terms.append(InputTerm(name, values, scale, n_data * rows.n_positions))
        for name, (total, n_positions) in means.items():
            terms.append(InputTerm(name, total / n_positions, 1.0, len(keys)))
        return terms

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
        terms: list[tuple[str, Tensor]] = []
        sums: dict[str, Tensor] = {}
        for use, grad in zip(uses, grads, strict=True):
            if grad is None:
                continue
            by_name = use.rule.output_grads(use.layer, use.x, grad[None])
            for local, name in use.names.items():
                values = _promoted(by_name[local].squeeze(0))
                if self._reduces(name):
                    values = values.sum(1, keepdim=True) if values.shape[1] > 1 else values
                    sums[name] = sums[name] + values if name in sums else values
                else:
                    terms.append((name, values))
        return [*terms, *sums.items()]

    def finish(self, checksum: int) -> BlockCurvature:
        """The curvature of every weight; fills the cache."""
        self._cache.fill(checksum, self._factors)
        return BlockCurvature(
            {name: f.kron() or self._empty(name) for name, f in self._factors.items()}
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
        if fraction >= 1.0 or any(
            self._options.approx_of(n) == "reduce" for n in use.names.values()
        ):
            return lambda _: None
        return lambda n_positions: sample_positions(keys, stream, n_positions, fraction)

    def _reduces(self, name: str) -> bool:
        if self._factors[name].is_bias:
            return self._options.bias_approx == "exact"
        return self._options.approx_of(name) == "reduce"


def _added(total: Tensor | None, cov: Tensor) -> Tensor:
    """The sum in the accumulation dtype, formed in place; ``cov`` itself is never kept."""
    if total is None:
        return cov.to(accumulation_dtype(cov.device), copy=True)
    return total.add_(cov)


def _is_first(use: Use, inputs: Any) -> bool:
    """Whether a call's input factors come from the data alone."""
    if not (isinstance(inputs, Tensor) and _same_memory(use.x, inputs)):
        return False
    # a basis in the layer, or whatever else is no weight, may change what the weights see
    return {name for name, _ in use.layer.named_parameters()} == set(use.names)


def _same_memory(x: Tensor, data: Tensor) -> bool:
    return x.data_ptr() == data.data_ptr() and x.shape == data.shape


def _promoted(values: Tensor) -> Tensor:
    """Half precision as float32, the least that factors are formed in."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values
