"""What a training call must put back: model, flags, gradients, random state, loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rewind", "clone_state", "deterministic_algorithms", "random_devices", "transaction"]


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


@contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Put model state and gradients back if the body raises; flags are put back in any case."""
    state = clone_state(model)
    flags = [(module, module.training) for module in model.modules()]
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    try:
        yield
    except BaseException:
        model.load_state_dict(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
    finally:
        for module, training in flags:
            module.training = training


def clone_state(model: nn.Module) -> dict[str, Any]:
    """An independent copy of the model's state."""
    return {
        key: value.clone() if isinstance(value, Tensor) else deepcopy(value)
        for key, value in model.state_dict().items()
    }


class Rewind:
    """Puts model state and the loaders' generators back to where they were."""

    def __init__(self, model: nn.Module, loaders: Sequence[Any]) -> None:
        self._model, self._state = model, clone_state(model)
        self._flags = [(module, module.training) for module in model.modules()]
        owners = [*loaders, *(getattr(loader, "sampler", None) for loader in loaders)]
        generators = [getattr(owner, "generator", None) for owner in owners]
        self._generators = [
            (g, g.get_state()) for g in generators if isinstance(g, torch.Generator)
        ]

    def __call__(self) -> None:
        """Go back to where it was built."""
        self._model.load_state_dict(self._state)
        for module, training in self._flags:
            module.training = training
        for generator, state in self._generators:
            generator.set_state(state)
