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

__all__ = ["FactorSums", "Factors", "InputCovCache"]


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


class FactorSums:
    """Kronecker factors of all weights, as plain sums over the calls that are added.

    Args:
        weights: by name.
        options: how to approximate.
        cache: input factors known from an earlier pass.
        differentiable: keep the graph of what the calls were computed from.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        options: KfacOptions,
        cache: InputCovCache | None = None,
        *,
        differentiable: bool = False,
    ) -> None:
        self._weights, self._options = weights, options
        self._differentiable = differentiable
        self._cache = InputCovCache() if cache is None else cache
        self._factors = {name: Factors() for name in weights}

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Add the input covariances of one batch.

        Args:
            uses: its recorded calls.
            inputs: what the model was called with.
            keys: one key per datum, for the sample of positions.
        """
        with torch.set_grad_enabled(self._differentiable):
            self._add_inputs(uses, inputs, keys)

    def _add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        sums: dict[str, tuple[Tensor, int]] = {}
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
                self._factors[name].describe(rows, from_data)
                if self._reduces(name):
                    total, n_positions = _promoted(rows.rows).sum(1, keepdim=True), rows.n_positions
                    if name in sums:
                        total, n_positions = total + sums[name][0], n_positions + sums[name][1]
                    sums[name] = total, n_positions
                else:
                    self._expand_inputs(name, rows)
        for name, (total, n_positions) in sums.items():
            self._factors[name].add_inputs(gram(total / n_positions), len(keys))

    def _expand_inputs(self, name: str, rows: InputRows) -> None:
        n_data, n_sampled = rows.rows.shape[:2]
        cov = gram(_promoted(rows.rows))
        if n_sampled != rows.n_positions:
            cov = cov * (rows.n_positions / n_sampled)
        self._factors[name].add_inputs(cov, n_data * rows.n_positions)

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add the gradient covariances of one column of the root.

        Args:
            uses: recorded calls.
            grads: the gradient of each call's output, ``None`` where it does not matter.
        """
        with torch.set_grad_enabled(self._differentiable):
            self._add_gradients(uses, grads)

    def _add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        rows: list[tuple[str, Tensor]] = []
        sums: dict[str, Tensor] = {}
        for use, grad in zip(uses, grads, strict=True):
            if grad is None:
                continue
            by_name = use.rule.output_grads(use.layer, use.x, grad[None])
            for local, name in use.names.items():
                values = _promoted(by_name[local][0])
                if self._reduces(name):
                    values = values.sum(1, keepdim=True) if values.shape[1] > 1 else values
                    sums[name] = sums[name] + values if name in sums else values
                else:
                    rows.append((name, values))
        grams: dict[object, Tensor] = {}  # without shared positions a bias has its weight's rows
        for name, values in (*rows, *sums.items()):
            identity = (values.data_ptr(), values.shape, values.stride())
            if identity not in grams:
                grams[identity] = gram(values)
            self._factors[name].add_grads(grams[identity])

    def input_covs(self) -> dict[str, Tensor]:
        """Input covariances so far, of the weights that have any."""
        found = {name: factors.input_cov for name, factors in self._factors.items()}
        return {name: cov for name, cov in found.items() if cov is not None}

    def take_grad_covs(self) -> dict[str, Tensor]:
        """Gradient covariances since the last call, of the weights that have any."""
        found = {name: factors.grad_cov for name, factors in self._factors.items()}
        for factors in self._factors.values():
            factors.grad_cov = None
        return {name: cov for name, cov in found.items() if cov is not None}

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
