"""One pass over the data: un-normalised curvature sums, fit term and counts.

Everything in a :class:`CurvatureState` is a plain sum over data, so batch splits, parallel ranks
and resumed passes add up exactly; eigenvalues and logarithms come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from margeq import layers as _layers  # noqa: F401  registers the rules of all layers
from margeq.batches import Batch, read_batches, refuse_padding
from margeq.comm import ALONE, Comm, together
from margeq.curvature.capture import (
    Use,
    backpropagate,
    eval_mode,
    forward,
    require_batch_axis,
    run_recorded,
)
from margeq.curvature.eigen import EigenBases, EigenSums, eigen_bases
from margeq.curvature.explained import check_calls
from margeq.curvature.factors import FactorSums, InputCovCache
from margeq.curvature.forms import CurvatureSums
from margeq.curvature.full import FullSums
from margeq.curvature.options import EvidenceFlavour, KfacOptions
from margeq.curvature.packing import ColumnPlan, kept_columns, regrouped
from margeq.curvature.sampling import checksum, reseeded, sample_keys
from margeq.curvature.selection import weights_with_rules
from margeq.errors import ConfigError, NonFiniteError
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.linalg import accumulation_dtype, is_finite
from margeq.parameters import log_hyperprior, unwrapped
from margeq.reduction import reduce_state
from margeq.state import CurvatureState

__all__ = [
    "CurvatureState",
    "InputCovCache",
    "accumulate",
    "accumulate_with",
    "empty_state",
    "weights_with_rules",
]


def accumulate(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    *,
    curvature: str = "kfac",
    hessian_root: str = "exact",
    mc_samples: int = 1,
    captured_trace: float = 0.999,
    kfac_approx: str | Mapping[str, str] = "expand",
    bias_approx: str = "exact",
    position_fraction: float = 1.0,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    seed: int = 0,
    bases: EigenBases | None = None,
) -> CurvatureState:
    """Accumulate the GGN of a model over a loader, at its current weights, in this process.

    :func:`margeq.distributed.accumulate` does so over several processes.
    ``curvature="ekfac"`` reads the loader twice: Kronecker factors first, then exact second
    moments in their eigenvectors, unless ``bases`` are given.

    Args:
        model: left as it is, flags of all sub-modules included.
        loader: re-iterable batches ``(inputs, targets)``.
        likelihood: ``"classification"``, ``"regression"`` or an object.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diag"`` or ``"full"``; see
            :class:`margeq.curvature.options.KfacOptions`, as for the next six.
        hessian_root: ``"exact"``, ``"adaptive"`` or ``"mc"``.
        mc_samples: columns of the Monte-Carlo root.
        captured_trace: share of the trace that the adaptive root keeps.
        kfac_approx: ``"expand"`` or ``"reduce"``, or a mapping by name.
        bias_approx: ``"exact"`` or ``"expand"``.
        position_fraction: share of shared positions used for input covariances.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        seed: of the random draws, which are seeded by sample content besides.
        bases: orthogonal bases for ``"ekfac"``, from :func:`margeq.laplace.eigen_bases`; stale
            ones, or those of a cheaper root, give a valid bound too, if a looser one.

    Returns:
        Un-normalised sums over the data.

    Raises:
        ConfigError: for unknown options.
        DataError: for batches that cannot be used.
        MissingRuleError: for a trainable weight without a curvature rule.
        NonFiniteError: for outputs that are NaN or infinite.
        UnsupportedLayerError: for a weight whose gradient its rule does not explain, for instance
            one that is also used outside its module.
    """
    options = KfacOptions(
        hessian_root, mc_samples, captured_trace, kfac_approx, bias_approx, position_fraction, seed,
        curvature,
    )  # fmt: skip
    return accumulate_with(
        model, loader, as_likelihood(likelihood), options, parameters=parameters,
        batch_fn=batch_fn, bases=bases, check=True,
    )  # fmt: skip


def accumulate_with(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: Likelihood,
    options: KfacOptions,
    *,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    cache: InputCovCache | None = None,
    bases: EigenBases | None = None,
    check: bool = False,
    comm: Comm = ALONE,
) -> CurvatureState:
    """As :func:`accumulate`, with ready-made options and an optional input-factor cache.

    Without ``check`` the rules are trusted: training compares them with autograd once, beforehand.
    With ``comm`` each rank brings its own share of the data, and all get the sums over all data.

    Returns:
        Un-normalised sums over the data.

    Raises:
        ConfigError: for bases without ``curvature="ekfac"``; else as :func:`accumulate`.
        DataError: if all ranks together have no data; else as :func:`accumulate`.
    """
    model = unwrapped(model)
    if options.curvature == "ekfac" and bases is None:
        factors = accumulate_with(
            model, loader, likelihood, replace(options, curvature="kfac"), parameters=parameters,
            batch_fn=batch_fn, cache=cache, check=check, comm=comm,
        )  # fmt: skip
        bases, cache = eigen_bases(factors.kron, comm), None
    if comm.size > 1:
        cache = None  # with one a rank may have to start again on its own
    with together(comm):
        own = _own_sums(
            model, loader, likelihood, options, parameters, batch_fn, cache, bases, check, comm
        )
    return reduce_state(own, comm)


def _own_sums(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: Likelihood,
    options: KfacOptions,
    parameters: str | Sequence[str],
    batch_fn: Callable[[Any], tuple[Any, Any]] | None,
    cache: InputCovCache | None,
    bases: EigenBases | None,
    check: bool,
    comm: Comm,
) -> CurvatureState:
    """The sums over the data of this rank."""
    refuse_padding(loader)
    weights = weights_with_rules(model, parameters, options)
    if bases is not None and options.curvature != "ekfac":
        raise ConfigError(f"bases belong to curvature='ekfac', not to {options.curvature!r}")
    device = next(model.parameters()).device

    def batches() -> Iterable[Batch]:
        return read_batches(loader, device, batch_fn, least=1 if comm.size == 1 else 0)

    sums = _sums(weights, options, cache, bases)
    run = _Pass(model, weights, likelihood, options, sums, check=check, comm=comm)
    with eval_mode(model), torch.enable_grad():
        if options.hessian_root == "adaptive":
            run.add_largest_columns(batches)
        else:
            run.add_all_columns(batches())
    if cache is not None and cache.checksum not in (None, run.checksum):
        cache.checksum, cache.factors = None, {}
        return accumulate_with(
            model, loader, likelihood, options, parameters=parameters, batch_fn=batch_fn
        )
    name = type(likelihood).__name__
    return run.state(options.flavour(name, parameters, likelihood.temperature))


def empty_state(
    model: nn.Module,
    likelihood: Likelihood,
    options: KfacOptions,
    *,
    parameters: str | Sequence[str] = "all",
    bases: EigenBases | None = None,
) -> CurvatureState:
    """The state of no data at all, to which those of data can be added."""
    weights = weights_with_rules(model, parameters, options)
    sums = _sums(weights, options, None, bases)
    run = _Pass(unwrapped(model), weights, likelihood, options, sums, check=False)
    return run.state(options.flavour(type(likelihood).__name__, parameters, likelihood.temperature))


def _sums(
    weights: Mapping[str, nn.Parameter],
    options: KfacOptions,
    cache: InputCovCache | None,
    bases: EigenBases | None,
) -> CurvatureSums:
    if options.curvature == "full":
        return FullSums(weights)
    if options.curvature in ("ekfac", "diag"):
        return EigenSums(weights, bases or {})
    return FactorSums(weights, options, cache)


class _Pass:
    """The sums of one evaluation of the curvature."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        options: KfacOptions,
        sums: CurvatureSums,
        *,
        check: bool,
        comm: Comm = ALONE,
    ) -> None:
        self._model, self._weights = model, weights
        self._likelihood, self._options = likelihood, options
        self._sums, self._unchecked, self._comm = sums, check, comm
        self._fit: Tensor | None = None
        self._n_data = 0
        self._captured, self._threshold, self._trace = 1.0, 0.0, 0.0
        self.checksum = 0
        self._pairs = 0

    def add_all_columns(self, batches: Iterable[Batch]) -> None:
        """For each batch: forward, input factors, then one backward pass per column."""
        mc = self._options.hessian_root == "mc"
        for batch in batches:
            keys = sample_keys(batch.inputs)
            outputs, uses = self._recorded(batch.inputs)
            self._add_data(batch, keys, outputs, uses)
            self._check_first(outputs, uses)
            draws = reseeded(keys, self._options.seed) if mc else None
            root = self._likelihood.root(outputs.detach(), draws, self._options.mc_samples)
            everyone = torch.arange(len(batch), device=outputs.device)
            for v in range(root.n_columns):
                column = root.columns(everyone, torch.full_like(everyone, v))
                self._add_column(outputs, uses, column)

    def add_largest_columns(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Input factors and the norms of all columns first, then the columns that are kept."""
        plan = ColumnPlan(self._options.captured_trace)
        with torch.no_grad():
            for batch in batches():
                keys = sample_keys(batch.inputs)
                outputs, uses = self._recorded(batch.inputs)
                self._add_data(batch, keys, outputs, uses)
                plan.add(keys, self._likelihood.root(outputs.detach()).square_norms())
        plan.close(self._comm)
        self._captured, self._threshold, self._trace = plan.captured, plan.threshold, plan.trace
        for inputs in regrouped((b.inputs, self._counts(plan, b.inputs)) for b in batches()):
            self._add_group(inputs, plan.threshold)

    def _counts(self, plan: ColumnPlan, inputs: Any) -> Tensor:
        """Number of columns that each datum keeps, also of data that change from pass to pass."""
        counts = plan.counts(sample_keys(inputs))
        if (counts >= 0).all():
            return counts
        with torch.no_grad():
            root = self._likelihood.root(forward(self._model, inputs))
        return kept_columns(root, plan.threshold)[1]

    def _add_group(self, inputs: Any, threshold: float) -> None:
        """The kept columns of data that keep about equally many."""
        outputs, uses = self._recorded(inputs)
        self._check_first(outputs, uses)
        root = self._likelihood.root(outputs.detach())
        order, counts = kept_columns(root, threshold)
        everyone = torch.arange(len(order), device=order.device)
        for rank in range(int(counts.max())):
            column = root.columns(everyone, order[:, rank])
            self._add_column(outputs, uses, torch.where((counts > rank)[:, None], column, 0.0))

    def _check_first(self, outputs: Tensor, uses: Sequence[Use]) -> None:
        """Once: do the rules explain the gradients?"""
        if self._unchecked:
            check_calls(self._weights, outputs, uses)
            self._unchecked = False

    def _recorded(self, inputs: Any) -> tuple[Tensor, list[Use]]:
        return run_recorded(self._model, self._weights, inputs)

    def _add_data(self, batch: Batch, keys: Tensor, outputs: Tensor, uses: Sequence[Use]) -> None:
        """Counts, fit term and input factors of one batch."""
        require_batch_axis(uses, len(batch))
        targets = self._likelihood.check_targets(outputs, batch.targets)
        if not is_finite(outputs.detach()):
            raise NonFiniteError(
                f"batch {batch.index}: the model's outputs are not finite; the weights have "
                f"diverged, lower the learning rate"
            )
        fit = self._likelihood.fit(outputs.detach(), targets)
        fit = fit.to(accumulation_dtype(fit.device))
        self._fit = fit if self._fit is None else self._fit + fit
        self._n_data += len(batch)
        self.checksum = (self.checksum + checksum(keys)) % 2**63
        pairs = checksum(sample_keys((keys, targets)))
        self._pairs = (self._pairs + pairs) % 2**63
        self._sums.add_inputs(uses, batch.inputs, reseeded(keys, self._options.seed))

    def _add_column(self, outputs: Tensor, uses: Sequence[Use], column: Tensor) -> None:
        grads = backpropagate(outputs, uses, column.reshape(outputs.shape))
        self._sums.add_gradients(uses, grads)

    def state(self, flavour: EvidenceFlavour) -> CurvatureState:
        """The finished sums."""
        fit = self._fit
        if fit is None:  # a rank without data
            device = next(iter(self._weights.values())).device
            fit = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        return CurvatureState(
            curvature=self._sums.finish(self.checksum),
            fit=fit,
            n_data=self._n_data,
            square_norms={
                name: weight.detach().to(fit.dtype).square().sum()
                for name, weight in self._weights.items()
            },
            flavour=flavour,
            captured_trace=self._captured,
            checksum=self._pairs,
            log_hyperprior=float(log_hyperprior(self._model).detach()),
            threshold=self._threshold,
            trace=self._trace,
        )
