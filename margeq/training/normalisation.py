"""Scale-invariant weights: the trap between normalisation layers and weight priors.

The loss does not change when weights before a train-mode BatchNorm or LayerNorm are scaled, so a
prior would shrink them for ever and their precision would run away although the path is needed.
Their norm is held at function scale instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.batches import map_tensors
from margeq.curvature.capture import forward
from margeq.paths import path_sums
from margeq.training.function_scale import FunctionScale

__all__ = ["HeldNorms", "scale_invariant_units"]

_PROBE_ROWS = 32
_FACTOR = 1.5


class HeldNorms:
    """Holds the joint norm of each scale-invariant unit at function scale.

    Units are those of the paths that are on: a path alone is held as in a model of its own.

    Args:
        model: in the mode of training, or not.
        weights: its tensors by name.
        scale: function scale, which sets the norm ``sqrt(sum numel / delta_0)``.
        inputs: of one batch, to find the units on.

    Attributes:
        units: groups of tensor names that the loss cannot tell from a common multiple.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        scale: FunctionScale,
        inputs: Any,
    ) -> None:
        self._model, self._weights, self._scale, self._inputs = model, weights, scale, inputs
        self.refresh()

    def refresh(self) -> None:
        """Find the units again, after paths were switched, and give them their norms."""
        self.units = tuple(
            scale_invariant_units(self._model, self._weights, self._scale, self._inputs)
        )
        self.project()

    def state_dict(self) -> dict[str, Any]:
        """The units that are held."""
        return {"units": self.units}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold these units, as they are."""
        self.units = state["units"]

    @torch.no_grad()
    def project(self) -> None:
        """Rescale every unit to its norm; a unit of zeros stays as it is."""
        for names in self.units:
            unit = [self._weights[name] for name in names]
            numbers = zip(unit, (self._scale.precision[name] for name in names), strict=True)
            target = sum(weight.numel() / precision for weight, precision in numbers) ** 0.5
            norm = torch.stack([weight.square().sum() for weight in unit]).sum().sqrt()
            factor = torch.where(norm > 0, target / norm.clamp_min(1e-30), 1.0)
            for weight in unit:
                weight.mul_(factor)


def scale_invariant_units(
    model: nn.Module, weights: Mapping[str, nn.Parameter], scale: FunctionScale, inputs: Any
) -> list[tuple[str, ...]]:
    """Find tensors, modules and whole path sums whose common scale the training output ignores.

    A functional test on a few rows in the mode that training uses, at weights of its own: at
    others, such as biases of zero, more than the structure of the network decides what matters.
    Paths that are off have no part in it. Weights, random state and buffers are left unchanged.

    Returns:
        Groups of tensor names.
    """
    rows = map_tensors(lambda t: t[:_PROBE_ROWS], inputs)
    with torch.no_grad(), _undisturbed(model), _generic(weights, scale):
        reference = _output(model, rows)
        singles = [
            (name,)
            for name in weights
            if not scale.is_bias[name] and _ignores_scale(model, rows, reference, [weights[name]])
        ]
        sums = [
            tuple(name for path in sum_.active for name in scale.path_outputs[layer][path])
            for layer, sum_ in path_sums(model).items()
        ]
        found: list[tuple[str, ...]] = list(singles)
        # a bias that the norm does not shift away scales with its weight, a path with its sum
        for unit in (*scale.modules, *sums):
            taken = {name for other in found for name in other}
            if len(unit) > 1 and not taken & set(unit):
                tensors = [weights[name] for name in unit]
                if _ignores_scale(model, rows, reference, tensors):
                    found.append(unit)
    return found


def _ignores_scale(
    model: nn.Module, rows: Any, reference: Tensor, tensors: Sequence[Tensor]
) -> bool:
    scaled = _change_under(model, rows, reference, tensors, lambda t: t * _FACTOR)
    if scaled > 1e-3:
        return False
    # a tensor that is not used at all ignores its scale too, and everything else
    reversed_order = _change_under(model, rows, reference, tensors, _reversed)
    return reversed_order > 10 * scaled + 1e-6


def _reversed(tensor: Tensor) -> Tensor:
    flipped = tensor.flatten().flip(0) * torch.linspace(
        0.5, 1.5, tensor.numel(), device=tensor.device
    )
    return flipped.reshape(tensor.shape).to(tensor.dtype)


def _change_under(
    model: nn.Module, rows: Any, reference: Tensor, tensors: Sequence[Tensor], change: Any
) -> float:
    saved = [tensor.clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.copy_(change(tensor))
        difference = (_output(model, rows) - reference).norm()
    finally:
        for tensor, old in zip(tensors, saved, strict=True):
            tensor.copy_(old)
    return float(difference / reference.norm().clamp_min(1e-30))


def _output(model: nn.Module, rows: Any) -> Tensor:
    torch.manual_seed(0)  # the same dropout masks each time; the caller's state is forked
    return forward(model, rows)


@contextmanager
def _generic(weights: Mapping[str, nn.Parameter], scale: FunctionScale) -> Iterator[None]:
    """Weights at function scale, away from zero, seeded by name: the same in any larger model."""
    saved = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            draw = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
            weight.copy_((draw + draw.sign() / 2) / scale.precision[name] ** 0.5)
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(saved[name])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The mode of training, with flags, buffers and random state put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            if not model.training:
                model.train()  # as in training: a sub-module that the user froze stays frozen
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
