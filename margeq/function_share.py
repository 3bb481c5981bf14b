"""How much of a layer's function each candidate path carries on the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from margeq.batches import Batch
from margeq.comm import ALONE, Comm, together
from margeq.curvature.capture import eval_mode, forward
from margeq.parameters import unwrapped
from margeq.paths import PathSum, path_sums

__all__ = ["Variances", "function_variances", "shares"]

Variances = dict[str, dict[str, float]]
"""Layer -> path -> variance, or share."""


def function_variances(
    model: nn.Module,
    batches: Iterable[Batch],
    max_data: int | None = None,
    comm: Comm = ALONE,
) -> Variances:
    """Variance over the data of what each path adds to its layer, summed over output elements.

    Evaluation mode, after path scaling and pooling (at the phase that the layer chose, if its paths
    are subsampled together); a switched-off path has variance 0.

    Args:
        model: with or without path sums.
        batches: checked batches.
        max_data: stop after this many data, of all ranks together.
        comm: ranks that look at the data together, each at its own.

    Returns:
        layer -> path -> variance, the same on all ranks.
    """
    model = unwrapped(model)
    layers = {prefix: _Contributions(sum_) for prefix, sum_ in path_sums(model).items()}
    if not layers:
        return {}
    own_data = None if max_data is None else -(-max_data // comm.size)
    with together(comm):
        _look(model, layers, batches, own_data)
    if comm.size > 1:
        moments = [m for layer in layers.values() for m in layer.moments.values()]
        _reduce(moments, next(model.parameters()).device, comm)
    return {prefix: layer.variances() for prefix, layer in layers.items()}


def _look(
    model: nn.Module,
    layers: Mapping[str, _Contributions],
    batches: Iterable[Batch],
    max_data: int | None,
) -> None:
    """Add the data of this process to the moments of all paths."""
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


def _reduce(moments: Sequence[_Moments], device: torch.device, comm: Comm) -> None:
    """Make the moments of a rank's own data those of all; a rank may have none."""
    shapes = comm.gather([m.shape for m in moments])
    used = []
    for number, own in enumerate(moments):
        owner = next((rank for rank, of in enumerate(shapes) if of[number] is not None), None)
        if owner is not None:  # the path is on
            own.begin(shapes[owner][number], device)
            used.append((own, owner == comm.rank))
    # a sum in which only the owner's numbers are not zero keeps them to the last bit
    shifts = comm.sum(
        [own.shift if is_owner else torch.zeros_like(own.shift) for own, is_owner in used]
    )
    for (own, _), shift in zip(used, shifts, strict=True):
        own.move(shift)
    sums = comm.sum([part for own, _ in used for part in own.sums()])
    for (own, _), *parts in zip(used, sums[::3], sums[1::3], sums[2::3], strict=True):
        own.count, own.sum, own.squares = int(parts[0]), parts[1], parts[2]


class _Contributions:
    """What each path adds to one layer, over all calls of the layer."""

    def __init__(self, layer: PathSum) -> None:
        self._layer = layer
        self.moments = {name: _Moments() for name, _ in layer.named_paths()}
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
            self.moments[name].add(values)
        self._outputs = {}

    def variances(self) -> dict[str, float]:
        """Path -> variance over the data, summed over output elements."""
        scale = self._layer.scale
        return {name: moments.variance() * scale**2 for name, moments in self.moments.items()}


class _Moments:
    """Running first and second moments of a module's output, per element, about a shift."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = self.shift = torch.zeros(())

    @property
    def shape(self) -> list[int] | None:
        """That of one datum, with an axis of length 1 in front; ``None`` without data."""
        return list(self.shift.shape) if self.count else None

    def begin(self, shape: Sequence[int], device: torch.device) -> None:
        """Moments of no data of a shape, unless there are data."""
        if not self.count:
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            self.sum = self.squares = self.shift = zeros

    def add(self, y: Tensor) -> None:
        """Add the data of one call ``[n, ...]``."""
        values = y.double()
        if not self.count:
            # moments about the first datum: no cancellation for large means
            self.shift = values[:1].clone()
            self.sum, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        centred = values - self.shift
        self.count += len(values)
        self.sum = self.sum + centred.sum(0)
        self.squares = self.squares + centred.square().sum(0)

    def move(self, shift: Tensor) -> None:
        """Have the moments about another shift, such as another datum."""
        by = shift - self.shift
        self.squares = self.squares - 2 * by * self.sum + self.count * by.square()
        self.sum, self.shift = self.sum - self.count * by, shift

    def sums(self) -> list[Tensor]:
        """Number of data, and sums of the first and second powers."""
        return [self.sum.new_tensor(float(self.count)), self.sum, self.squares]

    def variance(self) -> float:
        if not self.count:
            return 0.0
        mean = self.sum / self.count
        return float((self.squares / self.count - mean.square()).clamp_min(0.0).sum())


def shares(variances: Variances) -> Variances:
    """Each path's share of its layer's summed variances."""
    found = {}
    for layer, by_path in variances.items():
        total = sum(by_path.values())
        found[layer] = {path: v / total if total > 0 else 0.0 for path, v in by_path.items()}
    return found
