"""A look at data that nothing was tuned on, for the last line of a report."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from margeq.batches import read_batches
from margeq.curvature.capture import eval_mode, forward
from margeq.errors import DataError
from margeq.runs.tasks import Task

__all__ = ["accuracy", "held_out_score"]


def held_out_score(task: Task, likelihood: str) -> dict[str, float] | None:
    """Share of right answers for classification, root mean square error for regression.

    Args:
        task: with its trained model.
        likelihood: ``"classification"``, or one of regression.

    Returns:
        The score by its name; ``None`` if nothing is held out.
    """
    if task.held_out is None:
        return None
    if likelihood == "classification":
        return {"accuracy": accuracy(task)}
    return {"rmse": _rmse(task)}


def accuracy(task: Task) -> float:
    """Share of the held-out data whose class has the largest output."""
    right = torch.cat([outputs.argmax(1) == targets for outputs, targets in _predictions(task)])
    return float(right.double().mean())


def _rmse(task: Task) -> float:
    squares = []
    for outputs, targets in _predictions(task):
        if outputs.shape != targets.shape:
            raise DataError(
                f"held-out targets are {tuple(targets.shape)}, but the model returns "
                f"{tuple(outputs.shape)}"
            )
        squares.append((outputs - targets).double().square().flatten())
    return float(torch.cat(squares).mean().sqrt())


@torch.no_grad()
def _predictions(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(task.model.parameters()).device
    for batch in read_batches(task.held_out or [], device, task.batch_fn):
        with eval_mode(task.model):
            outputs = forward(task.model, batch.inputs)
        yield outputs, batch.targets
