"""What counts as a number of things."""

from __future__ import annotations

from numbers import Integral

__all__ = ["is_count"]


def is_count(value: object, least: int = 1) -> bool:
    """Whether an argument is a whole number of at least ``least``.

    Truth values and text are none, although Python computes with the former; numpy's integers are.

    Args:
        value: anything.
        least: smallest allowed number.

    Returns:
        Whether it is.

    Example:
        >>> [is_count(value) for value in (3, 0, 2.5, "3", True)]
        [True, False, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
