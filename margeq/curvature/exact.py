"""Dense generalised Gauss-Newton matrix of small models: the oracle of every approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from margeq.curvature.capture import eval_mode, forward
from margeq.parameters import named_weights, unwrapped

__all__ = ["OutputHessian", "ggn"]


class OutputHessian(Protocol):
    """What the oracle needs to know of a likelihood."""

    def hessian(self, outputs: Tensor) -> Tensor:
        """``-d2 log p / df2`` without noise and temperature, ``[n, K, K]``."""
        ...


def ggn(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: OutputHessian,
    *,
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Tensor:
    """``sum_n J_n^T Lambda_n J_n`` over all weights, from autograd Jacobians.

    Rows follow ``named_weights(model)``, each weight row-major in its own layout. Noise and
    temperature are left out, as in :class:`margeq.curvature.kron.BlockKron`.

    Args:
        model: any module tree; needs no rules.
        loader: batches ``(x, y)``.
        likelihood: gives the output Hessian.
        batch_fn: turns a batch into ``(inputs, targets)``.

    Returns:
        ``[P_total, P_total]``; memory and time grow with the square of the parameter count.
    """
    model = unwrapped(model)
    weights = list(named_weights(model).values())
    total = sum(weight.numel() for weight in weights)
    matrix = torch.zeros(total, total, dtype=weights[0].dtype, device=weights[0].device)
    with eval_mode(model), torch.enable_grad():
        for batch in loader:
            inputs, _ = batch if batch_fn is None else batch_fn(batch)
            outputs = forward(model, inputs).flatten(1)
            jacobian = _jacobian(outputs, weights)
            hessian = likelihood.hessian(outputs.detach())
            matrix += torch.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian)
    return matrix


def _jacobian(outputs: Tensor, weights: list[nn.Parameter]) -> Tensor:
    rows = []
    for output in outputs.flatten():
        grads = torch.autograd.grad(output, weights, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(weight).flatten() if grad is None else grad.flatten()
                    for grad, weight in zip(grads, weights, strict=True)
                ]
            )
        )
    return torch.stack(rows).reshape(*outputs.shape, -1)
