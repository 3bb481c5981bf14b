"""One pass of MAP steps over the training data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from margeq.batches import Batch
from margeq.curvature.capture import forward
from margeq.errors import ConfigError, DataError, NonFiniteError
from margeq.likelihoods import Likelihood
from margeq.training.bookmark import Bookmark
from margeq.training.normalisation import HeldNorms
from margeq.training.problem import Problem
from margeq.training.proximal import ProximalSteps
from margeq.training.reduced_step import Gradients, OwnGradients, SharedGradients

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
        self._gradients = self._of_all_ranks()

    def _of_all_ranks(self) -> Gradients:
        groups, model = self._steps.optimizer.param_groups, self._p.model
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self._p.comm.size == 1:
            return OwnGradients(model, parameters)
        return SharedGradients(model, parameters, self._p.comm, self._bookmark.is_needed)

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
        mark = self._bookmark
        total, seen = mark.total(self._p.device), mark.seen
        batches = self._p.batches(mark.rest(), first=mark.batches)
        loss_of, name = partial(self._loss, likelihood), f"{self._p.seed}:{epoch}"
        for step in self._gradients.steps(batches, loss_of, name, mark.steps):
            self._step(precisions)
            total, seen = total + step.loss, seen + step.n_data
            mark.note(step.n_batches, seen, total)
            # ranks have to agree, and do so with the exchange of a step
            if mark.is_needed() if self._p.comm.size == 1 else step.is_flagged:
                mark.save_or_stop()
        mark.close()
        self._check(epoch, total, seen)
        return float(total) / seen

    def _loss(self, likelihood: Likelihood, batch: Batch) -> Tensor:
        outputs = forward(self._p.model, batch.inputs)
        targets = likelihood.check_targets(outputs, batch.targets)
        loss = likelihood.loss(outputs, targets)
        if not loss.requires_grad:
            raise ConfigError("the model's output does not depend on any trainable weight")
        return loss

    def _step(self, precisions: Mapping[str, float]) -> None:
        self._steps.step(precisions)
        self._norms.project()
        if self._scheduler is not None:
            self._scheduler.step()

    def _check(self, epoch: int, total: Tensor, seen: int) -> None:
        if seen != self._p.n_data:
            raise DataError(
                f"epoch {epoch}: the training loader yielded {seen} samples, {self._p.n_data} in "
                f"the first pass; it has to yield the same number in every pass"
            )
        if not math.isfinite(float(total)):
            half = any(w.dtype == torch.float16 for w in self._p.weights.values())
            further = (
                ", or give Adam an eps that float16 can tell from zero ({'eps': 1e-4}), or use "
                "bfloat16"
            )
            raise NonFiniteError(
                f"epoch {epoch}: the training loss is {float(total)}; lower the learning rate "
                f"(optimizer_kwargs={{'lr': ...}}){further * half}"
            )
