"""Layers, each with its curvature rule; importing this package registers all rules."""

from margeq.layers import convolution as _convolution  # registers the rules of nn.Conv1d/2d/3d
from margeq.layers.dense import Linear2d
from margeq.layers.factored import FactoredLinear2d
from margeq.layers.pathways import ResidualPathways
from margeq.layers.pooling import PolyphaseSubsample
from margeq.layers.sparse import SparseConv2d
from margeq.layers.sparse_factored import SparseFactoredLinear2d

__all__ = [
    "FactoredLinear2d",
    "Linear2d",
    "PolyphaseSubsample",
    "ResidualPathways",
    "SparseConv2d",
    "SparseFactoredLinear2d",
    "_convolution",
]
