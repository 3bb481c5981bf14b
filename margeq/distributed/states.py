"""Nested states from one rank to the others: values as JSON, tensors as their bytes.

Nothing that arrives is ever executed, and every tensor arrives to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from margeq.checkpoint.trees import from_plain, to_plain
from margeq.comm import Comm, together

__all__ = ["gather_states", "share_state"]


def share_state(comm: Comm, state: Any, source: int = 0) -> Any:
    """The nested state of one rank, on all ranks; every rank has to call this.

    Args:
        comm: the ranks.
        state: dicts, lists, tuples, plain values and tensors; read on ``source`` only.
        source: whose state.

    Returns:
        The state itself on ``source``, elsewhere one like it, with its tensors on the CPU.

    Raises:
        CheckpointError: on all ranks, for values of other kinds.
    """
    if comm.size == 1:
        return state
    is_source = comm.rank == source
    with together(comm):
        plain, tensors = to_plain(state if is_source else None, "state")
        bytes_of = {name: _bytes(tensor) for name, tensor in tensors.items()}
    shapes = {name: [_name(t.dtype), list(t.shape)] for name, t in tensors.items()}
    plain, shapes = comm.gather([plain, shapes])[source]
    if not shapes:
        return state if is_source else from_plain(plain, {})
    sizes = (
        [len(b) for b in bytes_of.values()] if is_source else [_size(*s) for s in shapes.values()]
    )
    own = torch.cat(list(bytes_of.values())) if is_source else torch.empty(sum(sizes)).byte()
    (sent,) = comm.broadcast([own], source)
    if is_source:
        return state
    parts = zip(shapes.items(), sent.split(sizes), strict=True)
    return from_plain(plain, {name: _tensor(part, *shape) for (name, shape), part in parts})


def gather_states(comm: Comm, state: Any) -> list[Any]:
    """The nested states of all ranks, in their order, on all ranks; every rank has to call this."""
    return [share_state(comm, state, source) for source in range(comm.size)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _tensor(data: Tensor, dtype: str, shape: list[int]) -> Tensor:
    # a copy of its own: parts of one message do not lie where all dtypes may
    return data.clone().view(getattr(torch, dtype)).reshape(shape)


def _size(dtype: str, shape: list[int]) -> int:
    return torch.Size(shape).numel() * torch.empty((), dtype=getattr(torch, dtype)).element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
