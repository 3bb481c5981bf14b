"""The first look at model and data, before the first step: checks, counts and scales."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from margeq.accumulation import InputCovCache, require_room, weights_with_rules
from margeq.adjoint import Revisit
from margeq.batches import Batch, read_batches
from margeq.comm import Comm, together
from margeq.curvature.bare import refuse_bare
from margeq.curvature.capture import eval_mode, forward, require_outputs
from margeq.curvature.explained import check_rules
from margeq.curvature.final_layer import chosen_parameters
from margeq.curvature.options import KfacOptions
from margeq.curvature.sampling import checksum, sample_keys, tensors_of
from margeq.errors import ConfigError, DataError, DataWarning, ModelWarning
from margeq.halving import is_out_of_memory
from margeq.likelihoods import Categorical, Likelihood
from margeq.paths import all_paths_on
from margeq.priors import GaussianPrior
from margeq.training.function_scale import FunctionScale, function_scale
from margeq.training.network import require_finite, require_influence
from margeq.training.ranks import (
    first_of_all,
    refuse_same_shares,
    refuse_what_ranks_cannot_share,
)

__all__ = ["Problem", "Schedule", "first_look", "read_data"]


@dataclass(frozen=True)
class Schedule:
    """When and how steps are taken; see :func:`margeq.optimize_marglik`."""

    n_epochs: int
    n_epochs_burnin: int
    marglik_frequency: int
    n_hypersteps: int
    lr_hyp: float
    hyper_solver: str
    optimizer_cls: type[Optimizer]
    optimizer_kwargs: Mapping[str, Any] | None
    scheduler_cls: Callable[..., Any] | None
    scheduler_kwargs: Mapping[str, Any] | None
    network_gradient: str | Revisit = "auto"

    def is_due(self, epoch: int) -> bool:
        """Whether hyperparameters are updated after this epoch, counted from 1."""
        if epoch == self.n_epochs:
            return True
        return epoch >= self.n_epochs_burnin and epoch % self.marglik_frequency == 0

    @property
    def n_updates(self) -> int:
        """Number of updates in a run."""
        return sum(self.is_due(epoch) for epoch in range(1, self.n_epochs + 1))


@dataclass(frozen=True)
class Problem:
    """What all restarts share: model, data, and what a first look at them found."""

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    parameters: str | Sequence[str]
    train_loader: Iterable[Any]
    marglik_loader: Iterable[Any]
    batch_fn: Callable[[Any], tuple[Any, Any]] | None
    likelihood: Likelihood
    prior: GaussianPrior
    function_scale_prior: bool
    scale: FunctionScale
    first_inputs: Any
    options: KfacOptions
    schedule: Schedule
    n_data: int
    seed: int
    cache: InputCovCache | None
    hyperparameters: Mapping[str, Tensor]
    comm: Comm

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def batches(self, loader: Iterable[Any], first: int = 0) -> Iterator[Batch]:
        """The data of this process, from a batch on; it has some unless there are other ranks."""
        return read_data(loader, self.device, self.batch_fn, self.comm, first)

    def draws(self, epoch: int) -> KfacOptions:
        """Curvature options with draws of their own: repeating one draw would not average out."""
        return replace(self.options, seed=crc32(f"{self.seed}:{epoch}".encode()))


def first_look(
    model: nn.Module,
    train_loader: Iterable[Any],
    marglik_loader: Iterable[Any] | None,
    batch_fn: Callable[[Any], tuple[Any, Any]] | None,
    likelihood: Likelihood,
    prior: str | Mapping[str, str] | GaussianPrior,
    prior_prec_init: str | float | Mapping[str, float],
    parameters: str | Sequence[str],
    options: KfacOptions,
    schedule: Schedule,
    seed: int,
    hyperparameters: Mapping[str, Tensor],
    comm: Comm,
) -> Problem:
    """Check model and data once, before the first step, and measure what all runs need."""
    with together(comm):
        _refuse_augmentation(train_loader, marglik_loader)
        require_finite(hyperparameters)
        if comm.size > 1:
            refuse_what_ranks_cannot_share(model, train_loader, marglik_loader)
    parameters = chosen_parameters(
        model, parameters, train_loader, batch_fn, comm, lambda batch: _outputs(model, batch)
    )
    with together(comm):
        weights = weights_with_rules(model, parameters, options)
        if hyperparameters and schedule.hyper_solver != "fixed":
            refuse_bare(model, weights)
        device = next(model.parameters()).device
        batches = read_data(train_loader, device, batch_fn, comm)
        own_inputs, own_data, content = _read_once(model, batches, likelihood, comm.size > 1)
    refuse_same_shares(comm, own_data, content)
    first_inputs, n_data = first_of_all(own_inputs, own_data, device, comm)
    with together(comm):
        _warn_unseen(train_loader, own_data, n_data)
        with all_paths_on(model):
            if likelihood.weighs_outputs:
                with eval_mode(model), torch.no_grad():
                    likelihood.settle(forward(model, first_inputs))
            check_rules(model, weights, first_inputs)
            require_room(model, weights, first_inputs, likelihood, options)
            require_influence(model, hyperparameters, first_inputs)
            scale = function_scale(model, weights, first_inputs)
        built, by_function = _prior(model, weights, prior, prior_prec_init, parameters)
    return Problem(
        model, weights, parameters, train_loader,
        train_loader if marglik_loader is None else marglik_loader,
        batch_fn, likelihood, built, by_function, scale, first_inputs, options, schedule, n_data,
        seed, _cache(model, hyperparameters) if comm.size == 1 else None, hyperparameters, comm,
    )  # fmt: skip


def read_data(
    loader: Iterable[Any],
    device: torch.device,
    batch_fn: Callable[[Any], tuple[Any, Any]] | None,
    comm: Comm,
    first: int = 0,
) -> Iterator[Batch]:
    """The data of this process, of batches from ``first`` on; of several ranks some have none."""
    least = 1 if comm.size == 1 and not first else 0
    return read_batches(loader, device, batch_fn, least=least, first=first)


def _prior(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    prior: str | Mapping[str, str] | GaussianPrior,
    prior_prec_init: str | float | Mapping[str, float],
    parameters: str | Sequence[str],
) -> tuple[GaussianPrior, bool]:
    """The prior, and whether its precisions begin at function scale."""
    by_function = isinstance(prior_prec_init, str)
    if by_function and prior_prec_init != "function-scale":
        raise ConfigError(f"prior_prec_init={prior_prec_init!r}: use 'function-scale' or numbers")
    if isinstance(prior, GaussianPrior):
        if not by_function:
            raise ConfigError("prior already has precisions; leave prior_prec_init out")
        if prior.groups.keys() != weights.keys():
            raise ConfigError(
                f"prior is about other weights than the model: "
                f"{sorted(prior.groups.keys() ^ weights.keys())}"
            )
        return prior, False
    initial = 1.0 if isinstance(prior_prec_init, str) else prior_prec_init
    return GaussianPrior(model, prior, initial, parameters), by_function


def _cache(model: nn.Module, hyperparameters: Mapping[str, Tensor]) -> InputCovCache | None:
    """None with tensors that no layer declares: any layer's rule may read them."""
    declared = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "hyperparameter_names", ())
    }
    known = all(id(tensor) in declared for tensor in hyperparameters.values())
    return InputCovCache() if known else None


def _refuse_augmentation(train_loader: Iterable[Any], marglik_loader: Iterable[Any] | None) -> None:
    """The evidence is about the data as they are: changed copies are no observations."""
    name, loader = "marglik_loader", marglik_loader
    if loader is None:
        name, loader = "train_loader", train_loader
    if getattr(loader, "augment", None) is not None:
        raise ConfigError(
            f"the evidence would be that of the augmented batches of {name}; pass the training "
            f"data as they are, such as marglik_loader=task.marglik_loader(batch_size)"
        )


def _warn_unseen(loader: Iterable[Any], n_own: int, n_data: int) -> None:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    # ranks have data sets of their own, or loaders that take their share of one for all
    seen = n_own if n_data > len(dataset) else n_data
    unseen = len(dataset) - seen
    if unseen > 0:
        warnings.warn(
            f"{unseen} of {len(dataset)} samples unseen in a pass over the loader (drop_last or a "
            f"partial sampler?); the evidence is that of {n_data} samples",
            DataWarning,
            stacklevel=4,
        )


def _target_hint(likelihood: Likelihood, targets: Tensor) -> str:
    real = targets.is_floating_point() and bool((targets != targets.round()).any())
    if not isinstance(likelihood, Categorical) or not real:
        return ""
    return "; for real-valued targets pass likelihood='regression'"


def _dtype_hint(model: nn.Module, batch: Batch) -> str:
    """Integers other than bytes are left alone: they may be indices of embeddings."""
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    tensors = [
        t for t in tensors_of(batch.inputs) if t.is_floating_point() or t.dtype.itemsize == 1
    ]
    if len(weights) != 1 or all(tensor.dtype in weights for tensor in tensors):
        return ""
    return f"; the weights are {weights.pop()}: convert the inputs, in the data set or in batch_fn"


def _read_once(
    model: nn.Module, batches: Iterable[Batch], likelihood: Likelihood, has_ranks: bool
) -> tuple[Any, int, int]:
    """First inputs, if any, number and checksum (for ranks) of data; targets are all checked."""
    first, template, n_data, content = None, None, 0, 0
    for batch in batches:
        if first is None or template is None:
            first, template = batch, _outputs(model, batch)
            _warn_of_probabilities(likelihood, template)
        likely = template[:1].expand(len(batch), *template.shape[1:])
        try:
            likelihood.check_targets(likely, batch.targets)
        except DataError as error:
            hint = _target_hint(likelihood, batch.targets)
            raise DataError(f"batch {batch.index}: {error}{hint}") from error
        n_data += len(batch)
        if has_ranks:
            content = (content + checksum(sample_keys((batch.inputs, batch.targets)))) % 2**63
    return None if first is None else first.inputs, n_data, content


def _warn_of_probabilities(likelihood: Likelihood, outputs: Tensor) -> None:
    """A softmax of a softmax can be trained, badly, and nothing else shows it."""
    if not isinstance(likelihood, Categorical) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return
    rows = outputs.double()
    if len(rows) > 1 and bool((rows >= 0).all() and ((rows.sum(1) - 1.0).abs() < 1e-3).all()):
        warnings.warn(
            "the model returns probabilities, which classification takes for logits; leave its "
            "last softmax out",
            ModelWarning,
            stacklevel=5,
        )


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    try:
        with eval_mode(model), torch.no_grad():
            outputs = forward(model, batch.inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_of(batch.inputs))
        raise DataError(
            f"the model cannot process batch {batch.index} with inputs {seen}: {error}"
            f"{_dtype_hint(model, batch)}"
        ) from error
    require_outputs(outputs, len(batch))
    return outputs
