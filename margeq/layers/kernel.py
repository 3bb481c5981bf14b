"""Filters that are functions of the relative group element, given by a small network.

    psi[o, i](z) = sum_b weight[o, i, b] s_b(z),   sum_b s_b(z)^2 = 1

The features ``s`` are the hidden layers of the network, whose weights and frequency the evidence
moves; its last layer is the weight of the convolution. Whatever the hidden layers are, weights of
unit variance give filters of unit variance, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from margeq.bases import grid
from margeq.counts import is_count
from margeq.errors import ConfigError
from margeq.layers.samples import GroupSamples

__all__ = ["ImplicitKernel", "canonical_positions", "disk", "relative_elements"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "siren": torch.sin,
    "relu": torch.relu,
    "leaky-relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "swish": nn.functional.silu,
}


class ImplicitKernel(nn.Module):
    """Hidden layers of a filter that is a function of coordinates, as normalised features.

        h = act(W2 act(W1 z + b1) + b2),   s = [h, 1] / sqrt(|h|^2 + 1)

    With ``"siren"``, ``act(a) = sin(omega_0 a)``. The constant feature is the last layer's bias; it
    also keeps the division harmless where all others vanish. Phases start uniformly, so that no
    place is special: without them sines are odd, and filters vanish at the centre.

    All parameters are hyperparameters: the evidence moves them, the training loss never does.

    Args:
        n_coordinates: length of ``z``, each from -1 to 1.
        nonlinearity: ``"siren"``, ``"relu"``, ``"leaky-relu"`` or ``"swish"``.
        omega_0: initial frequency of ``"siren"``; for the others it has no meaning.
        hidden: width of both hidden layers.

    Shapes:
        ``[..., n_coordinates] -> [..., hidden + 1]``.

    Raises:
        ConfigError: for an argument out of range.

    Reference:
        Romero & Lohit 2022; Sitzmann et al. 2020.

    Example:
        >>> features = ImplicitKernel(2)(torch.zeros(5, 2))
        >>> features.shape, bool(features.square().sum(-1).allclose(torch.ones(5)))
        (torch.Size([5, 33]), True)
    """

    hyperparameter_names: ClassVar[tuple[str, ...]] = (
        "log_omega_0", "weight_1", "bias_1", "weight_2", "bias_2",
    )  # fmt: skip

    def __init__(
        self,
        n_coordinates: int,
        *,
        nonlinearity: str = "siren",
        omega_0: float = 10.0,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        if nonlinearity not in _ACTIVATIONS:
            raise ConfigError(f"nonlinearity={nonlinearity!r}: use one of {tuple(_ACTIVATIONS)}")
        if not isinstance(omega_0, Real) or not 0.0 < omega_0 < math.inf:
            raise ConfigError(f"omega_0={omega_0!r}: use a positive number")
        for name, value in (("n_coordinates", n_coordinates), ("hidden", hidden)):
            if not is_count(value):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        self.nonlinearity, self.n_coordinates, self.hidden = nonlinearity, n_coordinates, hidden
        self.log_omega_0 = None
        if nonlinearity == "siren":
            self.log_omega_0 = nn.Parameter(torch.tensor(math.log(omega_0)))
        self.weight_1 = nn.Parameter(torch.empty(hidden, n_coordinates))
        self.bias_1 = nn.Parameter(torch.empty(hidden))
        self.weight_2 = nn.Parameter(torch.empty(hidden, hidden))
        self.bias_2 = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    @property
    def n_features(self) -> int:
        """Number of features, the constant included."""
        return self.hidden + 1

    @property
    def omega_0(self) -> Tensor | None:
        """Present frequency, of ``"siren"``."""
        return None if self.log_omega_0 is None else self.log_omega_0.exp()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of Sitzmann et al. 2020 and uniform phases; for the others, He's."""
        first, second = 1.0 / self.n_coordinates, math.sqrt(6.0 / self.hidden)
        shift = 1.0
        if self.omega_0 is None:  # the same variance as a normal distribution of gain 2
            first = math.sqrt(6.0 / self.n_coordinates)
        elif not self.weight_1.is_meta:
            omega_0 = float(self.omega_0)
            second, shift = second / omega_0, math.pi / omega_0
        for tensor, bound in (
            (self.weight_1, first), (self.bias_1, shift),
            (self.weight_2, second), (self.bias_2, shift),
        ):  # fmt: skip
            tensor.uniform_(-bound, bound)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Features at some coordinates."""
        hidden = coordinates.to(self.weight_1.dtype)
        scale, activation = self.omega_0, _ACTIVATIONS[self.nonlinearity]
        for weight, bias in ((self.weight_1, self.bias_1), (self.weight_2, self.bias_2)):
            mapped = nn.functional.linear(hidden, weight, bias)
            hidden = activation(mapped if scale is None else scale * mapped)
        features = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.n_coordinates}, nonlinearity={self.nonlinearity!r}, hidden={self.hidden}"


def canonical_positions(kernel_size: int, outputs: GroupSamples) -> Tensor:
    """Positions of a filter's pixels in the frame of each element, ``h^-1 x``.

    Args:
        kernel_size: rows and columns of the filter.
        outputs: elements ``h [S]``.

    Returns:
        ``(x, y)`` in half filters, ``[S, kernel_size^2, 2]``.
    """
    points = _half_filters(kernel_size).to(outputs.angles)
    x, y = points[:, 0], points[:, 1]
    cos, sin = outputs.angles.cos()[:, None], outputs.angles.sin()[:, None]
    mirrors = outputs.mirrors.to(cos)[:, None]
    return torch.stack([mirrors * (cos * x + sin * y), cos * y - sin * x], -1)


def relative_elements(
    outputs: GroupSamples, inputs: GroupSamples, rotations: bool, mirrors: bool
) -> Tensor:
    """Coordinates of ``h^-1 g``, without a jump anywhere: ``(cos, sin)`` of its angle, its mirror.

    Args:
        outputs: elements ``h [S]``.
        inputs: elements ``g [T]``.
        rotations: whether the angle is among the coordinates.
        mirrors: whether the mirror is.

    Returns:
        ``[S, T, 0 to 3]``.
    """
    angle = inputs.angles - outputs.angles[:, None]
    own = outputs.mirrors.to(angle)[:, None]
    found = [angle.cos(), own * angle.sin()] if rotations else []
    found += [own * inputs.mirrors.to(angle)] if mirrors else []
    return torch.stack(found, -1) if found else angle.new_empty(*angle.shape, 0)


def disk(kernel_size: int) -> Tensor:
    """Which pixels of a filter lie in the disk that rotations leave in it, ``[kernel_size^2]``."""
    radius = max((kernel_size - 1) / 2, math.sqrt(0.5))  # no pixel of 2 x 2 is nearer than that
    # pixels on the rim belong to it, whatever their rounding
    return grid((kernel_size, kernel_size)).norm(dim=-1) <= radius + 1e-9


def _half_filters(kernel_size: int) -> Tensor:
    """Positions ``(x, y)``, the middle of the filter's sides at distance 1."""
    return grid((kernel_size, kernel_size)).flip(-1) / max((kernel_size - 1) / 2, 0.5)
