"""What one update costs on many ranks: counted operations, counted bytes, and rates of a machine.

    T(W) = pass / W + largest share of the eigenvalues + reduction

    pass          operations of forward, backward and factors over all data / flops
    eigenvalues   sum of 4/3 d^3 over the factors of one rank, as they are shared out / eigen_flops
    reduction     2 (W - 1) / W * bytes of the sums / bandwidth + latency * log2 W

The factors are counted in float64, as they are summed and sent. With the rates of this machine the
model is compared with measurements by ``python -m benchmarks.scaling``; the rates of GPUs below are
assumptions, named as such, that nobody has measured with margeq.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from margeq.distributed import shared_out

__all__ = ["ASSUMED", "Layer", "Machine", "Update", "resnet18", "seconds"]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: ``out`` times ``inner`` weights.

    Attributes:
        inner: inputs of one output, channels times kernel.
        out: outputs at one position.
        positions: shared positions, 1 for a linear layer.
        has_bias: which has a gradient factor of its own.
    """

    inner: int
    out: int
    positions: int
    has_bias: bool = False

    @property
    def multiplications(self) -> int:
        """Of one forward pass of one datum."""
        return self.inner * self.out * self.positions


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        name: for tables.
        flops: operations per second of passes and factors.
        eigen_flops: the same of symmetric eigenvalues in float64.
        bandwidth: bytes per second of an all-reduce.
        latency: seconds of one message.
    """

    name: str
    flops: float
    eigen_flops: float
    bandwidth: float
    latency: float = 2e-5


ASSUMED = (
    Machine("GPU, 400 Gb/s between nodes", 3e13, 2e11, 4e10),
    Machine("GPU, 25 Gb/s between nodes", 3e13, 2e11, 2.5e9),
)
"""Round figures for data-centre GPUs, assumed."""


@dataclass(frozen=True)
class Update:
    """One update of a network.

    Attributes:
        layers: with curvature.
        n_data: data behind the evidence.
        columns: backward passes of a datum: classes - 1 for the exact root, samples for MC.
    """

    layers: Sequence[Layer]
    n_data: int
    columns: int

    @property
    def operations(self) -> float:
        """Of the pass over all data: 2 per multiplication."""
        passes = sum(layer.multiplications * (1 + 2 * self.columns) for layer in self.layers)
        factors = sum(
            layer.positions * (layer.inner**2 + self.columns * layer.out**2)
            for layer in self.layers
        )
        return 2.0 * self.n_data * (passes + factors)

    @property
    def sizes(self) -> list[int]:
        """Of all factors."""
        biases = [layer.out for layer in self.layers if layer.has_bias]
        return [size for layer in self.layers for size in (layer.out, layer.inner)] + biases

    @property
    def megabytes(self) -> float:
        """Of the sums that every rank adds."""
        return sum(size**2 for size in self.sizes) * 8 / 1e6

    def busiest(self, ranks: int) -> float:
        """Operations of the eigenvalues on the rank with most of them."""
        costs = [4 / 3 * size**3 for size in self.sizes]
        loads = [0.0] * ranks
        for cost, owner in zip(costs, shared_out(costs, ranks), strict=True):
            loads[owner] += cost
        return max(loads)


def seconds(update: Update, machine: Machine, ranks: int) -> tuple[float, float, float]:
    """Pass, eigenvalues and reduction of one update."""
    reduction = 0.0
    if ranks > 1:
        volume = 2 * (ranks - 1) / ranks * update.megabytes * 1e6
        reduction = volume / machine.bandwidth + machine.latency * math.log2(ranks)
    return (
        update.operations / machine.flops / ranks,
        update.busiest(ranks) / machine.eigen_flops,
        reduction,
    )


def resnet18(width: int = 64, size: int = 32, classes: int = 10) -> list[Layer]:
    """ResNet-18 with the stem for small pictures (3 x 3, no pooling), without its norms.

    Returns:
        Its 21 layers; 11,164,352 weights at the usual width with 10 classes.
    """
    layers, channels = [Layer(27, width, size**2)], width
    for stage in range(4):
        out, positions = width * 2**stage, (size // 2**stage) ** 2
        for block in range(2):
            inner = channels if block == 0 else out
            layers += [Layer(9 * inner, out, positions), Layer(9 * out, out, positions)]
            if inner != out:
                layers.append(Layer(inner, out, positions))
        channels = out
    return [*layers, Layer(channels, classes, 1)]
