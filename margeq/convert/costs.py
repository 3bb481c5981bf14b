"""What a model costs: parameters, multiplications, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from margeq.convert.observed import run
from margeq.counts import is_count
from margeq.curvature.capture import eval_mode, forward
from margeq.errors import ConfigError, UnsupportedLayerError
from margeq.models.macs import count_macs
from margeq.paths import idle_parameters

__all__ = ["Costs", "cost_table", "costs"]

_WARM_UP = 2


@dataclass(frozen=True)
class Costs:
    """Of one model.

    Attributes:
        parameters: numbers in its parameters, each once.
        active_parameters: those of them that are not in paths that are off.
        macs: multiply-accumulate operations of one datum, ``None`` where they cannot be counted.
        latency: median time of one call in seconds, in evaluation mode without gradients.
    """

    parameters: int
    active_parameters: int
    macs: int | None
    latency: float


def costs(model: nn.Module, example_input: Any, *, repeats: int = 20) -> Costs:
    """Parameters, multiplications and latency of a model.

    Args:
        model: any.
        example_input: as it is called; multiplications are counted for a single tensor only.
        repeats: calls whose median time is taken, after two that are not.

    Returns:
        The figures; latency is that of this machine, now, for the whole batch.

    Raises:
        ConfigError: for less than one call.

    Example:
        >>> found = costs(nn.Conv2d(1, 2, 3), torch.zeros(4, 1, 5, 5))
        >>> found.parameters, found.macs
        (20, 162)
    """
    if not is_count(repeats):
        raise ConfigError(f"repeats={repeats!r}: use a number of calls of at least 1")
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    idle = sum(sizes[id(parameter)] for parameter in idle_parameters(model))
    total = sum(sizes.values())
    latency = _latency(model, example_input, repeats)
    return Costs(total, total - idle, _macs(model, example_input), latency)


def cost_table(models: Mapping[str, nn.Module], example_input: Any, *, repeats: int = 20) -> str:
    """A line per model: before and after :func:`margeq.harden`, for example.

    Returns:
        Text.
    """
    lines = [f"{'model':<16} {'parameters':>12} {'MACs':>14} {'latency':>11}"]
    for name, model in models.items():
        found = costs(model, example_input, repeats=repeats)
        macs = "not counted" if found.macs is None else f"{found.macs:,}"
        milliseconds = f"{1e3 * found.latency:,.2f} ms"
        lines.append(f"{name:<16} {found.parameters:>12,} {macs:>14} {milliseconds:>11}")
    return "\n".join(lines)


def _macs(model: nn.Module, example_input: Any) -> int | None:
    if not isinstance(example_input, Tensor):
        return None
    try:
        return count_macs(model, tuple(example_input.shape[1:]))
    except UnsupportedLayerError:
        return None


def _latency(model: nn.Module, example_input: Any, repeats: int) -> float:
    for _ in range(_WARM_UP):
        run(model, example_input)
    times = []
    with eval_mode(model), torch.no_grad():
        for _ in range(repeats):
            began = time.perf_counter()
            forward(model, example_input)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return statistics.median(times)
