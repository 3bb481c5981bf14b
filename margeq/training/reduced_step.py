"""The gradient of one step: of a batch, or of the batches of all ranks together.

Each rank brings its next batch, or nothing when it has no more; the pass goes on until no rank has
one. One message of sums per step,

    [number of data, failed, flagged, loss, has a gradient (per tensor), gradients]

where loss and gradients are those of the *sum* over a rank's data. Divided by the number of data of
the step they are those of one process with the joined batch, however the data are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.comm import Comm, agree
from margeq.layers import redraw

__all__ = ["Gradients", "OwnGradients", "SharedGradients", "Step", "never"]

LossOf = Callable[[Batch], Tensor]
"""Mean loss of a batch, differentiable."""


def never() -> bool:
    """A flag that nobody sets."""
    return False


@dataclass(frozen=True)
class Step:
    """What a step is about, once its gradients are there.

    Attributes:
        loss: sum of the losses of its data.
        n_data: number of its data.
        n_batches: of this process, taken from its loader; ``None`` for no further one.
        is_flagged: whether the flag is set, on some rank, at this step: the same on all ranks.
    """

    loss: Tensor
    n_data: int
    n_batches: int | None = None
    is_flagged: bool = False


class Gradients(Protocol):
    """Puts the gradients of one step after the other into the parameters."""

    def steps(
        self, batches: Iterable[Batch], loss_of: LossOf, name: str, first: int = 0
    ) -> Iterator[Step]:
        """One pass over the data, a step at a time.

        Args:
            batches: of this process.
            loss_of: mean loss of a batch.
            name: of the pass, the same on all ranks.
            first: number of the first step; ranks draw what they share by its number.
        """
        ...


class OwnGradients:
    """Those of the batches of one process.

    Args:
        model: whose random elements are drawn anew for each batch.
        parameters: with gradients.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters)

    def steps(
        self, batches: Iterable[Batch], loss_of: LossOf, name: str, first: int = 0
    ) -> Iterator[Step]:
        """One step per batch."""
        for batch in batches:
            _forget(self._parameters)
            redraw(self._model)
            loss = loss_of(batch)
            loss.backward()
            total = loss.detach() * len(batch)
            yield Step(total, len(batch), batch.index + 1)


class SharedGradients:
    """Those of the batches of all ranks, the same on each of them.

    Args:
        model: whose random elements are drawn anew for each step, alike on all ranks.
        parameters: with gradients, in the same order on all ranks.
        comm: the ranks.
        flag: something that steps report, if it is set on any rank.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        comm: Comm,
        flag: Callable[[], bool] = never,
    ) -> None:
        self._model, self._parameters = model, list(parameters)
        self._comm, self._flag = comm, flag
        # sums of half precision would lose what single ranks bring
        dtypes = (parameter.dtype for parameter in self._parameters)
        self._dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self._sizes = [parameter.numel() for parameter in self._parameters]

    def steps(
        self, batches: Iterable[Batch], loss_of: LossOf, name: str, first: int = 0
    ) -> Iterator[Step]:
        """Steps until no rank has a batch left; an error of one rank is raised on all."""
        own, number = iter(batches), first
        while True:
            generator = torch.Generator().manual_seed(crc32(f"{name}:{number}".encode()))
            _forget(self._parameters)
            redraw(self._model, generator)  # of single data, whichever rank has them
            step = self._step(own, loss_of)
            if step is None:
                return
            yield step
            number += 1

    def _step(self, own: Iterator[Batch], loss_of: LossOf) -> Step | None:
        loss, n_data, n_batches, error = torch.zeros(()), 0, None, None
        try:
            batch = next(own, None)
            if batch is not None:
                n_data, n_batches = len(batch), batch.index + 1
                total = loss_of(batch) * n_data
                total.backward()
                loss = total.detach()
        except Exception as found:
            error = found
        message = self._message([n_data, error is not None, self._flag()], loss)
        (sums,) = self._comm.sum([message])
        head, gradients = sums.split([len(message) - sum(self._sizes), sum(self._sizes)])
        n_data, n_failed, n_flags, _, *brought = head.tolist()
        if n_failed:
            agree(self._comm, error)
        if not n_data:
            return None
        self._put(gradients / n_data, [n > 0 for n in brought])
        return Step(head[3], int(n_data), n_batches, n_flags > 0)

    def _message(self, numbers: Sequence[float], loss: Tensor) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters]
        has_gradient = [gradient is not None for gradient in gradients]
        device = self._parameters[0].device
        head = torch.tensor([*numbers, 0, *has_gradient], dtype=self._dtype).to(device)
        head[3] = loss.to(device)
        parts = [
            head.new_zeros(size) if gradient is None else gradient.to_dense().flatten().to(head)
            for gradient, size in zip(gradients, self._sizes, strict=True)
        ]
        return torch.cat([head, *parts])

    def _put(self, means: Tensor, brought: Sequence[bool]) -> None:
        parts = zip(self._parameters, means.split(self._sizes), brought, strict=True)
        for parameter, mean, is_there in parts:
            # as in one process, whose optimizer passes over tensors without gradient
            parameter.grad = mean.view(parameter.shape).to(parameter) if is_there else None


def _forget(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
