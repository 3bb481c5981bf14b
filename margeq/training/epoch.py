"""One pass of MAP steps over the training data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from margeq.batches import Batch, read_batches
from margeq.curvature.capture import forward
from margeq.errors import ConfigError, DataError, NonFiniteError
from margeq.layers import redraw
from margeq.likelihoods import Likelihood
from margeq.training.bookmark import Bookmark
from margeq.training.normalisation import HeldNorms
from margeq.training.problem import Problem
from margeq.training.proximal import ProximalSteps

__all__ = ["MapEpoch"]


class MapEpoch:
    """MAP steps, a batch at a time; the prior is that of the moment an epoch begins.

    Args:
        problem: model and data.
        steps: of the weights.
        norms: held after every step.
        scheduler: of the learning rate, if any.
        bookmark: where the pass over the training data stands.
    """

    def __init__(
        self,
        problem: Problem,
        steps: ProximalSteps,
        norms: HeldNorms,
        scheduler: Any,
        bookmark: Bookmark,
    ) -> None:
        self._p, self._steps, self._norms, self._scheduler = problem, steps, norms, scheduler
        self._bookmark = bookmark

    def run(self, epoch: int, likelihood: Likelihood, precisions: Mapping[str, float]) -> float:
        """One pass over the training data, or what is left of one.

        Args:
            epoch: its number, for messages.
            likelihood: noise and temperature of this epoch.
            precisions: of the prior, by weight name.

        Returns:
            The mean loss per datum.

        Raises:
            ConfigError: for a model whose output depends on no trainable weight.
            DataError: for batches that cannot be used, or another number of data than before.
            NonFiniteError: for a loss that is NaN or infinite.
        """
        model = self._p.model
        if not model.training:
            model.train()
        mark, device = self._bookmark, self._p.device
        total, seen, done = mark.total(device), mark.seen, mark.batches
        batches = read_batches(
            mark.rest(), device, self._p.batch_fn, least=0 if done else 1, first=done
        )
        for batch in batches:
            loss = self._step(batch, likelihood, precisions)
            total, seen = total + loss * len(batch), seen + len(batch)
            mark.note(batch.index + 1, seen, total)
        mark.close()
        self._check(epoch, total, seen)
        return float(total) / seen

    def _step(
        self, batch: Batch, likelihood: Likelihood, precisions: Mapping[str, float]
    ) -> Tensor:
        self._steps.optimizer.zero_grad(set_to_none=True)
        redraw(self._p.model)
        outputs = forward(self._p.model, batch.inputs)
        targets = likelihood.check_targets(outputs, batch.targets)
        loss = likelihood.loss(outputs, targets)
        if not loss.requires_grad:
            raise ConfigError("the model's output does not depend on any trainable weight")
        loss.backward()
        self._steps.step(precisions)
        self._norms.project()
        if self._scheduler is not None:
            self._scheduler.step()
        return loss.detach()

    def _check(self, epoch: int, total: Tensor, seen: int) -> None:
        if seen != self._p.n_data:
            raise DataError(
                f"epoch {epoch}: the training loader yielded {seen} samples, {self._p.n_data} in "
                f"the first pass; it has to yield the same number in every pass"
            )
        if not math.isfinite(float(total)):
            raise NonFiniteError(
                f"epoch {epoch}: the training loss is {float(total)}; lower the learning rate "
                f"(optimizer_kwargs={{'lr': ...}})"
            )
