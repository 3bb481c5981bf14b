"""Which columns the adaptive root keeps, and batches of data that need equally many of them.

A backward pass costs one unit per datum, however few of the data need the column, so data are
regrouped by the number of columns that they keep. That number has to be known before the forward
pass: a first pass over the data remembers it by sample content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from margeq.batches import concatenate, map_tensors, signature
from margeq.comm import ALONE, Comm, agree
from margeq.curvature.roots import Root, TraceHistogram

__all__ = ["ColumnPlan", "kept_columns", "like_groups", "regrouped"]

_POOL_BATCHES = 8
_REMEMBERED_NORMS = 2**23


def kept_columns(root: Root, threshold: float) -> tuple[Tensor, Tensor]:
    """Columns of each datum by falling norm ``[n, v]``, and how many pass the threshold ``[n]``."""
    norms = root.square_norms()
    return norms.argsort(dim=1, descending=True, stable=True), (norms > threshold).sum(1)


class ColumnPlan:
    """Norms of all columns of the data set: the threshold, and how many columns a datum keeps.

    Args:
        share: of the trace of the output Hessian, over the whole data set, that is kept.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._histogram = TraceHistogram()
        self._keys: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._remembered = 0
        self._sorted_keys: Tensor | None = None

    def add(self, keys: Tensor, square_norms: Tensor) -> None:
        """Add the columns ``[n, v]`` of one batch."""
        self._histogram.add(square_norms)
        # with very many columns the second pass finds the counts again by a forward pass
        self._remembered += square_norms.numel()
        if self._remembered <= _REMEMBERED_NORMS:
            self._keys.append(keys)
            self._norms.append(square_norms)

    def close(self, comm: Comm = ALONE) -> None:
        """Set the threshold, the same one on all ranks, once all data are added."""
        if comm.size > 1:
            agree(comm)  # a rank that has failed by now does not come here
        self.threshold, _ = self._histogram.reduced(comm).threshold(self._share)
        self.captured = self._histogram.share_above(self.threshold)
        self.trace = self._histogram.total
        if not self._keys:
            self._sorted_keys = None
            return
        counts = torch.cat([(norms > self.threshold).sum(1) for norms in self._norms])
        self._sorted_keys, order = torch.cat(self._keys).sort()
        self._sorted_counts = counts[order]
        self._keys, self._norms = [], []

    def counts(self, keys: Tensor) -> Tensor:
        """Number of columns that each datum keeps, ``[n]``; -1 for content that was not added."""
        if self._sorted_keys is None:
            return torch.full_like(keys, -1)
        places = torch.searchsorted(self._sorted_keys, keys).clamp_max(len(self._sorted_keys) - 1)
        known = self._sorted_keys[places] == keys
        return torch.where(known, self._sorted_counts[places], -1)


def regrouped(batches: Iterable[tuple[Any, Tensor]]) -> Iterator[Any]:
    """Inputs of data that keep equally many columns, regrouped from some batches at a time.

    Args:
        batches: inputs of each batch and the number of columns that each datum keeps.

    Yields:
        Inputs of up to as many data as a batch had; data that keep no column are left out.
    """
    held: list[tuple[Any, Tensor]] = []
    largest = 1
    for inputs, counts in batches:
        if held and signature(inputs) != signature(held[0][0]):
            yield from _groups(held, largest)
            held = []
        largest = max(largest, len(counts))
        needed = (counts > 0).nonzero()[:, 0]
        held.append((_rows(inputs, needed), counts[needed]))
        if sum(len(counts) for _, counts in held) > (_POOL_BATCHES - 1) * largest:
            yield from _groups(held, largest)
            held = []
    yield from _groups(held, largest)


def _groups(held: Sequence[tuple[Any, Tensor]], largest: int) -> Iterator[Any]:
    if held:
        inputs = concatenate([inputs for inputs, _ in held])
        for group in like_groups(torch.cat([counts for _, counts in held]), largest):
            yield _rows(inputs, group)


def _rows(inputs: Any, which: Tensor) -> Any:
    return map_tensors(lambda tensor: tensor[which], inputs)


def like_groups(counts: Tensor, largest: int) -> list[Tensor]:
    """Indices in groups of up to ``largest`` data with like counts, none of them of a tiny size."""
    order = counts.argsort(descending=True, stable=True)
    falling = counts[order].tolist()
    groups, start = [], 0
    for end in range(1, len(falling) + 1):
        length = end - start
        last = end == len(falling)
        if last or length == largest or (falling[end] < falling[end - 1] and 8 * length >= largest):
            groups.append(order[start:end])
            start = end
    return groups
