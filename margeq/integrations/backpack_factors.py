"""``backend="backpack"``: BackPACK backpropagates the root of the output Hessian.

Factors of linear layers are BackPACK's own. Those of convolutions are corrected: BackPACK forms
products of sums over positions and leaves out the division by their number. All other layers have
an extension that goes through margeq's rules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch
from margeq.errors import UnsupportedLayerError
from margeq.integrations.borrowed import Collector, require_version
from margeq.integrations.neighbours import import_neighbour
from margeq.likelihoods import Gaussian, Likelihood

__all__ = ["backpack_factors"]


def backpack_factors(
    model: nn.Module, batch: Batch, likelihood: Likelihood, collector: Collector
) -> None:
    """The factors of one batch.

    Args:
        model: a copy, which BackPACK extends; a tree of modules that call each other only.
        batch: with a tensor as input.
        likelihood: classification or regression.
        collector: gets the factors.

    Raises:
        ConfigError: if BackPACK is not installed, or in a version that is not known.
        UnsupportedLayerError: for inputs that are no tensor.
    """
    require_version("backpack-for-pytorch", "1.7")
    backpack = import_neighbour("backpack", "backpack-for-pytorch")
    if not isinstance(batch.inputs, Tensor):
        raise UnsupportedLayerError("backend='backpack' reads models of one input tensor only")
    is_regression = isinstance(likelihood, Gaussian)
    kind = nn.MSELoss if is_regression else nn.CrossEntropyLoss
    loss = backpack.extend(kind(reduction="sum"))
    # the squared error has twice the unit Hessian
    scale = 0.5 if is_regression else 1.0
    extension = importlib.import_module("backpack.extensions").KFLR()
    _extend(model, backpack, extension, partial(_reader_class(), collector=collector, scale=scale))
    for layer in model.modules():
        if collector.names(layer):
            layer.register_forward_hook(lambda called, *_: collector.called(called))
    outputs = model(batch.inputs)
    value = loss(outputs, likelihood.check_targets(outputs.detach(), batch.targets))
    with backpack.backpack(extension):
        value.backward()


def _extend(
    layer: nn.Module, backpack: ModuleType, extension: Any, reader: Callable[[type], Any]
) -> None:
    """Hook the layers that compute something; what holds other layers only passes data on."""
    has_weights = bool(list(layer.parameters(recurse=False)))
    if not has_weights and list(layer.children()):
        for child in layer.children():
            _extend(child, backpack, extension, reader)
        return
    # BackPACK has extensions of its own for layers without weights
    with suppress(*() if has_weights else (ValueError,)):
        extension.set_module_extension(type(layer), reader(type(layer)), overwrite=has_weights)
    layer.register_forward_hook(backpack.hook_store_io)
    layer.register_full_backward_hook(backpack.hook_run_extensions)


@lru_cache
def _reader_class() -> type:
    """The extension of all layers with weights; BackPACK is imported by now."""
    base: Any = importlib.import_module("backpack.extensions.module_extension").ModuleExtension
    hbp = importlib.import_module("backpack.extensions.secondorder.hbp")
    native: dict[type, Any] = {
        nn.Linear: hbp.linear.HBPLinear,
        nn.Conv1d: hbp.conv1d.HBPConv1d,
        nn.Conv2d: hbp.conv2d.HBPConv2d,
        nn.Conv3d: hbp.conv3d.HBPConv3d,
    }

    class Reader(base):
        """Hands what reaches a layer's output to the collector, and passes it on."""

        def __init__(self, kind: type[nn.Module], collector: Collector, scale: float) -> None:
            self._collector, self._scale = collector, scale
            self._native: Any = native[kind]() if kind in native else None
            super().__init__(params=[])

        def check_hyperparameters_module_extension(
            self, ext: Any, module: Any, g_inp: Any, g_out: Any
        ) -> None:
            columns = ext.saved_quantities.retrieve_quantity(module.output.data_ptr(), False)
            names = self._collector.names(module)
            if columns is None or not names:
                return
            if self._native is not None and _is_plain(module):
                self._take(ext, module, columns)
            else:
                use = self._collector.use(module, module.input0, module.output)
                self._collector.add_columns(use, list(columns * self._scale**0.5))

        def _take(self, ext: Any, module: Any, columns: Tensor) -> None:
            n_data, collector = columns.shape[1], self._collector
            # BackPACK's own product of the inputs, of their mean over the data
            input_cov = self._native._factors_from_input(ext, module)[0] * n_data
            rows = columns.flatten(3) if columns.ndim > 3 else columns[..., None]
            by_position = torch.einsum("vnot,vnpt->op", rows, rows) * self._scale
            n_positions = rows.shape[-1]
            layout = "obi" if isinstance(module, nn.Linear) else "boi"
            collector.take(module, "weight", by_position, input_cov, n_positions, layout)
            if module.bias is not None and collector.exact_biases:
                # what BackPACK takes for the gradients of a convolution's weight, too
                exact = self._native._factor_from_sqrt(
                    *((columns,) if isinstance(module, nn.Linear) else (module, columns))
                )
                exact = exact[0] if isinstance(exact, list) else exact
                collector.take_bias(module, exact * self._scale, 1)
            elif module.bias is not None:
                collector.take_bias(module, by_position, n_positions)

        def backpropagate(
            self, ext: Any, module: Any, g_inp: Any, g_out: Any, columns: Tensor
        ) -> Tensor:
            if self._native is not None and _is_plain(module):
                return self._native.backpropagate(ext, module, g_inp, g_out, columns)
            with torch.enable_grad():
                x = module.input0.detach().requires_grad_()
                y = module.forward(x.clone())
                return torch.stack([
                    torch.autograd.grad(y, x, column.reshape_as(y), retain_graph=True)[0]
                    for column in columns
                ])  # fmt: skip

    return Reader


def _is_plain(module: Any) -> bool:
    """Whether BackPACK itself is right about a layer, up to its scale."""
    if isinstance(module, nn.Linear):
        return bool(module.input0.ndim == 2)
    usual = module.groups == 1 and module.padding_mode == "zeros"
    return bool(usual and not isinstance(module.padding, str))
