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

_MOST_HALVINGS = 2
_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")
"""What allocators and libraries of CPUs and GPUs say, in small letters."""


class Halving:
    """Cuts batches to a size that fits into memory, and remembers which one that was."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._largest, self._halvings = 0, 0

    def split(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same data in batches of the present size at most."""
        for batch in batches:
            self._largest = max(self._largest, len(batch))
            if self._limit is None or len(batch) <= self._limit:
                yield batch
                continue
            for start in range(0, len(batch), self._limit):
                yield _rows(batch, slice(start, start + self._limit))

    def attempt(self, run: Callable[[], _Result]) -> _Result:
        """Run a pass, again from its beginning with smaller batches if memory runs out.

        Args:
            run: reads its batches through :meth:`split`, and starts from zero at every call.

        Returns:
            What it returns.

        Raises:
            CurvatureError: if a quarter of the batches does not fit either, or single data.
        """
        before = self._halvings
        while True:
            try:
                result = run()
            except (RuntimeError, MemoryError) as error:
                self._halve_after(error)
            else:
                break
            # only here, with the frames of the failed pass, its tensors are gone
        if self._halvings > before:
            warnings.warn(
                f"a batch of {self._largest} data did not fit into memory; the pass was made in "
                f"batches of at most {self._limit} instead, with the same sums. Give "
                f"marglik_loader batches of that size to save the attempts",
                NumericalWarning,
                stacklevel=2,
            )
        return result

    def _halve_after(self, error: BaseException) -> None:
        if not is_out_of_memory(error):
            raise error
        tried = self._largest if self._limit is None else self._limit
        if self._halvings == _MOST_HALVINGS or tried <= 1:
            raise CurvatureError(
                f"a pass over the data ran out of memory with batches of {self._largest} data, "
                f"halved {self._halvings} times to {tried} ({str(error)[:200]}); give "
                f"marglik_loader a batch_size below {max(tried, 2)}, or use hessian_root='mc'"
            ) from error
        self._limit = -(-tried // 2)
        self._halvings += 1


def is_out_of_memory(error: BaseException) -> bool:
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
