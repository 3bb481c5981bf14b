"""Checkpoints of several ranks: rank 0 reads and writes them, the others need not see its disk.

What all ranks have in common is that of rank 0. Besides it a checkpoint holds, under ``"ranks"``,
the random numbers to come on each further rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol
from zlib import crc32

from margeq.checkpoint import Checkpoint, CheckpointWriter
from margeq.comm import Comm, together
from margeq.distributed.states import gather_states, share_state
from margeq.training.randomness import Randomness

__all__ = ["SharedWriter", "Writer", "n_ranks_of", "on_this_rank", "share_checkpoint"]


class Writer(Protocol):
    """What writes checkpoints now and then, see :class:`margeq.checkpoint.CheckpointWriter`."""

    def is_due(self) -> bool:
        """Whether another checkpoint stays within the share of time."""
        ...

    def is_overdue(self) -> bool:
        """Whether, besides, the last one is longer ago than the longest gap."""
        ...

    def write(
        self, step: int, capture: Callable[[], Mapping[str, Any]], score: float | None = None
    ) -> bool:
        """Capture the state and write it, if that is possible."""
        ...


class SharedWriter:
    """Writes on rank 0 what it captures there, and the random numbers of all ranks.

    Args:
        writer: on rank 0.
        comm: the ranks.
    """

    def __init__(self, writer: CheckpointWriter | None, comm: Comm) -> None:
        self._writer, self._comm = writer, comm

    def is_overdue(self) -> bool:
        """What this rank knows: never, but on rank 0."""
        return self._writer is not None and self._writer.is_overdue()

    def is_due(self) -> bool:
        """What rank 0 says."""
        return self._comm.any(self._writer is not None and self._writer.is_due())

    def write(
        self, step: int, capture: Callable[[], Mapping[str, Any]], score: float | None = None
    ) -> bool:
        """Write on rank 0; its failure is an error on all ranks."""
        with together(self._comm):
            own = _own_part(capture())
        others, written = gather_states(self._comm, own)[1:], False
        with together(self._comm):
            if self._writer is not None:
                written = self._writer.write(step, lambda: {**capture(), "ranks": others}, score)
        return self._comm.any(written)


def _own_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between ranks: random numbers and place now, and where their loaders begin."""
    return {
        "random": state["random"],
        "position": state["position"],
        "generators": state["origin"]["generators"],
    }


def share_checkpoint(comm: Comm, found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that rank 0 has read, on all ranks."""
    shared = share_state(comm, None if found is None else _plain(found))
    return found if comm.rank == 0 or shared is None else Checkpoint(**shared)


def _plain(found: Checkpoint) -> dict[str, Any]:
    fields = ("step", "state", "environment")
    return {name: getattr(found, name) for name in fields}


def n_ranks_of(found: Checkpoint) -> int:
    """How many ranks a checkpoint is of."""
    return 1 + len(found.state.get("ranks", ()))


def on_this_rank(found: Checkpoint, comm: Comm, randomness: Randomness) -> Checkpoint:
    """The checkpoint with the random numbers of this rank.

    Those of another number of ranks cannot be gone on with: this rank gets new ones, the orders
    that all ranks share go on, and an epoch in progress begins again, with the weights of then.

    Returns:
        One for this rank.
    """
    origin, common = found.state["origin"], found.state["random"]
    if n_ranks_of(found) == comm.size:
        if comm.rank == 0:
            return found
        own = found.state["ranks"][comm.rank - 1]
        random, generators, position = own["random"], own["generators"], own["position"]
    else:
        place = f"{found.state['place']['seed']}:{found.step}:rank {comm.rank} of {comm.size}"
        random = randomness.on_other_ranks(common, crc32(place.encode()))
        generators, position = randomness.shared_orders(origin["generators"]), None
    state = {
        **found.state, "random": random, "position": position,
        "origin": {**origin, "generators": generators},
    }  # fmt: skip
    return replace(found, state=state)
