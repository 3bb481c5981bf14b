"""Gradient of the evidence in hyperparameters inside the network, with one batch in memory.

Two phases: differentiate the evidence in the curvature sums (which are already there), then visit
the batches again, with graph, and back-propagate those cotangents,

    d log p(D) / d eta = sum_batches < d log p / d sums, d sums_batch / d eta >,

at fixed weights. With the exact root it equals full double back-propagation through the pass.
(van der Ouderaa & van der Wilk 2022; Immer et al. 2022, here with every scaling in the cotangent.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from margeq.accumulation import CurvatureState
from margeq.batches import Batch, read_batches, refuse_padding
from margeq.comm import ALONE, Comm, require_equal, together
from margeq.curvature.bare import refuse_bare
from margeq.curvature.capture import (
    Use,
    backpropagate,
    cut_off,
    eval_mode,
    forward,
    record,
)
from margeq.curvature.factors import FactorSums
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.options import KfacOptions
from margeq.curvature.roots import Root, SketchedRoot
from margeq.curvature.sampling import reseeded, sample_keys
from margeq.curvature.selection import weights_with_rules
from margeq.errors import ConfigError, DataError
from margeq.halving import Halving
from margeq.laplace import log_marginal_likelihood
from margeq.likelihoods import Likelihood
from margeq.output_scales import of_scaled_outputs
from margeq.parameters import log_hyperprior, requiring_grad, unwrapped
from margeq.priors import GaussianPrior
from margeq.pull import Pull
from margeq.revisit import ALL_DATA, CountedLoader, Revisit, n_batches

__all__ = ["Revisit", "network_gradient"]


@dataclass(frozen=True)
class _Cotangents:
    """Derivative of the evidence in each sum of the curvature state."""

    grad_cov: Mapping[str, Tensor]
    input_cov: Mapping[str, Tensor]
    fit: Tensor


def network_gradient(
    model: nn.Module,
    loader: Iterable[Any],
    state: CurvatureState,
    prior: GaussianPrior,
    likelihood: Likelihood,
    hyperparameters: Mapping[str, Tensor],
    options: KfacOptions,
    *,
    revisit: Revisit = ALL_DATA,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    comm: Comm = ALONE,
) -> dict[str, Tensor]:
    """Gradient of the log evidence in tensors that the network's output depends on.

    The weights are held fixed. One batch is in memory at a time. The batches are visited with all
    columns of the exact root, so that the gradient is that of the evidence for ``"exact"``; for
    ``"adaptive"`` it misses what ``captured_trace`` leaves out, for ``"mc"`` the noise of the draw.

    Args:
        model: left as it is.
        loader: the data behind ``state``.
        state: curvature sums at the model's present weights and hyperparameters.
        prior: precisions.
        likelihood: noise and temperature.
        hyperparameters: leaf tensors by name; those that nothing depends on get zeros.
        options: those of the pass behind ``state``, but for its root.
        revisit: all of the data, or an unbiased estimate from some of them.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        comm: ranks that visit the loaders' data together, after ``state`` was summed over them.

    Returns:
        Name -> gradient, in nats per unit; the same on all ranks.

    Raises:
        ConfigError: for a curvature without Kronecker factors.
        FlavourMismatchError: if ``state`` is of other options, or about other weights.
        DataError: if the loader yields other data than those behind ``state``, or another number
            of batches than its length.
        DistributedMismatchError: if the ranks' hyperparameters, priors or states differ.
    """
    model = unwrapped(model)
    # what follows is about outputs and targets in units of their noise
    state, likelihood = of_scaled_outputs(state, likelihood)
    require_equal(comm, _what_ranks_share(state, prior, likelihood, hyperparameters))
    if state.flavour.curvature != "kfac":
        raise ConfigError(
            f"curvature={state.flavour.curvature!r}: hyperparameters inside the network need the "
            f"Kronecker factors of curvature='kfac'"
        )
    weights = weights_with_rules(model, parameters, options)
    refuse_bare(model, weights)
    name = type(likelihood).__name__
    asked = options.flavour(name, parameters, likelihood.temperature)
    # the second phase takes the exact columns, whatever root the first one took
    replace(asked, hessian_root=state.flavour.hessian_root).require_same(state.flavour)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(requiring_grad(hyperparameters.values()))
        stack.enter_context(torch.enable_grad())
        visitor = _Visitor(
            model, weights, likelihood, options, revisit,
            _cotangents(state, prior, likelihood), hyperparameters, _pinned(model, stack),
        )  # fmt: skip
        halving = Halving()
        with together(comm):
            n_data, period = halving.attempt(
                lambda: _visit(visitor, loader, revisit, device, batch_fn, comm, halving)
            )
        n_data, sampling = visitor.reduce(comm, n_data, period > 1)
        if not sampling and n_data != state.n_data:
            raise DataError(f"the loader yielded {n_data} data, {state.n_data} before")
        visitor.add_what_is_not_data()
    return visitor.total


def _what_ranks_share(
    state: CurvatureState,
    prior: GaussianPrior,
    likelihood: Likelihood,
    hyperparameters: Mapping[str, Tensor],
) -> dict[str, Any]:
    precisions = prior.log_prior_precision.items()
    return {
        **hyperparameters,
        **{f"log precision of {name}": value for name, value in precisions},
        **likelihood.hyperparameters,
        "fit": state.fit,
        "checksum of the data": state.checksum,
    }


def _visit(
    visitor: _Visitor,
    loader: Iterable[Any],
    revisit: Revisit,
    device: torch.device,
    batch_fn: Callable[[Any], tuple[Any, Any]] | None,
    comm: Comm,
    halving: Halving,
) -> tuple[int, int]:
    """Visit this rank's data; returns their number and the period of the visits."""
    refuse_padding(loader)
    visitor.begin()
    period, counted = revisit.period(loader), CountedLoader(loader)
    batches = read_batches(counted, device, batch_fn, least=1 if comm.size == 1 else 0)
    for batch in halving.split(batches):
        if batch.index % period == revisit.seed % period:
            visitor.add(batch)
    if period > 1:
        counted.require(n_batches(loader))
    visitor.rescale(period)
    return visitor.n_data, period


def _pinned(model: nn.Module, stack: ExitStack) -> list[tuple[Tensor, Tensor]]:
    """Quantities that layers compute from hyperparameters alone, and the leaves in their place.

    A layer offers them by a context manager ``pinned()``, see ``AnchorBasis``; what it computes
    is then computed, and differentiated, once for all batches and columns. It may depend on what
    modules inside the layer offer: those are pinned first, and differentiated last.

    Returns:
        Pairs of a quantity with its graph and the leaf; only where a hyperparameter is behind it.
    """
    modules = [module for module in model.modules() if hasattr(module, "pinned")]
    modules.sort(key=lambda module: sum(1 for _ in module.modules()))  # parts before wholes
    offers = [module.pinned for module in modules]
    pairs = [stack.enter_context(offer()) for offer in offers]  # pyright: ignore[reportCallIssue]
    return [(value, leaf) for value, leaf in pairs if leaf.requires_grad]


def _cotangents(state: CurvatureState, prior: GaussianPrior, likelihood: Likelihood) -> _Cotangents:
    leaves = {
        name: replace(
            kron,
            grad_cov=kron.grad_cov.detach().requires_grad_(True),
            input_cov=kron.input_cov.detach().requires_grad_(True),
        )
        for name, kron in state.kron.items()
    }
    fit = state.fit.detach().requires_grad_(True)
    moving = replace(state, curvature=BlockCurvature(leaves), fit=fit)
    value = log_marginal_likelihood(moving, prior, likelihood)
    wanted = [fit, *(t for kron in leaves.values() for t in (kron.grad_cov, kron.input_cov))]
    grads = torch.autograd.grad(value, wanted)
    pairs = dict(zip(leaves, zip(grads[1::2], grads[2::2], strict=True), strict=True))
    # weights without curvature (off, or leading nowhere) have no say in the evidence
    pairs = {name: pair for name, pair in pairs.items() if state.kron[name].n_shared > 0}
    return _Cotangents(
        {name: pair[0] for name, pair in pairs.items()},
        {name: pair[1] for name, pair in pairs.items()},
        grads[0],
    )


class _Visitor:
    """Sums of the second phase, batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        options: KfacOptions,
        revisit: Revisit,
        cotangents: _Cotangents,
        hyperparameters: Mapping[str, Tensor],
        pinned: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self._model, self._weights, self._likelihood = model, weights, likelihood
        self._options, self._revisit, self._cotangents = options, revisit, cotangents
        self._names, self._pinned = list(hyperparameters), pinned
        self._leaves = [*hyperparameters.values(), *(leaf for _, leaf in pinned)]
        self.begin()

    def begin(self) -> None:
        """Start from zero."""
        self._totals = [torch.zeros_like(leaf) for leaf in self._leaves]
        self.n_data = 0

    @property
    def total(self) -> dict[str, Tensor]:
        """The gradient in each hyperparameter."""
        return dict(zip(self._names, self._totals, strict=False))

    def add(self, batch: Batch) -> None:
        """One backward pass per column, then one for everything that depends on the forward."""
        keys = sample_keys(batch.inputs)
        with record(self._model, self._weights, keep_graph=True) as uses:
            outputs = forward(self._model, batch.inputs)
        targets = self._likelihood.check_targets(outputs, batch.targets)
        sums = FactorSums(self._weights, self._options)
        pull = Pull()
        pull.add(self._likelihood.fit(outputs, targets), self._cotangents.fit)
        for term in sums.input_terms(uses, batch.inputs, reseeded(keys, self._options.seed)):
            if term.name in self._cotangents.input_cov:
                rows, cotangent = term.expanded_rows(), self._cotangents.input_cov[term.name]
                pull.add_gram(rows, cotangent, term.scale)
        root = self._root(outputs, keys)
        everyone = torch.arange(len(batch), device=outputs.device)
        for v in range(root.n_columns):
            column = root.columns(everyone, torch.full_like(everyone, v))
            pull.add(column, self._column(sums, outputs, uses, column.detach()))
        for use in uses:
            if use.cut.total is not None and use.edge is not None:
                pull.add_edge(use.edge, use.cut.total)
        self._pull(pull)
        self.n_data += len(batch)

    def _column(
        self, sums: FactorSums, outputs: Tensor, uses: Sequence[Use], column: Tensor
    ) -> Tensor:
        """Add what one column brings to the leaves directly.

        Ways that lead through the forward graph are cut off, at the column and at the outputs of
        all layers, and are gone once for all columns together.

        Returns:
            The derivative of the evidence in the column.
        """
        column.requires_grad_(True)
        grads = backpropagate(outputs, uses, column.reshape(outputs.shape), create_graph=True)
        pull = Pull()
        for name, rows in sums.grad_terms(uses, grads):
            if name in self._cotangents.grad_cov:
                pull.add_gram(rows, self._cotangents.grad_cov[name])
        with cut_off(uses):
            by_column = self._pull(pull, column)
        return torch.zeros_like(column) if by_column is None else by_column

    def _root(self, outputs: Tensor, keys: Tensor) -> Root:
        root = self._likelihood.root(outputs)
        if self._revisit.sketched and root.n_columns > 1:
            return SketchedRoot(root, reseeded(keys, self._revisit.seed), 1)
        return root

    def _pull(self, pull: Pull, *further: Tensor) -> Tensor | None:
        """Add the gradient in all leaves; return that in one further tensor."""
        if not pull.outputs:
            return None
        grads = torch.autograd.grad(
            pull.outputs, [*self._leaves, *further], pull.cotangents,
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for total, grad in zip(self._totals, grads, strict=False):
            if grad is not None:
                total += grad
        return grads[-1] if further else None

    def rescale(self, period: int) -> None:
        """Scale the sum over the visited batches up to all of them."""
        for total in self._totals:
            total *= period

    def reduce(self, comm: Comm, n_data: int, sampling: bool) -> tuple[int, bool]:
        """Sum over ranks; returns the number of visited data, and whether some were left out."""
        if comm.size == 1:
            return n_data, sampling
        counts = self._totals[0].new_tensor([n_data, sampling], dtype=torch.int64)
        *self._totals, counts = comm.sum([*self._totals, counts])
        return int(counts[0]), bool(counts[1])

    def add_what_is_not_data(self) -> None:
        """The penalty of the hyperparameters, and the ways that end at pinned leaves; once."""
        pull = Pull()
        pull.add(log_hyperprior(self._model), torch.ones(()))
        self._pull(pull)  # first, as it can end at pinned leaves too
        totals = self._totals[len(self._names) :]
        for (value, _), total in zip(reversed(self._pinned), reversed(totals), strict=True):
            pull = Pull()
            pull.add(value, total.clone())
            self._pull(pull)
