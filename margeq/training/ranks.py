"""What ranks that train together have to share before the first step, and what they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]

from margeq.batches import map_tensors, refuse_padding
from margeq.comm import Comm, require_equal
from margeq.distributed.shards import ShareOrder
from margeq.distributed.states import share_state
from margeq.errors import CurvatureError, DataError, UnsupportedLayerError
from margeq.training.settings import flattened

__all__ = [
    "error_of_first",
    "first_of_all",
    "rank_seed",
    "refuse_same_shares",
    "refuse_what_ranks_cannot_share",
    "require_same_call",
    "tensors_that_agree",
]


def require_same_call(
    comm: Comm,
    model: nn.Module,
    settings: Mapping[str, Any],
    hyperparameters: Mapping[str, Tensor],
    loaders: Iterable[Any],
    **further: Any,
) -> None:
    """Check that all ranks were called alike; their shares of the data differ.

    Args:
        comm: the ranks.
        model: with its initial weights.
        settings: plain description of the call.
        hyperparameters: by name.
        loaders: whose orders have to agree, if ranks cut up one order.
        further: what else has to be the same.

    Raises:
        DistributedMismatchError: naming the first weight or argument that differs.
    """
    plain = flattened({name: value for name, value in settings.items() if name != "loaders"})
    tensors = tensors_that_agree(model, *loaders)
    require_equal(comm, {**tensors, **hyperparameters, **plain, **further})


def tensors_that_agree(model: nn.Module, *loaders: Any) -> dict[str, Any]:
    """What a model's output depends on, and orders of data that ranks cut up, by name."""
    orders = {
        f"order of loader {number} (were other passes made over it on some rank?)": order.generator
        for number, loader in enumerate(loaders)
        if isinstance(order := getattr(loader, "batch_sampler", None), ShareOrder)
    }
    states = {name: generator.get_state() for name, generator in orders.items()}
    return {**dict(model.named_buffers()), **model.state_dict(), **states}


def refuse_what_ranks_cannot_share(model: nn.Module, *loaders: Iterable[Any] | None) -> None:
    """Refuse statistics over batches, each rank's own, and loaders that repeat or drop data.

    Raises:
        UnsupportedLayerError: naming the module and the ways out.
        ConfigError: for a sampler that makes shares equal.
    """
    for loader in loaders:
        refuse_padding(loader)
    for name, module, reason in _rank_statistics(model):
        raise UnsupportedLayerError(
            f"{name or 'the model'} ({type(module).__name__}) {reason}, which differ from rank to "
            f"rank. Ways out: freeze its statistics (call eval() on it, with the rest of the "
            f"model in training mode); use GroupNorm or LayerNorm; or train in one process"
        )


def refuse_same_shares(comm: Comm, n_own: int, content: int) -> None:
    """Refuse ranks that hold the very same data: each would count as often as there are ranks.

    Args:
        comm: the ranks.
        n_own: number of data of this rank.
        content: checksum of inputs and targets, in any order.

    Raises:
        DataError: naming the ranks and the way out.
    """
    if comm.size == 1:
        return
    shares = comm.gather([n_own, content])
    for share in shares:
        same = [other for other, its in enumerate(shares) if its == share]
        if share[0] > 1 and len(same) > 1:
            raise DataError(
                f"ranks {', '.join(map(str, same))} hold the same {share[0]} data, each of which "
                f"belongs to one rank; give every rank its own share with "
                f"margeq.distributed.shard(dataset, ...)"
            )


def _rank_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        # a model in evaluation mode is trained with all its modules in training mode
        trains = module.training or not model.training
        if isinstance(module, _BatchNorm) and (trains or module.running_mean is None):
            yield name, module, "normalises by the statistics of a batch"
        if isinstance(module, _InstanceNorm) and trains and module.running_mean is not None:
            yield name, module, "keeps running statistics of the data"


def first_of_all(own_inputs: Any, n_own: int, device: torch.device, comm: Comm) -> tuple[Any, int]:
    """The first inputs of the lowest rank that has data, and the number of data of all ranks.

    Returns:
        Both the same on all ranks.

    Raises:
        DataError: if there are no data at all.
    """
    counts = comm.gather(n_own)
    if not sum(counts):
        raise DataError(f"the loaders of all {comm.size} ranks yielded 0 samples together")
    source = next(rank for rank, count in enumerate(counts) if count)
    inputs = share_state(comm, own_inputs, source)
    return map_tensors(lambda tensor: tensor.to(device), inputs), sum(counts)


def rank_seed(seed: int, rank: int) -> int:
    """Seed of what ranks draw on their own: dropout, augmentation, the order of their shares."""
    return seed if rank == 0 else crc32(f"{seed}:rank {rank}".encode())


def error_of_first(comm: Comm, error: CurvatureError) -> CurvatureError:
    """An error that all ranks have, in the words of rank 0, so that results are the same."""
    if comm.size == 1:
        return error
    return type(error)(comm.gather(str(error))[0])
