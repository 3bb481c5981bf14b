"""A pass whose sums do not depend on the number of ranks, to the last bit.

The data are cut into chunks of a fixed size, and the sums of the chunks are added along one binary
tree, whoever computes them:

    node(k, j) = node(k - 1, 2 j) + node(k - 1, 2 j + 1),   node(0, j) = chunk j

Each rank has the largest nodes that its own contiguous chunks make up; the others get them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from margeq.accumulation import CurvatureState, accumulate_with, empty_state
from margeq.comm import Comm, current_comm, require_equal, together
from margeq.counts import is_count
from margeq.curvature.eigen import EigenBases, eigen_bases
from margeq.curvature.options import KfacOptions
from margeq.distributed.accumulation import what_ranks_share
from margeq.distributed.shards import Divisible, n_data_of, part_of, share_bounds
from margeq.errors import ConfigError, DataError
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.parameters import unwrapped
from margeq.reduction import reduce_state

__all__ = ["accumulate_in_order"]


def accumulate_in_order(
    model: nn.Module,
    data: Dataset[Any] | Divisible,
    likelihood: str | Likelihood = "classification",
    options: KfacOptions | str = "kfac",
    *,
    chunk: int = 32,
    parameters: str | Sequence[str] = "all",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    bases: EigenBases | None = None,
    comm: Comm | None = None,
) -> CurvatureState:
    """As :func:`margeq.distributed.accumulate`, with sums that are equal for any number of ranks.

    Slower: batches are as small as chunks, and ranks send several partial sums each. Equal numbers
    also need equal processors, thread counts and versions of PyTorch.

    Args:
        model: the same on all ranks.
        data: all data, the same on all ranks: a data set with length and indices, or a
            :class:`margeq.data.TensorLoader`.
        likelihood: ``"classification"``, ``"regression"`` or an object.
        options: a curvature, or all options of the pass, with ``hessian_root`` ``"exact"`` or
            ``"mc"``.
        chunk: data per chunk; another number gives other rounding.
        parameters: as in :func:`margeq.named_weights`.
        batch_fn: turns a batch into ``(inputs, targets)``.
        bases: for ``"ekfac"``, the same on all ranks.
        comm: the ranks; default: all of torch.distributed, if it is initialised.

    Returns:
        Un-normalised sums over all data, the same on all ranks.

    Raises:
        ConfigError: for the adaptive root, or a chunk that is no positive whole number.
        DataError: for no data.
        DistributedError: if another rank has failed or cannot be reached.
    """
    comm = current_comm() if comm is None else comm
    likelihood = as_likelihood(likelihood)
    options = KfacOptions(curvature=options) if isinstance(options, str) else options
    if options.hessian_root == "adaptive":
        raise ConfigError(
            "hessian_root='adaptive' sets its threshold by sums whose rounding depends on the "
            "ranks; use 'exact' or 'mc' here, or margeq.distributed.accumulate"
        )
    if not is_count(chunk):
        raise ConfigError(f"chunk={chunk!r}, but a chunk holds at least one datum")
    model = unwrapped(model)
    require_equal(comm, what_ranks_share(model, likelihood, options, parameters, bases))

    def run(options: KfacOptions, bases: EigenBases | None) -> CurvatureState:
        how = {"parameters": parameters, "bases": bases}

        def state_of(number: int, batch: Any) -> CurvatureState:
            return accumulate_with(
                model, [batch], likelihood, options, batch_fn=batch_fn, check=number == 0, **how
            )

        with together(comm):
            nothing = empty_state(model, likelihood, options, **how)
        return _tree_sum(data, chunk, state_of, nothing, comm)

    if options.curvature == "ekfac" and bases is None:
        bases = eigen_bases(run(replace(options, curvature="kfac"), None).kron, comm)
    return run(options, bases)


def _tree_sum(
    data: Any,
    chunk: int,
    state_of: Callable[[int, Any], CurvatureState],
    nothing: CurvatureState,
    comm: Comm,
) -> CurvatureState:
    n_data = n_data_of(data)
    if not n_data:
        raise DataError("the data set is empty")
    shares = [share_bounds(n_data, rank, comm.size, chunk) for rank in range(comm.size)]
    first, last = shares[comm.rank]
    own = _Nodes(first // chunk)
    with together(comm):
        for number, batch in enumerate(part_of(data, first, last, chunk)):
            own.push(state_of(number, batch), 0)
        _require_levels(own, _levels(first // chunk, -(-last // chunk)))
    everyone = _Nodes(0)
    mine = iter(own.states)
    for rank, (first, last) in enumerate(shares):
        for level in _levels(first // chunk, -(-last // chunk)):
            # the sum of one node and of nothing is that node, to the last bit
            node = reduce_state(next(mine) if rank == comm.rank else nothing, comm)
            everyone.push(node, level)
    return everyone.joined()


class _Nodes:
    """Sums of neighbouring nodes of the tree, as few as possible, from left to right.

    Args:
        start: number of the leaf at which the first one begins.
    """

    def __init__(self, start: int) -> None:
        self._end = start
        self._starts: list[int] = []
        self.levels: list[int] = []
        self.states: list[CurvatureState] = []

    def push(self, state: CurvatureState, level: int) -> None:
        """Add the next node; two halves of a larger node become that node."""
        start, self._end = self._end, self._end + 2**level
        while self.levels and self.levels[-1] == level and self._starts[-1] % 2 ** (level + 1) == 0:
            state = self.states.pop() + state
            start, level = self._starts.pop(), self.levels.pop() + 1
        self._starts.append(start)
        self.levels.append(level)
        self.states.append(state)

    def joined(self) -> CurvatureState:
        """The sum of all nodes, from the smallest to the largest."""
        *larger, total = self.states
        for state in reversed(larger):
            total = state + total
        return total


def _levels(first: int, last: int) -> list[int]:
    """Levels of the largest nodes that make up the leaves from ``first`` to before ``last``."""
    levels = []
    while first < last:
        level = 0
        while first % 2 ** (level + 1) == 0 and first + 2 ** (level + 1) <= last:
            level += 1
        levels.append(level)
        first += 2**level
    return levels


def _require_levels(nodes: _Nodes, expected: Sequence[int]) -> None:
    """Check that the data set has as many data as its length says."""
    if nodes.levels != list(expected):
        raise DataError(
            "the data set yields another number of data than its length says; the ranks then "
            "disagree about who has which"
        )
