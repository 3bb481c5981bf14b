"""The exact GGN of some weights of each tensor, and its trace over all of them, by autograd alone.

    H = sum_n J_n^T Lambda_n J_n

Knows no curvature rule: one backward pass per datum and column of the root of ``Lambda_n``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch, map_tensors
from margeq.curvature.capture import eval_mode, forward
from margeq.likelihoods import Likelihood
from margeq.parameters import named_weights

__all__ = ["ExactSample", "exact_sample", "sampled_entries"]


@dataclass(frozen=True)
class ExactSample:
    """The exact GGN of one weight tensor, as far as it is needed.

    Attributes:
        trace: over all of its weights.
        block: ``[s, s]``, of a sample of them.
    """

    trace: float
    block: Tensor


def sampled_entries(weights: Mapping[str, nn.Parameter], size: int, seed: int) -> dict[str, Tensor]:
    """Up to ``size`` places in each weight tensor, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(weight.numel(), generator=generator)[:size].sort().values
        for name, weight in weights.items()
    }


def exact_sample(
    model: nn.Module, batches: Iterable[Batch], likelihood: Likelihood, places: Mapping[str, Tensor]
) -> dict[str, ExactSample]:
    """Accumulate the GGN in float64, on a copy of the model.

    Args:
        model: left as it is.
        batches: the data.
        likelihood: gives the Hessian of the outputs, without noise and temperature.
        places: weight tensor -> entries whose block is wanted.

    Returns:
        Weight tensor -> its exact GGN.
    """
    twin = deepcopy(model).double()
    everything = named_weights(twin)
    weights = [everything[name] for name in places]
    traces = dict.fromkeys(places, 0.0)
    blocks = {name: torch.zeros(len(p), len(p), dtype=torch.float64) for name, p in places.items()}
    with eval_mode(twin), torch.enable_grad():
        for batch in batches:
            for n in range(len(batch)):
                outputs = forward(twin, _datum(batch.inputs, n))
                for column in _root(likelihood.hessian(outputs.detach())[0]):
                    grads = torch.autograd.grad(
                        outputs, weights, column.reshape(outputs.shape),
                        retain_graph=True, allow_unused=True,
                    )  # fmt: skip
                    for name, grad in zip(places, grads, strict=True):
                        if grad is not None:
                            traces[name] += float(grad.square().sum())
                            picked = grad.flatten()[places[name]].cpu()
                            blocks[name] += picked[:, None] * picked
    return {name: ExactSample(traces[name], blocks[name]) for name in places}


def _datum(inputs: Any, n: int) -> Any:
    def single(tensor: Tensor) -> Tensor:
        own = tensor[n : n + 1]
        return own.double() if own.is_floating_point() else own

    return map_tensors(single, inputs)


def _root(hessian: Tensor) -> list[Tensor]:
    """Columns ``S`` with ``S S^T`` equal to a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(hessian)
    kept = values > 1e-14 * values[-1].clamp_min(0.0)
    return list((vectors[:, kept] * values[kept].sqrt()).mT)
