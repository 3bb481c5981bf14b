"""Curvature factors that another library backpropagates, in margeq's form.

What the libraries get wrong is put right (scale of convolutions) or refused (Monte Carlo, layers
that they leave out); each pass compares them with margeq's own on its first two data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from margeq.batches import Batch, map_tensors
from margeq.curvature.capture import Cut, Use, backpropagate, eval_mode, run_recorded
from margeq.curvature.factors import FactorSums
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.io import Layout, rule_for
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, MargeqError, MissingRuleError, UnsupportedLayerError
from margeq.likelihoods import Likelihood
from margeq.linalg import accumulation_dtype
from margeq.parameters import named_weights

__all__ = ["BorrowedSums", "Collector", "Library", "require_version"]

_TOLERANCE = 1e-2
"""Relative difference to margeq's own factors; BackPACK loses digits of confident predictions."""


class Library(Protocol):
    """What another library does with one batch."""

    def __call__(
        self, model: nn.Module, batch: Batch, likelihood: Likelihood, collector: Collector, /
    ) -> None:
        """Hand the factors of every weight to the collector."""
        ...


class Collector:
    """Takes the factors of one batch, as a library forms them or through margeq's rules.

    Args:
        model: the library's copy of the model.
        weights: its weights, by name.
        options: of the pass.
        n_data: number of data in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        options: KfacOptions,
        n_data: int,
    ) -> None:
        self._options, self._n_data, self._weights = options, n_data, weights
        self._by_rule = FactorSums(weights, options)
        self._native: dict[str, BlockKron] = {}
        self._seen: set[str] = set()
        self._called: set[nn.Module] = set()
        name_of = {id(weight): name for name, weight in weights.items()}
        self._names = {
            layer: {
                local: name_of[id(parameter)]
                for local, parameter in layer.named_parameters(recurse=False)
                if id(parameter) in name_of
            }
            for layer in model.modules()
        }
        self._prefixes = {layer: prefix for prefix, layer in model.named_modules()}
        self._require_layers()

    @property
    def exact_biases(self) -> bool:
        """Whether gradients of a bias are summed over positions first."""
        return self._options.bias_approx == "exact"

    def names(self, layer: nn.Module) -> Mapping[str, str]:
        """Local name -> name of the layer's weights."""
        return self._names.get(layer, {})

    def label(self, layer: nn.Module) -> str:
        """The layer, for messages."""
        return f"{self._prefixes.get(layer) or 'the model itself'} ({type(layer).__name__})"

    def take(
        self, layer: nn.Module, local: str, grad_cov: Tensor, input_cov: Tensor, n_positions: int,
        layout: Layout = "boi",
    ) -> None:  # fmt: skip
        """Sums over a batch, ``[o, o]`` and ``[i, i]``, of one weight of a layer."""
        name = self.names(layer).get(local)
        if name is None:
            return
        self._seen.add(name)
        wide = accumulation_dtype(grad_cov.device)
        n_shared = torch.tensor(float(self._n_data * n_positions), dtype=wide)
        self._native[name] = BlockKron(
            grad_cov.detach().to(wide)[None], input_cov.detach().to(wide)[None],
            n_shared.to(grad_cov.device), layout, torch.finfo(grad_cov.dtype).eps,
        )  # fmt: skip

    def take_bias(self, layer: nn.Module, grad_cov: Tensor, n_positions: int) -> None:
        """The gradients of a bias, whose inputs are ones."""
        ones = grad_cov.new_full((1, 1), float(self._n_data * n_positions))
        self.take(layer, "bias", grad_cov, ones, n_positions, "obi")

    def use(self, layer: nn.Module, x: Tensor, y: Tensor) -> Use:
        """A call of a layer that has a curvature rule; its inputs are added."""
        rule = rule_for(type(layer))
        assert rule is not None
        names = self.names(layer)
        self._seen.update(names.values())
        use = Use(
            self._prefixes[layer], layer, rule, names, x.detach(), y, None, Cut(), layer, None
        )
        self._by_rule.add_inputs([use], None, torch.zeros(self._n_data, dtype=torch.long))
        return use

    def add_columns(self, use: Use, columns: Sequence[Tensor]) -> None:
        """Add gradients of the output of a call, one tensor per column of the root."""
        for column in columns:
            self._by_rule.add_gradients([use], [column.detach()])

    def finish(self) -> dict[str, BlockKron]:
        """The factors of all weights.

        Returns:
            Weight name -> its sums over the batch.

        Raises:
            MissingRuleError: naming those that the library has left out.
        """
        left_out = sorted(self._weights.keys() - self._seen)
        if left_out:
            raise MissingRuleError(
                f"the back-end gives no curvature for {', '.join(left_out)}; use backend='margeq', "
                f"freeze them (requires_grad_(False)) or exclude them with parameters=[...]"
            )
        blocks = {**self._by_rule.finish(0).blocks, **self._native}
        return {name: blocks[name] for name in self._weights}  # pyright: ignore[reportReturnType]

    def called(self, layer: nn.Module) -> None:
        """Note a call of a layer.

        Raises:
            UnsupportedLayerError: for the second one.
        """
        if layer in self._called:
            raise UnsupportedLayerError(
                f"{self.label(layer)} is called several times, which "
                f"backend={self._options.backend!r} cannot add up; use backend='margeq'"
            )
        self._called.add(layer)

    def _require_layers(self) -> None:
        for layer, names in self._names.items():
            rule = rule_for(type(layer))
            if names and (rule is None or rule.listen is not None):
                raise MissingRuleError(
                    f"{self.label(layer)} is no layer that backend={self._options.backend!r} "
                    f"knows; use backend='margeq', freeze it (requires_grad_(False)) or exclude it "
                    f"with parameters=[...]"
                )


class BorrowedSums:
    """Factors as plain sums over batches, from another library.

    Args:
        model: in evaluation mode; the library gets a copy, because it leaves hooks behind.
        weights: by name.
        likelihood: its root.
        options: of the pass.
        library: what to borrow from.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        options: KfacOptions,
        library: Library,
    ) -> None:
        self._model, self._weights = model, weights
        self._likelihood, self._options, self._library = likelihood, options, library
        self._total: BlockCurvature | None = None

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Nothing to add: the library reads whole batches."""

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Nothing to add: the library reads whole batches."""

    def add_batch(self, batch: Batch) -> None:
        """Add the factors of a batch.

        Raises:
            UnsupportedLayerError: for a model that the library cannot read, or reads wrongly.
        """
        if self._total is None:
            self._compare(_first_two(batch))
        found = self._borrowed(batch)
        self._total = found if self._total is None else self._total + found

    def forget_gradients(self) -> None:
        """Begin anew."""
        self._total = None

    def finish(self, checksum: int) -> BlockCurvature:
        """The factors of every weight."""
        if self._total is None:  # no data
            return FactorSums(self._weights, self._options).finish(checksum)
        return self._total

    def _borrowed(self, batch: Batch) -> BlockCurvature:
        twin = deepcopy(self._model).eval()
        for layer in twin.modules():
            if getattr(layer, "inplace", False) is True:
                setattr(layer, "inplace", False)  # noqa: B010  hooks of the libraries cannot be beside it
        own = named_weights(twin)
        weights = {name: own[name] for name in self._weights}
        collector = Collector(twin, weights, self._options, len(batch))
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")  # of hooks that the libraries register
                self._library(twin, batch, self._likelihood, collector)
        except MargeqError:
            raise
        except Exception as error:  # whatever another library raises
            raise UnsupportedLayerError(
                f"backend={self._options.backend!r} cannot read this model "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                f"use backend='margeq'"
            ) from error
        return BlockCurvature(collector.finish())

    def _compare(self, batch: Batch) -> None:
        """Against margeq's own factors: a silent error of the library must not pass."""
        own = self._own(batch)
        for name, block in self._borrowed(batch).blocks.items():
            assert isinstance(block, BlockKron)
            expected = own.blocks[name]
            assert isinstance(expected, BlockKron)
            for one, other in zip(_traces(block), _traces(expected), strict=True):
                if abs(one - other) > _TOLERANCE * abs(other) + 1e-30:
                    raise UnsupportedLayerError(
                        f"backend={self._options.backend!r} gives {name!r} factors with trace "
                        f"{one:.6g} instead of {other:.6g}: it does not see how the model uses it; "
                        f"use backend='margeq'"
                    )

    def _own(self, batch: Batch) -> BlockCurvature:
        sums = FactorSums(self._weights, replace(self._options, backend="margeq"))
        with eval_mode(self._model), torch.enable_grad():
            outputs, uses = run_recorded(self._model, self._weights, batch.inputs)
            sums.add_inputs(uses, None, torch.zeros(len(batch), dtype=torch.long))
            root = self._likelihood.root(outputs.detach())
            everyone = torch.arange(len(batch), device=outputs.device)
            for v in range(root.n_columns):
                column = root.columns(everyone, torch.full_like(everyone, v))
                sums.add_gradients(uses, backpropagate(outputs, uses, column.reshape_as(outputs)))
        return sums.finish(0)


def require_version(package: str, *accepted: str) -> None:
    """Check that a library has a version whose inner workings are known.

    Raises:
        ConfigError: naming the version that is installed, and those that are known.
    """
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise ConfigError(f"{package} is not installed; pip install {package}") from error
    if not any(installed == known or installed.startswith(f"{known}.") for known in accepted):
        raise ConfigError(
            f"{package} {installed} is installed; its factors are known for {', '.join(accepted)} "
            f"only. Install that, or use backend='margeq'"
        )


def _first_two(batch: Batch) -> Batch:
    return Batch(batch.index, map_tensors(lambda t: t[:2], batch.inputs), batch.targets[:2])


def _traces(block: BlockKron) -> tuple[float, float]:
    """Of both factors, per shared position and over all blocks."""
    count = max(float(block.n_shared), 1.0)
    inputs = block.input_cov.diagonal(dim1=1, dim2=2).sum() / count
    return float(block.grad_cov.diagonal(dim1=1, dim2=2).sum()), float(inputs)
