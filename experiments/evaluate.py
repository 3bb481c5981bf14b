"""Accuracy and negative log-likelihood of a trained network's own (MAP) predictions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """``accuracy`` as a share and ``nll`` in nats per datum; leaves the model's mode alone."""
    training, correct, nll, count = model.training, 0.0, 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    try:
        for inputs, targets in batches:
            outputs = model(inputs.to(device)).cpu()
            correct += float((outputs.argmax(1) == targets).sum())
            nll += float(functional.cross_entropy(outputs.double(), targets, reduction="sum"))
            count += len(targets)
    finally:
        model.train(training)
    return {"accuracy": correct / count, "nll": nll / count}
