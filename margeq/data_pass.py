"""What one pass over the data adds up: curvature sums, fit term, counts and checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.comm import Comm
from margeq.curvature.capture import (
    Use,
    backpropagate,
    forward,
    run_recorded,
)
from margeq.curvature.explained import check_calls, check_data_axis, require_batch_axis
from margeq.curvature.forms import CurvatureSums
from margeq.curvature.options import EvidenceFlavour, KfacOptions
from margeq.curvature.outputs import OutputSums
from margeq.curvature.packing import ColumnPlan, kept_columns, regrouped
from margeq.curvature.roots import drawn_outputs
from margeq.curvature.sampling import checksum, reseeded, sample_keys
from margeq.errors import NonFiniteError
from margeq.integrations.borrowed import BorrowedSums
from margeq.likelihoods import Likelihood
from margeq.linalg import accumulation_dtype, is_finite
from margeq.parameters import log_hyperprior
from margeq.state import CurvatureState

__all__ = ["DataPass"]


class DataPass:
    """The sums of one evaluation of the curvature.

    Args:
        model: in evaluation mode.
        weights: by name.
        likelihood: noise and temperature.
        options: the root, its samples and their seed.
        sums: where input and gradient terms go.
        check: compare the rules with autograd on the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        options: KfacOptions,
        sums: CurvatureSums,
        *,
        check: bool,
    ) -> None:
        self._model, self._weights = model, weights
        self._likelihood, self._options = likelihood, options
        self._sums, self._unchecked = sums, check
        self._plan = ColumnPlan(options.captured_trace)
        self._fit: Tensor | None = None
        self._n_data = 0
        self._captured, self._threshold, self._trace = 1.0, 0.0, 0.0
        self.checksum = 0
        self._pairs = 0

    def add_all_columns(self, batches: Iterable[Batch]) -> None:
        """For each batch: forward, input factors, then one backward pass per column."""
        mc = self._options.hessian_root == "mc"
        for batch in batches:
            keys, outputs, uses = self._begun(batch)
            draws = reseeded(keys, self._options.seed) if mc else None
            root = self._likelihood.root(outputs.detach(), draws, self._options.mc_samples)
            everyone = torch.arange(len(batch), device=outputs.device)
            for v in range(root.n_columns):
                column = root.columns(everyone, torch.full_like(everyone, v))
                self._add_column(outputs, uses, column)

    def add_each_output(self, batches: Iterable[Batch], sums: OutputSums) -> None:
        """For each batch: forward, input factors, then each output's columns on their own."""
        mc = self._options.hessian_root == "mc"
        for batch in batches:
            keys, outputs, uses = self._begun(batch)
            n_outputs = outputs[0].numel()
            if mc:
                draws = reseeded(keys, self._options.seed)
                which = drawn_outputs(draws, n_outputs, self._options.mc_samples)
                for sample in which.unbind(1):
                    grads = _unit_gradients(outputs, uses, sample, which.shape[1])
                    sums.add_drawn(uses, grads, sample, n_outputs)
                continue
            for output in range(n_outputs):
                sums.at_output(output, n_outputs)
                everyone = torch.full((len(outputs),), output, device=outputs.device)
                sums.add_gradients(uses, _unit_gradients(outputs, uses, everyone, n_outputs))

    def add_borrowed(self, batches: Iterable[Batch], sums: BorrowedSums) -> None:
        """For each batch: forward, then whatever another library does with it."""
        for batch in batches:
            keys = sample_keys(batch.inputs)
            with torch.set_grad_enabled(self._unchecked):
                outputs, uses = self._recorded(batch.inputs)
            self._add_data(batch, keys, outputs, uses)
            self._check_first(batch.inputs, outputs, uses)
            sums.add_batch(batch)

    def survey(self, batches: Iterable[Batch]) -> None:
        """Input factors, and the norms of all columns, by which some are kept."""
        with torch.no_grad():
            for batch in batches:
                keys = sample_keys(batch.inputs)
                outputs, uses = self._recorded(batch.inputs)
                self._add_data(batch, keys, outputs, uses)
                self._plan.add(keys, self._likelihood.root(outputs.detach()).square_norms())

    def close_survey(self, comm: Comm) -> None:
        """Set the threshold for columns, the same one on all ranks."""
        plan = self._plan
        plan.close(comm)
        self._captured, self._threshold, self._trace = plan.captured, plan.threshold, plan.trace

    def add_largest_columns(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """The columns above the threshold, in place of whatever was added before."""
        self._sums.forget_gradients()
        counted = ((batch.inputs, self._counts(batch.inputs)) for batch in batches())
        for inputs in regrouped(counted):
            self._add_group(inputs)

    def _counts(self, inputs: Any) -> Tensor:
        """Number of columns that each datum keeps, also of data that change from pass to pass."""
        counts = self._plan.counts(sample_keys(inputs))
        if (counts >= 0).all():
            return counts
        with torch.no_grad():
            root = self._likelihood.root(forward(self._model, inputs))
        return kept_columns(root, self._threshold)[1]

    def _add_group(self, inputs: Any) -> None:
        """The kept columns of data that keep about equally many."""
        outputs, uses = self._recorded(inputs)
        self._check_first(inputs, outputs, uses)
        root = self._likelihood.root(outputs.detach())
        order, counts = kept_columns(root, self._threshold)
        everyone = torch.arange(len(order), device=order.device)
        for rank in range(int(counts.max())):
            column = root.columns(everyone, order[:, rank])
            self._add_column(outputs, uses, torch.where((counts > rank)[:, None], column, 0.0))

    def _check_first(self, inputs: Any, outputs: Tensor, uses: Sequence[Use]) -> None:
        """Once: do the rules explain the gradients, and of each datum?"""
        if self._unchecked:
            check_data_axis(self._model, self._weights, inputs)
            check_calls(self._weights, outputs, uses)
            self._unchecked = False

    def _begun(self, batch: Batch) -> tuple[Tensor, Tensor, list[Use]]:
        """Forward and input factors of a batch whose columns follow: keys, outputs, calls."""
        keys = sample_keys(batch.inputs)
        outputs, uses = self._recorded(batch.inputs)
        self._add_data(batch, keys, outputs, uses)
        self._check_first(batch.inputs, outputs, uses)
        return keys, outputs, uses

    def _recorded(self, inputs: Any) -> tuple[Tensor, list[Use]]:
        return run_recorded(self._model, self._weights, inputs)

    def _add_data(self, batch: Batch, keys: Tensor, outputs: Tensor, uses: Sequence[Use]) -> None:
        """Counts, fit term and input factors of one batch."""
        require_batch_axis(uses, len(batch))
        targets = self._likelihood.check_targets(outputs, batch.targets)
        if not is_finite(outputs.detach()):
            half = " or leave float16" if outputs.dtype == torch.float16 else ""
            raise NonFiniteError(
                f"batch {batch.index}: the model's outputs are not finite; the weights have "
                f"diverged, lower the learning rate{half}"
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


def _unit_gradients(
    outputs: Tensor, uses: Sequence[Use], which: Tensor, n_samples: int
) -> list[Tensor | None]:
    """Gradients of one output of each datum, scaled as one of so many that stand for all."""
    column = torch.zeros_like(outputs.detach()).flatten(1)
    column[torch.arange(len(which), device=which.device), which] = (
        column.shape[1] / n_samples
    ) ** 0.5
    return backpropagate(outputs, uses, column.reshape(outputs.shape))
