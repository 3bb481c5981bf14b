"""The random numbers to come: global states, generators of loaders, and loaders with a state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from margeq.distributed.shards import ShareOrder
from margeq.training.guards import generators_of, parts_of, random_devices

__all__ = ["Randomness"]

_KNOWN_SAMPLERS = (
    BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler,
)  # fmt: skip


class Randomness:
    """Random states of torch, numpy and Python, and of the loaders.

    Args:
        model: whose devices count, and generators that its modules hold.
        loaders: of a run.
    """

    def __init__(self, model: nn.Module, loaders: Sequence[Any]) -> None:
        self._devices = random_devices(model)
        self._loaders = list({id(loader): loader for loader in loaders}.values())
        self._owners = [*self._loaders, *model.modules()]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        loaders = [loader.state_dict() for loader in self._with_state()]
        return {**self.numbers(), "loaders": loaders}

    def numbers(self) -> dict[str, Any]:
        """Without the states of loaders, which may mean nothing in the middle of a pass."""
        numpy = np.random.get_state(legacy=False)
        assert isinstance(numpy, dict)
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self._devices],
            "python": random.getstate(),
            "numpy": {**numpy, "state": _plain(numpy["state"])},
            "generators": [g.get_state() for g in generators_of(self._owners)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw the same numbers again from here on."""
        self.load_numbers(state)
        for loader, value in zip(self._with_state(), state["loaders"], strict=True):
            loader.load_state_dict(value)

    def load_numbers(self, state: Mapping[str, Any]) -> None:
        """The same for all but the states of loaders."""
        torch.set_rng_state(state["torch"])
        for device, value in zip(self._devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(value, device)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        for generator, value in zip(generators_of(self._owners), state["generators"], strict=True):
            generator.set_state(value)

    def on_other_ranks(self, stored: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """A state to go on with from one of another number of ranks.

        Args:
            stored: that of rank 0; orders that all ranks share go on from there.
            seed: of this rank's numbers from now on.

        Returns:
            As from :meth:`state_dict`.
        """
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(seed)
            return {**self.state_dict(), "generators": self.shared_orders(stored["generators"])}

    def shared_orders(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """States of the loaders' generators: stored ones of orders that all ranks share."""
        shared = [getattr(loader, "batch_sampler", None) for loader in self._loaders]
        shared = [order.generator for order in shared if isinstance(order, ShareOrder)]
        pairs = list(zip(generators_of(self._owners), stored, strict=False))
        live = [generator.get_state() for generator in generators_of(self._owners)]
        found = [value if generator in shared else None for generator, value in pairs]
        return [
            own if value is None else value
            for own, value in zip(live, [*found, *[None] * (len(live) - len(found))], strict=True)
        ]

    def describe(self) -> list[dict[str, Any]]:
        """What decides the order of each loader, for comparisons."""
        return [_description(loader) for loader in self._loaders]

    def unknown_orders(self) -> list[str]:
        """Loaders whose batches may come in an order that no known state decides."""
        return [type(loader).__name__ for loader in self._loaders if not self.is_known(loader)]

    @staticmethod
    def is_known(loader: Any) -> bool:
        """Whether a known state decides the order of a loader's batches."""
        return _is_known(loader)

    @staticmethod
    def says_where_it_stands(loader: Any) -> bool:
        """Whether a loader's state holds its place in a pass.

        Returns:
            True for torchdata's ``StatefulDataLoader``, and for loaders with a true attribute
            ``resumes_within_pass``: nothing else tells their states from those of whole passes.
        """
        named = any(kind.__name__ == "StatefulDataLoader" for kind in type(loader).__mro__)
        return _has_state(loader) and bool(getattr(loader, "resumes_within_pass", named))

    def _with_state(self) -> Iterator[Any]:
        for loader in self._loaders:
            if _has_state(loader):
                yield loader


def _description(loader: Any) -> dict[str, Any]:
    batches = getattr(loader, "batch_sampler", None)
    found = {
        "loader": type(loader).__name__,
        "batch_size": getattr(loader, "batch_size", None),
        "sampler": type(getattr(loader, "sampler", None)).__name__,
        "generators": len(generators_of([loader])),
    }
    if isinstance(batches, ShareOrder):  # the same for any number of ranks
        return {**found, "batch_size": batches.together, "seed": batches.seed}
    if found["batch_size"] is None and batches is not None:
        inner = type(getattr(batches, "sampler", None)).__name__
        size, drops = (getattr(batches, name, None) for name in ("batch_size", "drop_last"))
        batch_sampler = type(batches).__name__
        found |= {"batch_sampler": batch_sampler, "batch_size": size, "drop_last": drops}
        found["sampler"] = inner
    return found


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_known(loader: Any) -> bool:
    if loader is None or isinstance(loader, (list, tuple)) or _has_state(loader):
        return True
    if not isinstance(loader, DataLoader):
        return isinstance(getattr(loader, "generator", None), torch.Generator)
    # workers that live on draw from states of their own
    return (
        not loader.persistent_workers
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, _KNOWN_SAMPLERS)
        and not any(map(_holds_foreign_generator, parts_of(loader)))
        and (loader.batch_sampler is None or _is_plain(loader.batch_sampler))
    )


def _holds_foreign_generator(part: Any) -> bool:
    """Random numbers of numpy or Python that only this object knows; torch's are saved."""
    values = getattr(part, "__dict__", {}).values()
    return any(
        isinstance(v, np.random.Generator | np.random.RandomState | random.Random) for v in values
    )


def _is_plain(batches: Any) -> bool:
    if type(batches) is ShareOrder:
        return True
    return type(batches) is BatchSampler and isinstance(batches.sampler, _KNOWN_SAMPLERS)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in state.items()}
