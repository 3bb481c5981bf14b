"""Changed copies of a batch whose outputs are averaged: one call of each weight, not several.

    f(x) = sum_s p_s f_theta(T_s x),   J_theta[n] = sum_s p_s a[n,s] (x) g[n,s]
                                                 ~ (sum_s p_s a[n,s]) (x) (sum_s p_s g[n,s])

The copies of a call add up inside the Jacobian, whatever is done with shared positions. Taken for
positions, ``S`` equal copies would lose all but one ``S``-th of the curvature.
(Immer et al. 2022, Invariance learning in deep neural networks with differentiable Laplace
approximations, section 3.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import Tensor

from margeq.curvature.io import InputRows

__all__ = ["Calls", "mixed_rows", "one_copy"]


@dataclass(frozen=True, eq=False)
class _Copy:
    """One copy of a batch on its way through a model.

    Attributes:
        average: what all copies of one average have in common, an object of its own.
        share: ``p_s``, the weight of its output in the average; the shares of an average sum to 1.
    """

    average: object
    share: float | Tensor


_IN_PROGRESS: ContextVar[_Copy | None] = ContextVar("margeq_copy", default=None)


@contextmanager
def one_copy(average: object, share: float | Tensor) -> Iterator[None]:
    """What the model is called with meanwhile is one copy of a batch.

    The copies have to call the same modules in the same order. An average inside another one
    counts for itself.

    Args:
        average: the same object for all copies of the average, and for nothing else.
        share: weight of this copy's output.

    Example:
        >>> calls = Calls()
        >>> with one_copy("both halves", 0.5):
        ...     calls.next("layer")
        (('both halves', 'layer', 1), 0.5)
    """
    token = _IN_PROGRESS.set(_Copy(average, share))
    try:
        yield
    finally:
        _IN_PROGRESS.reset(token)


class Calls:
    """Names the calls of all modules in one forward, with one name for the copies of a call."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[_Copy, str]] = Counter()

    def next(self, prefix: str) -> tuple[Hashable, float | Tensor | None]:
        """Name of the module's next call, and the share of the copy that it is for, if any."""
        copy = _IN_PROGRESS.get()
        if copy is None:
            return object(), None
        self._seen[copy, prefix] += 1
        return (copy.average, prefix, self._seen[copy, prefix]), copy.share


def mixed_rows(total: InputRows | None, rows: InputRows, share: float | Tensor) -> InputRows:
    """``sum_s p_s a[n,s]``, continued by one copy; the ones that a bias sees stay ones."""
    if rows.is_bias:
        return rows
    weighted = rows.rows * share
    return replace(rows, rows=weighted if total is None else total.rows + weighted)
