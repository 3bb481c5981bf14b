"""Smaller batches for a pass over the data that has run out of memory.

Sums over data do not depend on how the data are cut, so a pass can be repeated in halves and in
quarters of its batches. It begins anew, which costs no memory while all goes well: nothing that a
failed batch has left behind is kept, and no datum counts twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from margeq.batches import Batch, map_tensors
from margeq.errors import CurvatureError, MargeqError, NumericalWarning

__all__ = ["Halving"]

_Result = TypeVar("_Result")

_MOST_PARTS = 4
_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")
"""What allocators and libraries of CPUs and GPUs say, in small letters."""


class Halving:
    """Cuts batches in as many parts as fit into memory, and remembers how many that were."""

    def __init__(self) -> None:
        self._parts, self._largest = 1, 0

    def split(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same data, each batch in the present number of parts."""
        for batch in batches:
            self._largest = max(self._largest, len(batch))
            size = self._size_of(len(batch))
            if size == len(batch):
                yield batch
                continue
            for start in range(0, len(batch), size):
                yield _rows(batch, slice(start, start + size))

    def attempt(self, run: Callable[[], _Result]) -> _Result:
        """Run a pass, again from its beginning with smaller batches if memory runs out.

        Args:
            run: reads its batches through :meth:`split`, and starts from zero at every call.

        Returns:
            What it returns.

        Raises:
            CurvatureError: if a quarter of the batches does not fit either, or single data.
        """
        before = self._parts
        while True:
            try:
                result = run()
            except (RuntimeError, MemoryError) as error:
                self._halve_after(error)
            else:
                break
            # only here, with the frames of the failed pass, its tensors are gone
        if self._parts > before:
            warnings.warn(
                f"a batch of {self._largest} data did not fit into memory; the pass was made in "
                f"batches of at most {self._size_of(self._largest)} instead, with the same sums. "
                f"Give marglik_loader batches of that size to save the attempts",
                NumericalWarning,
                stacklevel=2,
            )
        return result

    def _size_of(self, n_data: int) -> int:
        return -(-n_data // self._parts)

    def _halve_after(self, error: BaseException) -> None:
        if not _is_out_of_memory(error):
            raise error
        tried = self._size_of(self._largest)
        if self._parts >= _MOST_PARTS or tried <= 1:
            raise CurvatureError(
                f"a pass over the data ran out of memory with batches of {self._largest} data, and "
                f"again with batches of {tried} ({str(error)[:200]}); give marglik_loader a "
                f"batch_size below {max(tried, 2)}, or use hessian_root='mc'"
            ) from error
        self._parts *= 2


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, MargeqError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


def _rows(batch: Batch, which: slice) -> Batch:
    def cut(tensor: Tensor) -> Any:
        return tensor[which]

    return Batch(batch.index, map_tensors(cut, batch.inputs), cut(batch.targets))
