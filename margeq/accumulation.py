"""One pass over the data: un-normalised curvature sums, fit term and counts.

Everything in a :class:`CurvatureState` is a plain sum over data, so batch splits, parallel ranks
and resumed passes add up exactly; eigenvalues and logarithms come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from margeq import layers as _layers  # noqa: F401  registers the rules of all layers
from margeq.batches import Batch, map_tensors, read_batches, refuse_padding
from margeq.comm import ALONE, Comm, together
from margeq.curvature.capture import backpropagate, eval_mode, run_recorded
from margeq.curvature.eigen import EigenBases, EigenSums, eigen_bases
from margeq.curvature.factors import FactorSums, InputCovCache
from margeq.curvature.final_layer import chosen_parameters
from margeq.curvature.forms import CurvatureSums
from margeq.curvature.full import FullSums
from margeq.curvature.options import KfacOptions
from margeq.curvature.outputs import OutputSums
from margeq.curvature.sampling import sample_keys
from margeq.curvature.selection import weights_with_rules
from margeq.data_pass import DataPass
from margeq.errors import ConfigError
from margeq.halving import Halving
from margeq.integrations.asdl_factors import asdl_factors
from margeq.integrations.backpack_factors import backpack_factors
from margeq.integrations.borrowed import BorrowedSums
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.output_scales import of_scaled_outputs
from margeq.parameters import unwrapped
from margeq.reduction import reduce_state
from margeq.state import CurvatureState

__all__ = [
    "CurvatureState",
    "InputCovCache",
    "accumulate",
    "accumulate_with",
    "empty_state",
    "require_room",
    "weights_with_rules",
]

_LIBRARIES = {"backpack": backpack_factors, "asdl": asdl_factors}


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
    backend: str = "margeq",
) -> CurvatureState:
    """Accumulate the GGN of a model over a loader, at its current weights, in this process.

    :func:`margeq.distributed.accumulate` does so over several processes.
    ``curvature="ekfac"`` reads the loader twice: Kronecker factors first, then exact second
    moments in their eigenvectors, unless ``bases`` are given.

    Args:
        model: left as it is, flags of all sub-modules included.
        loader: re-iterable batches ``(inputs, targets)``.
        likelihood: ``"classification"``, ``"regression"``, ``"regression-per-output"`` or an
            object.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diag"`` or ``"full"``; see
            :class:`margeq.curvature.options.KfacOptions`, as for the next six.
        hessian_root: ``"exact"``, ``"adaptive"`` or ``"mc"``.
        mc_samples: columns of the Monte-Carlo root.
        captured_trace: share of the trace that the adaptive root keeps.
        kfac_approx: ``"expand"`` or ``"reduce"``, or a mapping by name.
        bias_approx: ``"exact"`` or ``"expand"``.
        position_fraction: share of shared positions used for input covariances.
        parameters: as in :func:`margeq.named_weights`, or ``"last_layer"``.
        batch_fn: turns a batch into ``(inputs, targets)``.
        seed: of the random draws, which are seeded by sample content besides.
        bases: orthogonal bases for ``"ekfac"``, from :func:`margeq.laplace.eigen_bases`; stale
            ones, or those of a cheaper root, give a valid bound too, if a looser one.
        backend: ``"margeq"``, ``"backpack"`` or ``"asdl"``.

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
        curvature, backend,
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
    halving: Halving | None = None,
) -> CurvatureState:
    """As :func:`accumulate`, with ready-made options and an optional input-factor cache.

    Without ``check`` the rules are trusted: training compares them with autograd once, beforehand.
    With ``comm`` each rank brings its own share of the data, and all get the sums over all data.
    ``halving`` remembers from pass to pass which batches fit into memory.

    Returns:
        Un-normalised sums over the data.

    Raises:
        ConfigError: for bases without ``curvature="ekfac"``; else as :func:`accumulate`.
        CurvatureError: if a quarter of a batch does not fit into memory; else as
            :func:`accumulate`.
        DataError: if all ranks together have no data; else as :func:`accumulate`.
    """
    halving = Halving() if halving is None else halving
    model = unwrapped(model)
    parameters = chosen_parameters(model, parameters, loader, batch_fn, comm)
    if options.curvature == "ekfac" and bases is None:
        factors = accumulate_with(
            model, loader, likelihood, replace(options, curvature="kfac"), parameters=parameters,
            batch_fn=batch_fn, cache=cache, check=check, comm=comm, halving=halving,
        )  # fmt: skip
        factors, _ = of_scaled_outputs(factors, likelihood)
        bases, cache = eigen_bases(factors.kron, comm), None
    if comm.size > 1:
        cache = None  # with one a rank may have to start again on its own
    with together(comm):
        own = _own_sums(
            model, loader, likelihood, options, parameters, batch_fn, cache, bases, check, comm,
            halving,
        )  # fmt: skip
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
    halving: Halving,
) -> CurvatureState:
    """The sums over the data of this rank."""
    refuse_padding(loader)
    weights = weights_with_rules(model, parameters, options)
    if bases is not None and options.curvature != "ekfac":
        raise ConfigError(f"bases belong to curvature='ekfac', not to {options.curvature!r}")
    device = next(model.parameters()).device

    # all columns of a Gaussian root are of one size, so that adaptive keeps every one
    adaptive = options.hessian_root == "adaptive" and not likelihood.weighs_outputs

    def batches() -> Iterable[Batch]:
        least = 1 if comm.size == 1 else 0
        return halving.split(read_batches(loader, device, batch_fn, least=least))

    def begun() -> DataPass:
        sums = _sums(weights, likelihood, options, cache, bases)
        if options.backend != "margeq":
            sums = BorrowedSums(model, weights, likelihood, options, _LIBRARIES[options.backend])
        run = DataPass(model, weights, likelihood, options, sums, check=check)
        if isinstance(sums, BorrowedSums):
            run.add_borrowed(batches(), sums)
        elif isinstance(sums, OutputSums):
            run.add_each_output(batches(), sums)
        elif adaptive:
            run.survey(batches())
        else:
            run.add_all_columns(batches())
        return run

    with eval_mode(model), torch.enable_grad():
        run = halving.attempt(begun)
        if adaptive:
            # each half is attempted on its own: other ranks wait for this one in between
            run.close_survey(comm)
            halving.attempt(lambda: run.add_largest_columns(batches))
    if cache is not None and cache.checksum not in (None, run.checksum):
        cache.checksum, cache.factors = None, {}
        return accumulate_with(
            model, loader, likelihood, options, parameters=parameters, batch_fn=batch_fn,
            halving=halving,
        )  # fmt: skip
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
    sums = _sums(weights, likelihood, options, None, bases)
    run = DataPass(unwrapped(model), weights, likelihood, options, sums, check=False)
    return run.state(options.flavour(type(likelihood).__name__, parameters, likelihood.temperature))


def require_room(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    inputs: Any,
    likelihood: Likelihood,
    options: KfacOptions,
) -> None:
    """Refuse curvature per output that would not fit into memory, by one datum of a batch.

    Raises:
        ConfigError: with the number of outputs, and the ways out; or for a library that has no
            curvature per output.
    """
    sums = _sums(weights, likelihood, options, None, None)
    if not isinstance(sums, OutputSums):
        return
    one = map_tensors(lambda tensor: tensor[:1], inputs)
    with eval_mode(model), torch.enable_grad():
        outputs, uses = run_recorded(model, weights, one)
        sums.add_inputs(uses, one, sample_keys(one))
        sums.at_output(0, outputs.numel())
        column = torch.zeros_like(outputs.detach()).flatten(1)
        column[:, 0] = 1.0
        sums.add_gradients(uses, backpropagate(outputs, uses, column.reshape(outputs.shape)))


def _sums(
    weights: Mapping[str, nn.Parameter],
    likelihood: Likelihood,
    options: KfacOptions,
    cache: InputCovCache | None,
    bases: EigenBases | None,
) -> CurvatureSums:
    if options.curvature == "full":
        sums = FullSums(weights)
    elif options.curvature in ("ekfac", "diag"):
        sums = EigenSums(weights, bases or {})
    else:
        sums = FactorSums(weights, options, cache)
    if not likelihood.weighs_outputs:
        return sums
    if options.backend != "margeq":
        raise ConfigError(
            f"backend={options.backend!r} sums the curvature of all outputs, which a noise per "
            f"output weighs anew in every step; use backend='margeq'"
        )
    return OutputSums(sums)
