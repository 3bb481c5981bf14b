"""Maps without weights as graphs of torch's own operations, and sequences of modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

__all__ = [
    "Added",
    "BatchSubsampled",
    "DataLast",
    "Gated",
    "Lifted",
    "OnElements",
    "Pooled",
    "Reordered",
    "Scaled",
    "Subsampled",
    "graph_of",
    "parts",
    "sequence",
]


class _Tracer(fx.Tracer):
    """Looks into the module itself and into no other."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def graph_of(module: nn.Module, name: str) -> fx.GraphModule:
    """What a module computes, calling its sub-modules as they are, without its class."""
    return fx.GraphModule(module, _Tracer().trace(module), name)


def parts(module: nn.Module) -> list[nn.Module]:
    """The modules that run one after the other; those that undo each other are left out."""
    if type(module) is nn.Sequential:
        found: list[nn.Module] = []
        for child in module:
            for part in parts(child):
                if found and _undoes(found[-1], part):
                    found.pop()
                else:
                    found.append(part)
        return found
    return [] if type(module) is nn.Identity else [module]


def sequence(modules: Sequence[nn.Module]) -> nn.Module:
    """The modules one after the other; a single one as it is."""
    whole = parts(nn.Sequential(*modules))
    if not whole:
        return nn.Identity()
    return whole[0] if len(whole) == 1 else nn.Sequential(*whole)


def _undoes(first: nn.Module, second: nn.Module) -> bool:
    splits = isinstance(first, nn.Unflatten) and (first.dim, len(first.unflattened_size)) == (1, 2)
    merges = isinstance(second, nn.Flatten) and (second.start_dim, second.end_dim) == (1, 2)
    return splits and merges


class Added(nn.Module):
    """A sum of modules, times a number."""

    def __init__(self, terms: Mapping[str, nn.Module], scale: float) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(OrderedDict(terms))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Add up."""
        first, *rest = self.terms.values()
        total = first(x)
        for term in rest:
            total = total + term(x)
        return total if self.scale == 1.0 else self.scale * total


class Scaled(nn.Module):
    """A map times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.factor * x


class Pooled(nn.Module):
    """Maximum or mean over the group axis."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        return x.amax(2) if self.reduction == "max" else x.mean(2)


class Lifted(nn.Module):
    """The same map for each group element."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """Copy."""
        return x.unsqueeze(2).repeat_interleave(self.order, 2)


class Gated(nn.Module):
    """Each group element times a number of its own."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Buffer(factors)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return (x.movedim(2, -1) * self.factors).movedim(-1, 2)


class Reordered(nn.Module):
    """Elements of the group axis in another order, split or merged with the channels."""

    def __init__(self, order: Tensor, n_before: int, n_after: int) -> None:
        super().__init__()
        self.order = nn.Buffer(order)
        self.n_before, self.n_after = n_before, n_after

    def forward(self, x: Tensor) -> Tensor:
        """Merge cosets from the channels if there are any, reorder, split cosets off again."""
        if self.n_before > 1:
            x = x.unflatten(1, (-1, self.n_before)).flatten(2, 3)
        x = x.index_select(2, self.order)
        return x.unflatten(2, (self.n_after, -1)).flatten(1, 2) if self.n_after > 1 else x


class DataLast(nn.Module):
    """A module that gets the data side by side on the last axis, and their numbers as channels."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.module(x.flatten(1).t().unsqueeze(0)).squeeze(0).t()


class OnElements(nn.Module):
    """A module for pictures on the map of each group element."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.module(x.flatten(1, 2)).unflatten(1, (-1, x.size(2)))


class Subsampled(nn.Module):
    """The one of four phases with the largest norm, for each datum."""

    def forward(self, x: Tensor) -> Tensor:
        """Select."""
        phases = _phases(x)
        best = phases.square().flatten(2).sum(-1).argmax(1)
        rows = torch.ones_like(best).cumsum(0) - 1
        return phases[rows, best]


class BatchSubsampled(nn.Module):
    """The one of four phases with the largest entry, for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Select."""
        phases = _phases(x)
        best = phases.transpose(0, 1).flatten(1).amax(1).argmax(0, keepdim=True)
        return phases.index_select(1, best).squeeze(1)


def _phases(x: Tensor) -> Tensor:
    """``[n, 4, ..., H/2, W/2]``, without looking at the sizes."""
    split = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return split.movedim((-3, -1), (1, 2)).flatten(1, 2)
