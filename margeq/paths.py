"""Which modules of a model are sums of candidate paths, and where the paths are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from margeq.parameters import matches

__all__ = ["PathSum", "Shapes", "all_paths_on", "idle_parameters", "path_prefixes", "path_sums"]


Shapes = Mapping[nn.Module, tuple[torch.Size, torch.Size]]
"""Module -> shape ``[c, ...]`` of one datum's input and output."""


class PathSum(Protocol):
    """What a module that sums candidate paths offers."""

    scale: float
    active: tuple[str, ...]

    def named_paths(self) -> Iterable[tuple[str, nn.Module]]:
        """Every declared path, on or off."""
        ...

    def less_constrained(self, shapes: Shapes) -> tuple[str, ...]:
        """Paths that span more maps than the most constrained one, for inputs of these shapes."""
        ...

    def switch_off(self, name: str) -> None:
        """Stop computing a path."""
        ...

    def switch_on(self, name: str) -> None:
        """Compute a path again."""
        ...


def path_sums(model: nn.Module) -> dict[str, PathSum]:
    """Layer name -> module, for every module that sums candidate paths."""
    return {
        prefix: cast(PathSum, module)
        for prefix, module in model.named_modules()
        if hasattr(module, "named_paths")
    }


def path_prefixes(model: nn.Module) -> dict[str, dict[str, str]]:
    """Layer name -> path name -> module prefix, for every module that sums candidate paths."""
    return {
        layer: {
            name: f"{layer}.paths.{name}" if layer else f"paths.{name}"
            for name, _ in pathways.named_paths()
        }
        for layer, pathways in path_sums(model).items()
    }


def idle_parameters(model: nn.Module) -> list[Tensor]:
    """Parameters that stand in paths which are off, and nowhere else."""
    sums = path_sums(model)
    off = [
        prefix
        for layer, named in path_prefixes(model).items()
        for path, prefix in named.items()
        if path not in sums[layer].active
    ]
    everywhere = list(model.named_parameters(remove_duplicate=False))
    at_work = {id(parameter) for name, parameter in everywhere if not matches(name, off)}
    return [p for p in model.parameters() if id(p) not in at_work]


@contextmanager
def all_paths_on(model: nn.Module) -> Iterator[None]:
    """Every declared path on while the context is open: what a first look has to see."""
    before = {name: sum_.active for name, sum_ in path_sums(model).items()}
    for sum_ in path_sums(model).values():
        for path, _ in sum_.named_paths():
            sum_.switch_on(path)
    try:
        yield
    finally:
        for name, sum_ in path_sums(model).items():
            for path, _ in sum_.named_paths():
                if path not in before[name]:
                    sum_.switch_off(path)
