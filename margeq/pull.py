"""What is back-propagated in one go: tensors of a graph, and a derivative in each of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from margeq.linalg import project

__all__ = ["Pull"]


class Pull:
    """Tensors of one graph, and the derivative of the evidence in each of them."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []  # tensors, and edges of the graph
        self.cotangents: list[Tensor] = []

    def add(self, output: Tensor, cotangent: Tensor) -> None:
        """Note one tensor, unless no leaf is behind it."""
        if output.requires_grad:
            self.outputs.append(output)
            self.cotangents.append(cotangent.to(output).reshape(output.shape))

    def add_edge(self, edge: GradientEdge, cotangent: Tensor) -> None:
        """The same for a place in the graph."""
        self.outputs.append(edge)
        self.cotangents.append(cotangent)

    def add_gram(self, rows: Tensor, cotangent: Tensor, scale: float = 1.0) -> None:
        """The same for ``scale * gram(rows)``: its derivative is ``2 * scale * rows @ G``."""
        if rows.requires_grad:
            self.add(rows, project(rows.detach(), 2.0 * scale * cotangent.to(rows)))
