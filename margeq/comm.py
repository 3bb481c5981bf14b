"""Ranks that work on one evidence together: what they tell each other, and how failures spread.

The library needs six things of a group of processes (:class:`Comm`). torch.distributed gives them
(:class:`TorchComm`), and a process on its own needs none (:class:`NullComm`).

Collective calls have to come in the same order on all ranks. Work between them that can fail goes
into :func:`together`: an error of one rank is then raised on all of them, instead of leaving the
others to wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from margeq import errors
from margeq.errors import DistributedError, DistributedMismatchError

__all__ = [
    "ALONE",
    "Comm",
    "NullComm",
    "TorchComm",
    "agree",
    "current_comm",
    "require_equal",
    "together",
]


class Comm(Protocol):
    """A group of processes, each with a rank."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New tensors, each the sum of those of all ranks; shapes agree on all ranks."""
        ...

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """New tensors with the values of one rank; shapes agree on all ranks."""
        ...

    def gather(self, note: Any) -> list[Any]:
        """What each rank noted, in their order: numbers, texts, and lists and mappings of them."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank; waits for all ranks."""
        ...


class NullComm:
    """A process on its own."""

    rank, size = 0, 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they are."""
        return list(tensors)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """The tensors as they are."""
        return list(tensors)

    def gather(self, note: Any) -> list[Any]:
        """The one note."""
        return [note]

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag


ALONE = NullComm()
"""No other process takes part."""


class TorchComm:
    """The ranks of a process group of torch.distributed, by default of all processes.

    Args:
        group: the process group; its own timeout says how long a rank waits for the others.

    Raises:
        DistributedError: without a process group, or in a process that is no part of it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise DistributedError(
                "no process group is initialised; start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise DistributedError("this process is no part of the process group")
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New tensors, each the sum of those of all ranks; one message for each dtype."""

        def all_reduce(flat: Tensor) -> None:
            dist.all_reduce(flat, group=self._group)

        return self._flattened(tensors, all_reduce)

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """New tensors with the values of one rank; one message for each dtype."""

        def broadcast(flat: Tensor) -> None:
            dist.broadcast(flat, group=self._group, group_src=source)

        return self._flattened(tensors, broadcast)

    def gather(self, note: Any) -> list[Any]:
        """What each rank noted, as JSON: nothing that arrives is ever executed."""
        text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8, device=self._device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        own = torch.tensor([len(text)], dtype=torch.int64, device=self._device)
        self._call(lambda: dist.all_gather(lengths, own, group=self._group))
        padded = text.new_zeros(max(int(length) for length in lengths))
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(texts, padded, group=self._group))
        return [
            json.loads(bytes(text[: int(length)].tolist()))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on some rank; waits for all ranks."""
        flags = torch.tensor([int(flag)], dtype=torch.int64, device=self._device)
        self._call(lambda: dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group))
        return bool(flags)

    def _flattened(self, tensors: Sequence[Tensor], exchange: Any) -> list[Tensor]:
        found = [tensor.detach() for tensor in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in found):
            which = [i for i, tensor in enumerate(found) if tensor.dtype == dtype]
            device = self._device or found[which[0]].device
            flat = torch.cat([found[i].to(device).flatten() for i in which])
            self._call(lambda flat=flat: exchange(flat))
            parts = flat.split([found[i].numel() for i in which])
            for i, part in zip(which, parts, strict=True):
                found[i] = part.view(found[i].shape).to(found[i].device)
        return found

    def _call(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank} of {self.size} lost the others: one of them has ended, or did "
                f"not answer within the time limit of the process group (timeout=... of "
                f"torch.distributed.init_process_group): {error}"
            ) from error


def current_comm() -> Comm:
    """All processes, if torch.distributed is initialised; otherwise this one on its own."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchComm()
    return ALONE


@contextmanager
def together(comm: Comm) -> Iterator[None]:
    """Work of each rank on its own that may fail: one failure is raised on all ranks.

    Raises:
        DistributedError: on ranks that have not failed, for an error of another library on
            another one.
    """
    try:
        yield
    except DistributedError:
        raise  # all ranks have it already, or cannot be reached
    except Exception as error:
        if comm.size == 1 or getattr(error, "_is_known_to_all_ranks", False):
            raise
        agree(comm, error)
    else:
        agree(comm)


def agree(comm: Comm, error: Exception | None = None) -> None:
    """Raise on all ranks if one of them has failed; every rank has to call this.

    Args:
        comm: the ranks.
        error: what failed on this rank.

    Raises:
        Exception: of the type of the lowest rank's error, if it is one of :mod:`margeq.errors`:
            the error of this rank, if it is of that type, or that of the other rank.
    """
    if not comm.any(error is not None):
        return
    notes = comm.gather(None if error is None else [type(error).__name__, str(error)])
    rank, (name, message) = next((rank, note) for rank, note in enumerate(notes) if note)
    # ranks that went on from errors of different types would no longer be in step
    if error is None or type(error).__name__ != name:
        error = _error_of_another(rank, name, message)
    error._is_known_to_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue]
    raise error


def _error_of_another(rank: int, name: str, message: str) -> Exception:
    if name in errors.__all__:
        return getattr(errors, name)(f"rank {rank} failed: {message}")
    return DistributedError(f"rank {rank} failed: {name}: {message}")


def require_equal(comm: Comm, values: Mapping[str, Any]) -> None:
    """Check that all ranks hold the same values, by comparing digests of a few bytes each.

    Args:
        comm: the ranks.
        values: whatever has to be identical, by name: tensors, or anything with a telling repr.

    Raises:
        DistributedMismatchError: naming the first value that differs, and the ranks.
    """
    if comm.size == 1:
        return
    notes = comm.gather({name: _digest(value) for name, value in values.items()})
    for name in sorted(set().union(*notes)):
        found = [note.get(name, "missing") for note in notes]
        if len(set(found)) > 1:
            others = [rank for rank, value in enumerate(found) if value != found[0]]
            shown = comm.gather(_shown(values[name]) if name in values else "missing")
            listed = "; ".join(f"rank {rank}: {shown[rank]}" for rank in (0, others[0]))
            raise DistributedMismatchError(
                f"{name!r} differs between ranks: on {others} it is not what it is on rank 0 "
                f"({listed}); "
                f"start all ranks from the same seed, options and state_dict, or broadcast them "
                f"from rank 0"
            )


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} with norm {float(value.double().norm()):.6g}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return sha256(repr(value).encode()).hexdigest()[:16]
    tensor = value.detach().cpu().contiguous()
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
