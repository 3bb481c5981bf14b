"""One pass over the data: un-normalised Kronecker factors, fit term and counts.

Everything in a :class:`CurvatureState` is a plain sum over data, so batch splits, parallel ranks
and resumed passes add up exactly; eigenvalues and logarithms come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.batches import Batch, map_tensors, read_batches
from margeq.curvature.capture import (
    Use,
    backpropagate,
    eval_mode,
    forward,
    record,
    require_batch_axis,
    require_rules,
)
from margeq.curvature.io import Layout
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import EvidenceFlavour, KfacOptions
from margeq.curvature.roots import Root, TraceHistogram, kept_columns, packing_point
from margeq.curvature.sampling import checksum, sample_keys, sample_positions
from margeq.errors import NonFiniteError
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.linalg import accumulation_dtype, gram
from margeq.parameters import named_weights

__all__ = ["CurvatureState", "InputCovCache", "accumulate", "accumulate_with"]


@dataclass(frozen=True)
class CurvatureState:
    """Sums over the data at one set of weights; free of prior, noise and temperature.

    Attributes:
        kron: curvature per weight tensor.
        fit: log-likelihood (classification) or squared residuals per output (regression).
        n_data: number of data that were counted.
        square_norms: squared Euclidean norm per weight tensor.
        flavour: how the curvature was approximated.
        captured_trace: share of the output Hessian's trace that the root kept.
        checksum: order-independent checksum of the inputs.
    """

    kron: dict[str, BlockKron]
    fit: Tensor
    n_data: int
    square_norms: dict[str, Tensor]
    flavour: EvidenceFlavour
    captured_trace: float = 1.0
    checksum: int = 0


@dataclass
class InputCovCache:
    """Input factors of layers that read the data directly, kept while the data stay the same.

    A pass with another checksum than the stored one is repeated without the cache.
    """

    checksum: int | None = None
    factors: dict[str, _Factors] = field(default_factory=dict)


def accumulate(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    *,
    hessian_root: str = "exact",
    mc_samples: int = 1,
    captured_trace: float = 0.999,
    kfac_approx: str | Mapping[str, str] = "expand",
    bias_approx: str = "exact",
    position_fraction: float = 1.0,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    seed: int = 0,
) -> CurvatureState:
    """Accumulate the Kronecker-factored GGN of a model over a loader, at its current weights.

    Args:
        model: left as it is, flags of all sub-modules included.
        loader: re-iterable batches ``(inputs, targets)``.
        likelihood: ``"classification"``, ``"regression"`` or an object.
        hessian_root: see :class:`margeq.curvature.options.KfacOptions`, as for the next five.
        mc_samples: columns of the Monte-Carlo root.
        captured_trace: share of the trace that the adaptive root keeps.
        kfac_approx: ``"expand"`` or ``"reduce"``, or a mapping by name.
        bias_approx: ``"exact"`` or ``"expand"``.
        position_fraction: share of shared positions used for input covariances.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        seed: of the random draws, which are seeded by sample content besides.

    Returns:
        Un-normalised sums over the data.

    Raises:
        ConfigError: for unknown options.
        DataError: for batches that cannot be used.
        MissingRuleError: for a trainable weight without a curvature rule.
        NonFiniteError: for outputs that are NaN or infinite.
    """
    options = KfacOptions(
        hessian_root, mc_samples, captured_trace, kfac_approx, bias_approx, position_fraction, seed
    )
    return accumulate_with(
        model, loader, as_likelihood(likelihood), options, parameters=parameters, batch_fn=batch_fn
    )


def accumulate_with(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: Likelihood,
    options: KfacOptions,
    *,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    cache: InputCovCache | None = None,
) -> CurvatureState:
    """As :func:`accumulate`, with ready-made options and an optional input-factor cache."""
    weights = named_weights(model, parameters)
    require_rules(model, weights)
    device = next(model.parameters()).device

    def batches() -> Iterable[Batch]:
        return read_batches(loader, device, batch_fn)

    with eval_mode(model), torch.enable_grad():
        threshold, captured = _threshold(model, batches(), likelihood, options)
        run = _Pass(model, weights, likelihood, options, threshold, cache)
        for batch in batches():
            run.add(batch)
    if cache is not None and cache.checksum not in (None, run.checksum):
        cache.checksum, cache.factors = None, {}
        return accumulate_with(
            model, loader, likelihood, options, parameters=parameters, batch_fn=batch_fn
        )
    label = "all" if parameters == "all" else repr(sorted(parameters))
    return run.state(options.flavour(type(likelihood).__name__, label), captured)


def _threshold(
    model: nn.Module, batches: Iterable[Batch], likelihood: Likelihood, options: KfacOptions
) -> tuple[float | None, float]:
    """Norm above which the adaptive root keeps a column, from a forward pass over all data."""
    if options.hessian_root != "adaptive":
        return None, 1.0
    histogram = TraceHistogram()
    with torch.no_grad():
        for batch in batches:
            outputs = forward(model, batch.inputs)
            likelihood.check_targets(outputs, batch.targets)
            histogram.add(likelihood.root(outputs).square_norms())
    return histogram.threshold(options.captured_trace)


class _Factors:
    """Running sums of one weight tensor."""

    def __init__(self) -> None:
        self.grad_cov: Tensor | None = None
        self.input_cov: Tensor | None = None
        self.n_shared: Tensor | None = None
        self.layout: Layout = "obi"
        self.resolution = 0.0
        self.is_bias = False
        self.from_data: bool | None = None

    def take_inputs(self, other: _Factors) -> None:
        self.input_cov, self.n_shared = other.input_cov, other.n_shared
        self.layout, self.is_bias, self.resolution = other.layout, other.is_bias, other.resolution

    def add_inputs(self, cov: Tensor, n_shared: int) -> None:
        self.resolution = max(self.resolution, torch.finfo(cov.dtype).eps)
        cov = cov.to(accumulation_dtype(cov.device))
        self.input_cov = cov if self.input_cov is None else self.input_cov + cov
        count = torch.tensor(float(n_shared), dtype=cov.dtype, device=cov.device)
        self.n_shared = count if self.n_shared is None else self.n_shared + count

    def add_grads(self, cov: Tensor) -> None:
        cov = cov.to(accumulation_dtype(cov.device))
        self.grad_cov = cov if self.grad_cov is None else self.grad_cov + cov


class _Pass:
    """The sums of one pass over the data."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        options: KfacOptions,
        threshold: float | None,
        cache: InputCovCache | None,
    ) -> None:
        self._model, self._weights = model, weights
        self._likelihood, self._options = likelihood, options
        self._threshold, self._cache = threshold, cache
        self._factors = {name: _Factors() for name in weights}
        self._fit: Tensor | None = None
        self._n_data = 0
        self.checksum = 0

    def add(self, batch: Batch) -> None:
        """Add one batch: forward, input factors, then one backward pass per column."""
        keys = sample_keys(batch.inputs, self._options.seed)
        self.checksum = (self.checksum + checksum(sample_keys(batch.inputs))) % 2**63
        with record(self._model, self._weights) as uses:
            outputs = forward(self._model, batch.inputs)
        require_batch_axis(uses, len(batch))
        self._add_fit(outputs, batch)
        self._add_inputs(uses, batch, keys)
        self._add_columns(outputs, uses, batch, keys)

    def _add_fit(self, outputs: Tensor, batch: Batch) -> None:
        targets = self._likelihood.check_targets(outputs, batch.targets)
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(
                f"batch {batch.index}: the model's outputs are not finite; the weights have "
                f"diverged, lower the learning rate"
            )
        fit = self._likelihood.fit(outputs.detach(), targets)
        fit = fit.to(accumulation_dtype(fit.device))
        self._fit = fit if self._fit is None else self._fit + fit
        self._n_data += len(batch)

    def _add_inputs(self, uses: Sequence[Use], batch: Batch, keys: Tensor) -> None:
        means: dict[str, list[tuple[Tensor, int]]] = {}
        for use in uses:
            from_data = isinstance(batch.inputs, Tensor) and _same_memory(use.x, batch.inputs)
            if from_data and self._cached(use):
                continue
            for local, rows in use.rule.inputs(use.layer, use.x, self._sampler(use, keys)).items():
                if local not in use.names:
                    continue
                name = use.names[local]
                factors = self._factors[name]
                factors.layout, factors.is_bias = rows.layout, rows.is_bias
                factors.from_data = from_data and factors.from_data is not False
                values = _promoted(rows.rows)
                if self._reduces(name):
                    means.setdefault(name, []).append((values.sum(1), rows.n_positions))
                else:
                    scale = rows.n_positions / rows.rows.shape[1]
                    factors.add_inputs(scale * gram(values), len(batch) * rows.n_positions)
        for name, parts in means.items():
            mean = torch.stack([total for total, _ in parts]).sum(0) / sum(t for _, t in parts)
            self._factors[name].add_inputs(gram(mean[:, None]), len(batch))

    def _cached(self, use: Use) -> bool:
        if self._cache is None or self._cache.checksum is None:
            return False
        if any(name not in self._cache.factors for name in use.names.values()):
            return False
        for name in use.names.values():
            self._factors[name].take_inputs(self._cache.factors[name])
        return True

    def _sampler(self, use: Use, keys: Tensor) -> Callable[[int], Tensor | None]:
        fraction = self._options.position_fraction
        stream = 2 + crc32(use.prefix.encode()) % 2**24
        # means over positions need all of them
        if fraction >= 1.0 or any(self._options.approx_of(n) == "reduce" for n in use.names.values()):
            return lambda _: None
        return lambda n_positions: sample_positions(keys, stream, n_positions, fraction)

    def _reduces(self, name: str) -> bool:
        if self._factors[name].is_bias:
            return self._options.bias_approx == "exact"
        return self._options.approx_of(name) == "reduce"

    def _add_columns(
        self, outputs: Tensor, uses: Sequence[Use], batch: Batch, keys: Tensor
    ) -> None:
        mc = self._options.hessian_root == "mc"
        flat = outputs.detach()
        root = self._likelihood.root(flat, keys if mc else None, self._options.mc_samples)
        everyone = torch.arange(len(batch), device=outputs.device)
        if self._threshold is None:
            for v in range(root.n_columns):
                column = root.columns(everyone, torch.full_like(everyone, v))
                self._add_backward(outputs, uses, column)
            return
        order, counts = kept_columns(root, self._threshold)
        packed_from = packing_point(counts, root.n_columns)
        for rank in range(packed_from):
            mask = (counts > rank)[:, None]
            column = root.columns(everyone, order[:, rank])
            self._add_backward(outputs, uses, torch.where(mask, column, 0.0))
        self._add_packed(root, order, counts, packed_from, batch)

    def _add_packed(
        self, root: Root, order: Tensor, counts: Tensor, first_rank: int, batch: Batch
    ) -> None:
        """Columns of few data: repeat those data as a batch of their own, one column each."""
        ranks = torch.arange(order.shape[1], device=order.device)
        pairs = ((ranks >= first_rank) & (ranks < counts[:, None])).nonzero()
        for chunk in pairs.split(len(batch)) if len(pairs) else ():
            data, rank = chunk[:, 0], chunk[:, 1]
            inputs = map_tensors(lambda t, data=data: t[data], batch.inputs)
            with record(self._model, self._weights) as uses:
                outputs = forward(self._model, inputs)
            self._add_backward(outputs, uses, root.columns(data, order[data, rank]))

    def _add_backward(self, outputs: Tensor, uses: Sequence[Use], column: Tensor) -> None:
        grads = backpropagate(outputs, uses, column.reshape(outputs.shape))
        sums: dict[str, Tensor] = {}
        for use, grad in zip(uses, grads, strict=True):
            if grad is None:
                continue
            by_name = use.rule.output_grads(use.layer, use.x, grad[None])
            for local, name in use.names.items():
                values = _promoted(by_name[local][0])
                if self._reduces(name):
                    total = values.sum(1, keepdim=True)
                    sums[name] = sums[name] + total if name in sums else total
                else:
                    self._factors[name].add_grads(gram(values))
        for name, total in sums.items():
            self._factors[name].add_grads(gram(total))

    def state(self, flavour: EvidenceFlavour, captured: float) -> CurvatureState:
        """The finished sums."""
        self._fill_cache()
        fit = self._fit
        assert fit is not None
        return CurvatureState(
            kron={name: self._kron(name) for name in self._weights},
            fit=fit,
            n_data=self._n_data,
            square_norms={
                name: weight.detach().to(fit.dtype).square().sum()
                for name, weight in self._weights.items()
            },
            flavour=flavour,
            captured_trace=captured,
            checksum=self.checksum,
        )

    def _fill_cache(self) -> None:
        if self._cache is None or self._cache.checksum is not None:
            return
        self._cache.checksum = self.checksum
        self._cache.factors = {name: f for name, f in self._factors.items() if f.from_data}

    def _kron(self, name: str) -> BlockKron:
        factors = self._factors[name]
        if factors.input_cov is None or factors.grad_cov is None:
            return self._empty(name)
        assert factors.n_shared is not None
        return BlockKron(
            factors.grad_cov, factors.input_cov, factors.n_shared, factors.layout, factors.resolution
        )

    def _empty(self, name: str) -> BlockKron:
        """Zero curvature of a weight that the network does not use, e.g. of an off path."""
        weight = self._weights[name]
        dtype = accumulation_dtype(weight.device)
        zeros = torch.zeros(weight.numel(), 1, 1, dtype=dtype, device=weight.device)
        return BlockKron(zeros, zeros, zeros.sum())


def _same_memory(x: Tensor, data: Tensor) -> bool:
    return x.data_ptr() == data.data_ptr() and x.shape == data.shape


def _promoted(values: Tensor) -> Tensor:
    """Half precision as float32, the least that factors are formed in."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.detach().float() if half else values.detach()
