"""Shares of a data set for the ranks: contiguous, each datum in exactly one of them, none padded.

torch's DistributedSampler repeats data until all ranks have equally many, which suits averages of
gradients and spoils sums: the repeated data would count twice in curvature, fit and number of data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset, Subset

from margeq.comm import Comm, current_comm
from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["Divisible", "n_data_of", "part_of", "shard", "share_bounds"]


@runtime_checkable
class Divisible(Protocol):
    """A loader that knows its parts, such as :class:`margeq.data.TensorLoader`."""

    dataset: Any
    """Something with a length."""

    def part(self, first: int, last: int, batch_size: int | None = None) -> Iterable[Any]:
        """A loader of the data from ``first`` to before ``last``."""
        ...


def share_bounds(n_data: int, rank: int, size: int, multiple: int = 1) -> tuple[int, int]:
    """First and last (excluded) datum of a rank's share.

    Args:
        n_data: number of data.
        rank: whose share.
        size: number of ranks.
        multiple: shares begin at multiples of it.

    Returns:
        Bounds; shares differ by at most ``multiple`` data.

    Example:
        >>> [share_bounds(10, rank, 3) for rank in range(3)]
        [(0, 3), (3, 6), (6, 10)]
        >>> [share_bounds(10, rank, 3, multiple=4) for rank in range(3)]
        [(0, 4), (4, 8), (8, 10)]
    """
    blocks = -(-n_data // multiple)
    first, last = (min(n_data, multiple * (blocks * r // size)) for r in (rank, rank + 1))
    return first, last


def shard(
    data: Dataset[Any] | Divisible,
    batch_size: int | None = None,
    *,
    comm: Comm | None = None,
    **loader_options: Any,
) -> Iterable[Any]:
    """This rank's share of the data as a loader, in order; it may be empty.

    Args:
        data: a data set with length and indices, or a :class:`margeq.data.TensorLoader` that
            neither shuffles nor augments.
        batch_size: data per batch; default: that of the ``TensorLoader``, or 256.
        comm: the ranks; default: all of torch.distributed, if it is initialised.
        loader_options: for :class:`torch.utils.data.DataLoader`, such as ``num_workers``.

    Returns:
        A re-iterable loader.

    Raises:
        ConfigError: for data without length or indices, a loader of another kind, one that
            shuffles or augments, or options that change which data come.
    """
    comm = current_comm() if comm is None else comm
    if batch_size is not None and not is_count(batch_size):
        raise ConfigError(f"batch_size={batch_size!r}, but a batch holds at least one datum")
    refused = sorted({"sampler", "batch_sampler", "shuffle", "drop_last"} & set(loader_options))
    if refused:
        raise ConfigError(f"{refused} would change which data a share holds; leave them out")
    if not isinstance(data, Divisible) and not all(
        hasattr(data, name) for name in ("__len__", "__getitem__")
    ):
        raise ConfigError(
            f"a {type(data).__name__} has no length or no indices; pass a map-style data set (of a "
            f"DataLoader: loader.dataset), or let each rank read files of its own"
        )
    bounds = share_bounds(n_data_of(data), comm.rank, comm.size)
    return part_of(data, *bounds, batch_size, **loader_options)


def n_data_of(data: Any) -> int:
    """Number of data of a data set or a divisible loader."""
    return len(data.dataset if isinstance(data, Divisible) else data)


def part_of(
    data: Any, first: int, last: int, batch_size: int | None, **loader_options: Any
) -> Iterable[Any]:
    """A loader of the data from ``first`` to before ``last``, in order."""
    if isinstance(data, Divisible):
        return data.part(first, last, batch_size)
    part = Subset(data, range(first, last))
    return DataLoader(part, batch_size=batch_size or 256, **loader_options)
