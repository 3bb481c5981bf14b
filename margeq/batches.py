"""Reading a user's loader: unpacking, moving, counting and checking batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from margeq.curvature.sampling import tensors_of
from margeq.errors import ConfigError, DataError
from margeq.linalg import is_finite

__all__ = ["Batch", "concatenate", "map_tensors", "read_batches", "refuse_padding", "signature"]

BatchFunction = Callable[[Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        index: position in the loader.
        inputs: a tensor, or a sequence or mapping of tensors; the data axis comes first.
        targets: ``[n, ...]``.
    """

    index: int
    inputs: Any
    targets: Tensor

    def __len__(self) -> int:
        return len(tensors_of(self.inputs)[0])


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply a function to each tensor of a model input, keeping its structure."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(function, value) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return tuple(map_tensors(function, value) for value in inputs)
    return inputs


def concatenate(inputs: Sequence[Any]) -> Any:
    """One model input from several of one :func:`signature`, joined along the data axis."""
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(inputs))
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in inputs]) for key in first}
    if isinstance(first, (list, tuple)):
        return tuple(map(concatenate, zip(*inputs, strict=True)))
    return first


def signature(inputs: Any) -> object:
    """What has to agree between model inputs that are joined along the data axis."""
    if isinstance(inputs, Tensor):
        return inputs.shape[1:], inputs.dtype
    if isinstance(inputs, Mapping):
        return {key: signature(value) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [signature(value) for value in inputs]
    return id(inputs)


def refuse_padding(loader: Any) -> None:
    """Refuse torch's sampler for ranks where it makes shares equal by repeating or dropping data.

    Raises:
        ConfigError: with both numbers, and the way out.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return
    n_data = len(sampler.dataset)  # pyright: ignore[reportArgumentType]
    if sampler.total_size != n_data:
        raise ConfigError(
            f"the loader's DistributedSampler makes {sampler.total_size} data of {n_data}, so that "
            f"all ranks have equally many; the evidence counts each datum once: use "
            f"margeq.distributed.shard(dataset) for it"
        )


def read_batches(
    loader: Iterable[Any],
    device: torch.device,
    batch_fn: BatchFunction | None = None,
    *,
    least: int = 1,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield checked batches on ``device``, of ``least`` data together; a rank may have none.

    They are counted from ``first``.

    Raises:
        DataError: for too few data, a batch that is no ``(inputs, targets)`` pair, inputs and
            targets of different length, or a NaN or infinite input.
    """
    n_data = 0
    try:
        raw_batches = enumerate(loader, first)
    except TypeError as error:
        raise DataError(f"the loader, a {type(loader).__name__}, is not iterable") from error
    for index, raw in raw_batches:
        inputs, targets = _unpack(raw, index, batch_fn)
        batch = Batch(index, map_tensors(lambda t: t.to(device), inputs), targets.to(device))
        _check(batch)
        n_data += len(batch)
        if len(batch):
            yield batch
    if n_data < least:
        raise DataError(
            "loader yielded 0 samples; it must be re-iterable (a DataLoader or a list of "
            "batches, not a generator) and its data set must not be empty"
        )


def _unpack(raw: Any, index: int, batch_fn: BatchFunction | None) -> tuple[Any, Tensor]:
    pair = raw if batch_fn is None else batch_fn(raw)
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Tensor)):
        raise DataError(
            f"batch {index} is a {_kind(pair)}, not a pair (inputs, targets) with tensor "
            f"targets; pass {_way_out(pair)}"
        )
    return pair[0], pair[1]


def _kind(pair: Any) -> str:
    name = type(pair).__name__
    if isinstance(pair, Mapping):
        return f"{name} with the keys {', '.join(map(repr, pair))}"
    if isinstance(pair, (tuple, list)):
        inner = ", ".join(type(item).__name__ for item in pair[:4])
        return f"{name} of {len(pair)} ({inner}{', …' if len(pair) > 4 else ''})"
    return name


def _way_out(pair: Any) -> str:
    if isinstance(pair, Tensor):
        return "a list of batches, such as [(inputs, targets)], if all of it is one batch"
    if isinstance(pair, Mapping):
        return 'batch_fn=lambda batch: (batch["…"], batch["…"])'
    return "batch_fn=lambda batch: (inputs, targets)"


def _check(batch: Batch) -> None:
    tensors = tensors_of(batch.inputs)
    if not tensors:
        raise DataError(f"batch {batch.index} holds no input tensor")
    if batch.targets.ndim == 0:
        raise DataError(
            f"batch {batch.index} is a single sample: its target has no data axis; for a data set "
            f"pass DataLoader(dataset, batch_size=128)"
        )
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(batch.targets):
            raise DataError(
                f"batch {batch.index}: inputs {tuple(tensor.shape)} and targets "
                f"{tuple(batch.targets.shape)} differ in their first axis, the data axis"
            )
        if not is_finite(tensor):
            where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise DataError(
                f"batch {batch.index}, index {where[0]}, feature {tuple(where[1:])}: input is "
                f"{tensor[tuple(where)].item()}; remove or impute this sample"
            )
