"""Passes over the data of the evidence: curvature, and shares of function variance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from margeq.accumulation import CurvatureState, accumulate_with
from margeq.errors import DataError, DataWarning, DeterminismWarning
from margeq.function_share import function_variances, shares
from margeq.halving import Halving
from margeq.likelihoods import Likelihood
from margeq.training.problem import Problem

__all__ = ["Passes"]

_SHARE_DATA = 1024


class Passes:
    """The passes of one run, which are all about the same data.

    Args:
        problem: model and data.
    """

    def __init__(self, problem: Problem) -> None:
        self._p = problem
        self._checksum: int | None = None
        self._n_data: int | None = None
        self._halving = Halving()

    def curvature(self, epoch: int, likelihood: Likelihood) -> CurvatureState:
        """Curvature sums after an epoch, with a warning if they are about other data.

        Returns:
            Sums over the data of the evidence.

        Raises:
            DataError: if the number of data is another one than before.
        """
        p = self._p
        state = accumulate_with(
            p.model,
            p.marglik_loader,
            likelihood,
            p.draws(epoch),
            parameters=p.parameters,
            batch_fn=p.batch_fn,
            cache=p.cache,
            halving=self._halving,
            comm=p.comm,
        )
        if self._n_data not in (None, state.n_data):
            raise DataError(
                f"epoch {epoch}: the loader of the evidence yielded {state.n_data} samples, "
                f"{self._n_data} at the update before; it has to yield the same data in every pass"
            )
        self._n_data = state.n_data
        if self._checksum not in (None, state.checksum):
            warnings.warn(
                "the evidence was computed on other data than at the update before; pass "
                "marglik_loader=... without augmentation and without drop_last",
                DeterminismWarning,
                stacklevel=2,
            )
        if self._checksum is None and state.n_data != p.n_data:
            warnings.warn(
                f"the evidence is that of {state.n_data} data, training uses {p.n_data}; give "
                f"marglik_loader the same data, without augmentation and without drop_last",
                DataWarning,
                stacklevel=2,
            )
        self._checksum = state.checksum
        return state

    def shares(self) -> dict[str, dict[str, float]]:
        """Layer -> path -> share of function variance, on the first data."""
        p = self._p
        batches = self._halving.split(p.batches(p.marglik_loader))
        return shares(function_variances(p.model, batches, _SHARE_DATA, p.comm))

    def state_dict(self) -> dict[str, Any]:
        """What the passes before were about."""
        return {"checksum": self._checksum, "n_data": self._n_data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Expect the same data."""
        self._checksum = state["checksum"]
        self._n_data = state.get("n_data")  # which the first checkpoints did not have
