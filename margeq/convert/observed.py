"""What one forward shows of a model: which layers are called, on maps of which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from margeq.curvature.capture import eval_mode, forward
from margeq.curvature.sampling import tensors_of
from margeq.errors import ConversionError, DataError
from margeq.training.randomness import random_devices

__all__ = ["Observed", "largest_difference", "observe", "run"]


@dataclass
class Observed:
    """All calls of one module.

    Attributes:
        sizes: shapes of its inputs and outputs, without the data axis, each pair once.
        is_first: whether it is the first of those observed, or is called on an input of the model.
        trouble: why its calls cannot be those of a path sum, empty if they can.
    """

    sizes: list[tuple[torch.Size, torch.Size]] = field(default_factory=list)
    is_first: bool = False
    trouble: str = ""


def observe(
    model: nn.Module, example_input: Any, modules: list[nn.Module]
) -> tuple[list[Tensor], dict[nn.Module, Observed]]:
    """Run the model once and note the calls of some modules.

    Returns:
        The model's outputs, and module -> its calls, of those that are called.
    """
    found: dict[nn.Module, Observed] = {}
    inputs = tensors_of(example_input)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        is_first = not found
        seen = found.setdefault(module, Observed())
        if kwargs or len(args) != 1 or not (isinstance(args[0], Tensor) and isinstance(y, Tensor)):
            seen.trouble = "called with other arguments than one tensor"
            return
        x = args[0]
        if isinstance(module, nn.Conv2d) and x.ndim != 4:
            seen.trouble = f"called on {tuple(x.shape)}, which has no data axis"
        sizes = (x.shape[1:], y.shape[1:])
        if sizes not in seen.sizes:
            seen.sizes.append(sizes)
        seen.is_first |= is_first or any(x is other for other in inputs)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        outputs = run(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, found


def run(model: nn.Module, example_input: Any) -> list[Tensor]:
    """Outputs in evaluation mode without gradients; flags and random state are as before."""
    forked = torch.random.fork_rng(random_devices(model))
    with eval_mode(model), torch.no_grad(), forked:
        torch.manual_seed(0)
        outputs: Any = forward(model, example_input)
    try:
        return tensors_of(outputs)
    except DataError as error:
        raise ConversionError(
            f"the model returns a {type(outputs).__name__}, whose tensors cannot be compared "
            f"before and after; return a tensor, or a sequence or mapping of tensors"
        ) from error


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Between outputs, in units of the largest entry of each, at least 1; infinite for others.

    Returns:
        A number, NaN if there is one on one side only.
    """
    if [y.shape for y in before] != [y.shape for y in after]:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel():
            a, b = old.double(), new.double()
            size = a.nan_to_num().abs().max().clamp_min(1.0)
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().max() / size
            worst = max(worst, float(gap)) if not gap.isnan() else float("nan")
    return worst
