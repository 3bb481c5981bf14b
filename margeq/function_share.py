"""How much of a layer's function each candidate path carries on the data."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from margeq.batches import Batch
from margeq.curvature.capture import eval_mode, forward
from margeq.parameters import unwrapped
from margeq.paths import PathSum, path_sums

__all__ = ["Variances", "function_variances", "shares"]

Variances = dict[str, dict[str, float]]
"""Layer -> path -> variance, or share."""


def function_variances(
    model: nn.Module, batches: Iterable[Batch], max_data: int | None = None
) -> Variances:
    """Variance over the data of what each path adds to its layer, summed over output elements.

    Evaluation mode, after path scaling and pooling (at the phase that the layer chose, if its paths
    are subsampled together); a switched-off path has variance 0.

    Args:
        model: with or without path sums.
        batches: checked batches.
        max_data: stop after this many data.

    Returns:
        layer -> path -> variance.
    """
    model = unwrapped(model)
    layers = {prefix: _Contributions(sum_) for prefix, sum_ in path_sums(model).items()}
    if not layers:
        return {}
    handles = [h for prefix, c in layers.items() for h in c.watch(model.get_submodule(prefix))]
    seen = 0
    try:
        with eval_mode(model), torch.no_grad():
            for batch in batches:
                forward(model, batch.inputs)
                seen += len(batch)
                if max_data is not None and seen >= max_data:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {prefix: layer.variances() for prefix, layer in layers.items()}


class _Contributions:
    """What each path adds to one layer, over all calls of the layer."""

    def __init__(self, layer: PathSum) -> None:
        self._layer = layer
        self._moments = {name: _Moments() for name, _ in layer.named_paths()}
        self._outputs: dict[str, Tensor] = {}

    def watch(self, module: nn.Module) -> list[RemovableHandle]:
        """Look at the outputs of the paths, and add them up when the layer has its own."""
        keep = [
            path.register_forward_hook(partial(self._keep, name))
            for name, path in self._layer.named_paths()
        ]
        return [*keep, module.register_forward_hook(self._add)]

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self._outputs[name] = y.detach()

    def _add(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        # a layer that subsamples its paths together knows what is left of each
        added = getattr(module, "contributions", dict)(self._outputs)
        for name, values in added.items():
            self._moments[name].add(values)
        self._outputs = {}

    def variances(self) -> dict[str, float]:
        """Path -> variance over the data, summed over output elements."""
        scale = self._layer.scale
        return {name: moments.variance() * scale**2 for name, moments in self._moments.items()}


class _Moments:
    """Running first and second moments of a module's output, per element."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._shift: Tensor | None = None

    def add(self, y: Tensor) -> None:
        """Add the data of one call ``[n, ...]``."""
        values = y.double()
        if self._shift is None:
            # moments about the first datum: no cancellation for large means
            self._shift = values[:1].clone()
        centred = values - self._shift
        self._count += len(values)
        self._sum = self._sum + centred.sum(0)
        self._squares = self._squares + centred.square().sum(0)

    def variance(self) -> float:
        if not self._count or not isinstance(self._sum, Tensor):
            return 0.0
        mean = self._sum / self._count
        return float((self._squares / self._count - mean.square()).clamp_min(0.0).sum())


def shares(variances: Variances) -> Variances:
    """Each path's share of its layer's summed variances."""
    found = {}
    for layer, by_path in variances.items():
        total = sum(by_path.values())
        found[layer] = {path: v / total if total > 0 else 0.0 for path, v in by_path.items()}
    return found
