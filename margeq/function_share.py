"""How much of a layer's function each candidate path carries on the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.curvature.capture import eval_mode, forward
from margeq.paths import path_prefixes, path_sums

__all__ = ["Variances", "function_variances", "shares"]

Variances = dict[str, dict[str, float]]
"""Layer -> path -> variance, or share."""


def function_variances(
    model: nn.Module, batches: Iterable[Batch], max_data: int | None = None
) -> Variances:
    """Variance over the data of each path's output, summed over output elements.

    Evaluation mode, after path scaling and pooling; a switched-off path has variance 0.

    Args:
        model: with or without path sums.
        batches: checked batches.
        max_data: stop after this many data.

    Returns:
        layer -> path -> variance.
    """
    prefixes = path_prefixes(model)
    moments = {p: _Moments() for named in prefixes.values() for p in named.values()}
    if not moments:
        return {}
    handles = [model.get_submodule(p).register_forward_hook(m.add) for p, m in moments.items()]
    sums, seen = path_sums(model), 0
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
    return {
        layer: {
            path: moments[prefix].variance() * sums[layer].scale ** 2
            for path, prefix in named.items()
        }
        for layer, named in prefixes.items()
    }


class _Moments:
    """Running first and second moments of a module's output, per element."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._shift: Tensor | None = None

    def add(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        values = y.detach().double()
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
