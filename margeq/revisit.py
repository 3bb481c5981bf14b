"""How the second phase of an evidence gradient visits the batches: all of them, or a share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from margeq.errors import ConfigError, DataError

__all__ = ["ALL_DATA", "CountedLoader", "Revisit", "n_batches"]


@dataclass(frozen=True)
class Revisit:
    """How the second phase visits the data.

    Attributes:
        sketched: one random column per datum instead of all of them; unbiased.
        share: of the batches that are visited, at least one of them: every ``round(1 / share)``-th,
            times that number. The mean over all offsets is exact, for batches of any size.
        seed: of the signs and of the choice of batches.

    Raises:
        ConfigError: for a share outside (0, 1].
    """

    sketched: bool = False
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"share={self.share} of the batches must lie in (0, 1]")

    def period(self, loader: Iterable[Any]) -> int:
        """One batch out of how many is visited; never more than there are."""
        every = round(1.0 / self.share)
        return max(1, min(every, n_batches(loader))) if every > 1 else 1


ALL_DATA = Revisit()
"""Every column of every datum."""


class CountedLoader:
    """A loader that counts its batches, empty ones too."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader, self._count = loader, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._count += 1
            yield batch

    def require(self, expected: int) -> None:
        """Check the number: a share of the batches is scaled up by it."""
        if self._count != expected:
            raise DataError(
                f"the loader yielded {self._count} batches and its length says {expected}; without "
                f"the true number a share of the batches says nothing: mend its __len__, or visit "
                f"all of them with network_gradient='exact'"
            )


def n_batches(loader: Any) -> int:
    """Its length, or the number of batches of one pass over it."""
    try:
        return len(loader)
    except TypeError:
        return sum(1 for _ in loader)
