"""Shares of a data set for the ranks: contiguous, each datum in exactly one of them, none padded.

torch's DistributedSampler repeats data until all ranks have equally many, which suits averages of
gradients and spoils sums: the repeated data would count twice in curvature, fit and number of data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from margeq.comm import Comm, current_comm
from margeq.counts import is_count
from margeq.errors import ConfigError

__all__ = ["Divisible", "ShareOrder", "n_data_of", "part_of", "shard", "share_bounds"]


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
    shuffle: bool = False,
    seed: int = 0,
    comm: Comm | None = None,
    **loader_options: Any,
) -> Iterable[Any]:
    """This rank's share of the data as a loader; it may be empty.

    In order, it is a contiguous part of the data, the same in every pass. Shuffled, the ranks cut
    up one order of all data, another one in each pass: the batches of all ranks together are those
    of one process with ``size * batch_size`` data per batch, whatever the number of ranks.

    Args:
        data: a data set with length and indices, or a :class:`margeq.data.TensorLoader` that
            neither shuffles nor augments.
        batch_size: data per batch of one rank; default: that of the ``TensorLoader``, or 256.
        shuffle: whether each pass has its own order; for training.
        seed: of the orders, the same on all ranks.
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
    refused = sorted({"sampler", "batch_sampler", "drop_last"} & set(loader_options))
    if refused:
        raise ConfigError(f"{refused} would change which data a share holds; leave them out")
    if not isinstance(data, Divisible) and not all(
        hasattr(data, name) for name in ("__len__", "__getitem__")
    ):
        raise ConfigError(
            f"a {type(data).__name__} has no length or no indices; pass a map-style data set (of a "
            f"DataLoader: loader.dataset), or let each rank read files of its own"
        )
    if shuffle:
        return _shuffled(data, batch_size, seed, comm, loader_options)
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


class ShareOrder:
    """Indices of the data in each batch of one rank, a batch sampler of a ``DataLoader``.

    Each pass takes one number from ``generator``, as on all other ranks, and draws the order of
    all data from it. Batch ``k`` of all ranks together is part ``k`` of that order.

    Args:
        n_data: of all ranks.
        batch_size: data per batch of one rank.
        rank: whose batches.
        size: number of ranks.
        seed: of ``generator``, the same on all ranks.

    Attributes:
        seed: as given.
        generator: decides the passes to come.

    Example:
        >>> [list(ShareOrder(5, 1, rank, 2)) for rank in range(2)]
        [[[1], [4]], [[3], [2], [0]]]
    """

    def __init__(self, n_data: int, batch_size: int, rank: int, size: int, seed: int = 0) -> None:
        self._n_data, self.batch_size, self._rank, self._size = n_data, batch_size, rank, size
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)

    @property
    def together(self) -> int:
        """Data per batch of all ranks together."""
        return self.batch_size * self._size

    def __iter__(self) -> Iterator[list[int]]:
        draws = torch.Generator()
        draws.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
        order = torch.randperm(self._n_data, generator=draws)
        for first, last in self._parts():
            yield order[first:last].tolist()

    def __len__(self) -> int:
        return len(self._parts())

    def state_dict(self) -> dict[str, Any]:
        """Which passes are to come; the same on all ranks, and for any number of them."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these passes."""
        self.generator.set_state(state["generator"])

    def _parts(self) -> list[tuple[int, int]]:
        """Bounds of this rank's batches in the order of all data; the last may differ in size."""
        found = []
        for start in range(0, self._n_data, self.together):
            common = min(self.together, self._n_data - start)
            first, last = share_bounds(common, self._rank, self._size)
            if first < last:
                found.append((start + first, start + last))
        return found


class _TensorShare:
    """Shuffled batches of tensors in memory, without a ``DataLoader``."""

    def __init__(self, dataset: TensorDataset, order: ShareOrder) -> None:
        self.dataset, self.batch_sampler, self.generator = dataset, order, order.generator

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in self.batch_sampler:
            indices = torch.tensor(batch)
            yield tuple(t[indices.to(t.device)] for t in self.dataset.tensors)


def _shuffled(
    data: Any, batch_size: int | None, seed: int, comm: Comm, loader_options: Mapping[str, Any]
) -> Iterable[Any]:
    n_data, default = n_data_of(data), 256
    if isinstance(data, Divisible):
        default = getattr(data, "batch_size", default)
        whole: Any = data.part(0, n_data)  # refuses what shuffles or augments
        data = whole.dataset
    order = ShareOrder(n_data, batch_size or default, comm.rank, comm.size, seed)
    if type(data) is TensorDataset and not loader_options:
        return _TensorShare(data, order)
    return DataLoader(data, batch_sampler=order, **loader_options)
