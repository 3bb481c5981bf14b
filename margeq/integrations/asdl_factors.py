"""``backend="asdl"``: ASDL runs the exact Fisher's loop over the classes.

Factors of linear layers and 2-D convolutions are ASDL's own; biases of convolutions are exact, and
all other layers have an operation that goes through margeq's rules. Only the exact Fisher is used:
its Monte Carlo with n samples is n times too small.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.curvature.capture import Use, forward
from margeq.integrations.borrowed import Collector, require_version
from margeq.integrations.neighbours import import_neighbour
from margeq.likelihoods import Gaussian, Likelihood

__all__ = ["asdl_factors"]


def asdl_factors(
    model: nn.Module, batch: Batch, likelihood: Likelihood, collector: Collector
) -> None:
    """The factors of one batch.

    Args:
        model: a copy, on which ASDL leaves its results.
        batch: the data.
        likelihood: classification or regression.
        collector: gets the factors.

    Raises:
        ConfigError: if ASDL is not installed, or in a version that is not known.
    """
    require_version("asdfghjkl", "0.1a4")
    import_neighbour("asdl", "asdfghjkl")
    fisher = importlib.import_module("asdl.fisher")
    maker = importlib.import_module("asdl.grad_maker")
    is_regression = isinstance(likelihood, Gaussian)
    config = fisher.FisherConfig(
        fisher_type="fisher_exact",
        loss_type=maker.LOSS_MSE if is_regression else maker.LOSS_CROSS_ENTROPY,
        fisher_shapes=["kron"],
        data_size=1,
    )
    with _reading(model, collector) as readings:
        run = fisher.get_fisher_maker(model, config)
        run.setup_model_call(partial(forward, model), batch.inputs)
        run.forward_and_backward()
        for reading in readings:
            reading.hand_over()


class _Reading:
    """What one call of a layer adds up."""

    def __init__(self, layer: nn.Module, collector: Collector) -> None:
        self.layer, self._collector = layer, collector
        self._use: Use | None = None
        self._native: Any = None
        self._grad_cov: Tensor | float = 0.0
        self._bias_cov: Tensor | float = 0.0
        self._input_cov: Tensor | None = None
        self._n_positions = 1

    def choose(self, native: Any, x: Tensor, y: Tensor) -> None:
        """At the forward: ASDL's own operation, or the rule."""
        self._collector.called(self.layer)
        self._native = native if _is_plain(self.layer, x) else None
        if self._native is None:
            self._use = self._collector.use(self.layer, x, y)
            return
        data = native.preprocess_in_data(self.layer, x, y)
        if isinstance(self.layer, nn.Conv2d):
            self._n_positions = y[0, 0].numel()
        # which ASDL divides by the number of positions
        self._input_cov = native.cov_kron_A(self.layer, data) * self._n_positions

    def add(self, grads: Tensor) -> None:
        """At each backward: one column of the root."""
        if self._use is not None:
            self._collector.add_columns(self._use, [grads])
            return
        rows = self._native.preprocess_out_grads(self.layer, grads)
        self._grad_cov = self._grad_cov + self._native.cov_kron_B(self.layer, rows)
        summed = rows.flatten(2).sum(2) if rows.ndim > 2 else rows
        self._bias_cov = self._bias_cov + summed.mT @ summed

    def hand_over(self) -> None:
        """At the end: the sums."""
        if self._input_cov is None or not isinstance(self._grad_cov, Tensor):
            return
        assert isinstance(self._bias_cov, Tensor)
        collector, n_positions = self._collector, self._n_positions
        layout = "boi" if isinstance(self.layer, nn.Conv2d) else "obi"
        collector.take(self.layer, "weight", self._grad_cov, self._input_cov, n_positions, layout)
        if collector.exact_biases:
            collector.take_bias(self.layer, self._bias_cov, 1)
        else:
            collector.take_bias(self.layer, self._grad_cov, n_positions)


@contextmanager
def _reading(model: nn.Module, collector: Collector) -> Iterator[list[_Reading]]:
    """ASDL's table of layer types, extended to all layers with weights while this is open."""
    core: Any = importlib.import_module("asdl.core")
    operations: Any = importlib.import_module("asdl.operations")
    readings = {
        layer: _Reading(layer, collector) for layer in model.modules() if collector.names(layer)
    }
    before = core.get_op_class, core.module_wise_assignments
    own = _operation(operations, readings)

    def assignments(model: nn.Module, *names: str, map_rule: Any, **_: Any) -> Iterator[Any]:
        # ASDL's own leaves out layers whose parameters are not called weight and bias
        for layer in readings:
            yield layer, [map_rule(name) for name in names]

    try:
        core.get_op_class, core.module_wise_assignments = (lambda _: own), assignments
        yield list(readings.values())
    finally:
        core.get_op_class, core.module_wise_assignments = before


def _operation(operations: Any, readings: dict[nn.Module, _Reading]) -> type:
    native = {nn.Linear: operations.Linear, nn.Conv2d: operations.Conv2d}
    base: Any = operations.Operation

    class Reads(base):
        """Hands inputs and gradients to the reading of its layer."""

        supported_operations = frozenset({operations.OP_COV_KRON})

        @staticmethod
        def preprocess_in_data(module: nn.Module, in_data: Tensor, out_data: Tensor) -> Tensor:
            readings[module].choose(native.get(type(module)), in_data, out_data)
            return in_data

        @staticmethod
        def extend_in_data(in_data: Tensor) -> Tensor:
            return in_data

        @staticmethod
        def preprocess_out_grads(module: nn.Module, out_grads: Tensor) -> Tensor:
            return out_grads

        @staticmethod
        def cov_kron_A(module: nn.Module, in_data: Tensor) -> Tensor:
            return torch.zeros(1, 1, device=in_data.device)

        @staticmethod
        def cov_kron_B(module: nn.Module, out_grads: Tensor) -> Tensor:
            readings[module].add(out_grads)
            return torch.zeros(1, 1, device=out_grads.device)

    return Reads


def _is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether ASDL itself is right about a layer."""
    if type(layer) is nn.Linear:
        return x.ndim == 2
    if type(layer) is not nn.Conv2d:
        return False
    usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return usual and not isinstance(layer.padding, str)
