"""One pass over the data of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from margeq.accumulation import CurvatureState, accumulate_with
from margeq.comm import Comm, current_comm, require_equal
from margeq.curvature.eigen import EigenBases
from margeq.curvature.options import KfacOptions
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.parameters import unwrapped

__all__ = ["accumulate", "what_ranks_share"]


def accumulate(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    options: KfacOptions | str = "kfac",
    *,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    bases: EigenBases | None = None,
    comm: Comm | None = None,
) -> CurvatureState:
    """As :func:`margeq.laplace.accumulate`, over the shares of all ranks; all have to call it.

    The sums are those of one process that has all data, up to rounding: the adaptive root finds
    one threshold for all ranks, and ``"ekfac"`` one basis. An error on one rank is raised on all.

    Args:
        model: the same on all ranks, also wrapped by DistributedDataParallel, whose collectives
            are not used: shares may differ in size and be empty.
        loader: this rank's share of the data, each datum in one share, see
            :func:`margeq.distributed.shard`.
        likelihood: ``"classification"``, ``"regression"`` or an object.
        options: a curvature, or all options of the pass.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        bases: for ``"ekfac"``, the same on all ranks.
        comm: the ranks; default: all of torch.distributed, if it is initialised.

    Returns:
        Un-normalised sums over the data of all ranks, the same on each of them.

    Raises:
        ConfigError: for a sampler that repeats or leaves out data, and unknown options.
        DataError: for batches that cannot be used, or no data on any rank.
        DistributedError: if another rank has failed or cannot be reached.
        DistributedMismatchError: if the ranks' models or options differ.
        MargeqError: as :func:`margeq.laplace.accumulate`, from any of the ranks.
    """
    comm = current_comm() if comm is None else comm
    likelihood = as_likelihood(likelihood)
    if isinstance(options, str):
        options = KfacOptions(curvature=options)
    require_equal(comm, what_ranks_share(model, likelihood, options, parameters, bases))
    return accumulate_with(
        model, loader, likelihood, options, parameters=parameters, batch_fn=batch_fn,
        bases=bases, check=True, comm=comm,
    )  # fmt: skip


def what_ranks_share(
    model: nn.Module,
    likelihood: Likelihood,
    options: KfacOptions,
    parameters: str | Sequence[str],
    bases: EigenBases | None,
) -> dict[str, Any]:
    """All that has to be identical on all ranks before a pass: weights, buffers and options."""
    sides = {name: dict(zip("BA", basis, strict=True)) for name, basis in (bases or {}).items()}
    return {
        **{f"U_{s} of {name}": u for name, pair in sides.items() for s, u in pair.items()},
        **unwrapped(model).state_dict(),
        "likelihood": f"{type(likelihood).__name__} at temperature {likelihood.temperature}",
        "options": options,
        "parameters": parameters,
    }
