"""What a training call must put back: model, flags, gradients, random state, loaders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Rewind",
    "deterministic_algorithms",
    "generators_of",
    "parts_of",
    "random_devices",
    "transaction",
]


def random_devices(model: nn.Module) -> list[int]:
    """CUDA devices whose random state a run may use."""
    devices = {p.device for p in model.parameters()}
    return [d.index or 0 for d in devices if d.type == "cuda"]


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms while the context is open, if wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(wanted or before)
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Rewind:
    """Puts a model, its gradients, and the loaders' generators back to where they were.

    Args:
        model: its state, buffers outside of the state, flags and gradients are remembered.
        loaders: whose generators, of samplers too, are remembered.
        tensors: hyperparameters that the model's state may not hold.
    """

    def __init__(
        self, model: nn.Module, loaders: Sequence[Any], tensors: Iterable[Tensor] = ()
    ) -> None:
        self._model, self._state = model, _cloned(model.state_dict())
        held = (*model.buffers(), *tensors)
        self._held = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in held]
        self._flags = [(module, module.training) for module in model.modules()]
        self._gradients = [(p, p.grad) for p in model.parameters()]
        self._random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        owners = [*loaders, *model.modules()]
        self._generators = [(g, g.get_state()) for g in generators_of(owners)]

    def __call__(self) -> None:
        """Go back to where it was built."""
        self._model.load_state_dict(self._state)
        with torch.no_grad():
            for tensor, value, gradient in self._held:
                tensor.copy_(value)
                tensor.grad = gradient
        self.restore_flags()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for generator, state in self._generators:
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Where it was built, without flags and gradients."""
        return {
            "model": self._state,
            "held": {str(number): value for number, (_, value, _) in enumerate(self._held)},
            "generators": [state for _, state in self._generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where another process began, from the next call on."""
        self._state = dict(state["model"])
        held = zip(self._held, state["held"].values(), strict=True)
        self._held = [(tensor, value, gradient) for (tensor, _, gradient), value in held]
        generators = zip(self._generators, state["generators"], strict=True)
        self._generators = [(generator, value) for (generator, _), value in generators]

    def restore_flags(self) -> None:
        """Give each sub-module its own train/eval flag back."""
        for module, training in self._flags:
            module.training = training

    def restore_random_state(self) -> None:
        """Put the global random states of torch, Python and numpy back."""
        of_torch, of_python, of_numpy = self._random
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def transaction(rewind: Rewind) -> Iterator[None]:
    """Go back if the body raises; flags are put back in any case."""
    try:
        yield
    except BaseException:
        rewind()
        rewind.restore_random_state()
        raise
    finally:
        rewind.restore_flags()


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else deepcopy(value)
        for key, value in state.items()
    }


def generators_of(owners: Sequence[Any]) -> list[torch.Generator]:
    """Generators of torch that loaders, their parts, or modules hold, in a fixed order."""
    found: list[Any] = []
    for part in (part for owner in owners for part in parts_of(owner)):
        found += [getattr(part, "generator", None), *getattr(part, "__dict__", {}).values()]
    generators = [value for value in found if isinstance(value, torch.Generator)]
    return list(dict.fromkeys(generators))


def parts_of(owner: Any) -> list[Any]:
    """A loader with its samplers, its function that collates, and its data sets; or a module."""
    batch_sampler = getattr(owner, "batch_sampler", None)
    samplers = (getattr(owner, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = [owner, batch_sampler, *samplers, getattr(owner, "collate_fn", None)]
    inside = [] if isinstance(owner, nn.Module) else [getattr(owner, "dataset", None)]
    while inside:
        data = inside.pop()
        if data is not None:
            found.append(data)
            inside += [getattr(data, "dataset", None), *getattr(data, "datasets", ())]
    return found
