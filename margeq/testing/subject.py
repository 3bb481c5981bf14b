"""One layer under test, and how a contract that it breaks is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from margeq.accumulation import CurvatureState, accumulate
from margeq.curvature.capture import Use, eval_mode, run_recorded
from margeq.errors import MargeqError
from margeq.parameters import named_weights

__all__ = [
    "TOLERANCE",
    "BrokenError",
    "ContractError",
    "LayerCase",
    "Subject",
    "require",
    "require_close",
]

TOLERANCE = 1e-10
_N_CLASSES = 4


class ContractError(MargeqError, AssertionError):
    """A layer type breaks a contract; names the layer, the contract and the difference."""


@dataclass(frozen=True)
class LayerCase:
    """One configuration of a layer type, small enough for a dense curvature matrix.

    Attributes:
        name: for messages and test ids.
        make: builds the layer.
        input_shape: shape of an example input, the data axis (at least 2 data) included.
        shared: weights that one datum uses at several positions, by local name. The curvature
            of every other weight has to be exact for a single datum; biases always.
        linear: whether the layer is linear in its input, up to its biases.
    """

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    shared: tuple[str, ...] = ()
    linear: bool = True


class WithHead(nn.Module):
    """The layer under a fixed non-linear head with softmax outputs."""

    def __init__(self, layer: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.projection = nn.Buffer(projection)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).flatten(1) @ self.projection


class Subject:
    """The layer of a case in float64, with random weights, inputs and a head."""

    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layer = case.make().double()
        for parameter in self.layer.parameters():
            parameter.data = self.random(*parameter.shape)
        self.x = self.random(*case.input_shape)

    def random(self, *shape: int) -> Tensor:
        """Standard normals, the same in every run."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    @contextmanager
    def contract(self, title: str) -> Iterator[None]:
        """Turn any failure inside into a ContractError that names layer and contract."""
        kind = type(self.layer).__name__
        label = kind if self.case.name == kind else f"{self.case.name} ({kind})"
        title = title.rstrip(".")
        try:
            yield
        except BrokenError as error:
            raise ContractError(f"{label} breaks the contract {title!r}: {error}") from None
        except Exception as error:
            message = f"{label} breaks the contract {title!r}: {type(error).__name__}: {error}"
            raise ContractError(message) from error

    def uses(self, x: Tensor) -> tuple[Tensor, list[Use]]:
        """One recorded forward of the layer alone."""
        with eval_mode(self.layer):
            return run_recorded(self.layer, named_weights(self.layer), x)

    def with_head(self) -> WithHead:
        """A classifier on the layer."""
        features = self.layer(self.x[:1]).numel()
        return WithHead(self.layer, self.random(features, _N_CLASSES) / features**0.5)

    def batches(self, n_data: int) -> list[tuple[Tensor, Tensor]]:
        """The first data, with labels."""
        return [(self.x[:n_data], torch.zeros(n_data, dtype=torch.long))]

    def state(self, model: nn.Module, n_data: int) -> CurvatureState:
        """Curvature over the first data."""
        return accumulate(model, self.batches(n_data), "classification")


class BrokenError(Exception):
    """What differs, without the name of the layer."""


def require(condition: bool, message: str) -> None:
    """Break off with a message unless a condition holds."""
    if not condition:
        raise BrokenError(message)


def require_close(what: str, found: Tensor, expected: Tensor, tol: float = TOLERANCE) -> None:
    """Break off unless two tensors agree, relative to the size of the second."""
    require(
        found.shape == expected.shape,
        f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}",
    )
    difference = float((found - expected).detach().norm())
    scale = float(expected.detach().norm())
    close = difference <= tol * scale + 1e-12
    require(close, f"{what} differs by {difference:.2g}, its size is {scale:.2g}")
