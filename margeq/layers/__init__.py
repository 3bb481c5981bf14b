"""Layers, each with its curvature rule; importing this package registers all rules."""

from margeq.layers import attention as _attention  # registers the rules of nn.MultiheadAttention
from margeq.layers import convolution as _convolution  # registers the rules of nn.Conv1d/2d/3d
from margeq.layers import datum_norm as _datum_norm  # Layer-, RMS-, Group- and InstanceNorm
from margeq.layers import embedding as _embedding  # nn.Embedding
from margeq.layers import normalisation as _normalisation  # those of nn.BatchNorm1d/2d/3d
from margeq.layers import prelu as _prelu  # nn.PReLU
from margeq.layers import transposed as _transposed  # nn.ConvTranspose1d/2d/3d
from margeq.layers.dense import Linear2d
from margeq.layers.equivariant import EquivariantLinear
from margeq.layers.expansion import expand_to, to_conv2d
from margeq.layers.factored import FactoredLinear2d
from margeq.layers.gate import GroupGate
from margeq.layers.group import GroupConv2d
from margeq.layers.group_pooling import (
    GroupPool,
    Lift,
    MergeGroup,
    PerElement,
    RestrictGroup,
    SplitGroup,
)
from margeq.layers.irreps import IrrepGroupConv2d
from margeq.layers.kernel import ImplicitKernel
from margeq.layers.lifting import LiftingConv2d
from margeq.layers.monotone import MonotoneGates, monotone_penalty
from margeq.layers.partial import PartialGroupConv2d, PartialLiftingConv2d
from margeq.layers.partial_mc import MonteCarloGroupConv2d, MonteCarloLiftingConv2d
from margeq.layers.pathways import ResidualPathways
from margeq.layers.planar_subset import PlanarSubset
from margeq.layers.pooling import PolyphaseSubsample
from margeq.layers.sample_norm import SampleBatchNorm, SampleInstanceNorm
from margeq.layers.sample_pool import SamplePool
from margeq.layers.samples import (
    GroupDistribution,
    GroupSampler,
    GroupSamples,
    IdentityElement,
    redraw,
)
from margeq.layers.separable import PairSeparableConv2d, SeparableGroupConv2d
from margeq.layers.sizes import SizeFault, check_sizes, require_exact_sizes
from margeq.layers.sparse import SparseConv2d
from margeq.layers.sparse_factored import SparseFactoredLinear2d
from margeq.layers.sparse_group import SparseGroupConv2d
from margeq.layers.subgroup import SubgroupConv2d
from margeq.subsets import LearnedSubset

__all__ = [
    "EquivariantLinear",
    "FactoredLinear2d",
    "GroupConv2d",
    "GroupDistribution",
    "GroupGate",
    "GroupPool",
    "GroupSampler",
    "GroupSamples",
    "IdentityElement",
    "ImplicitKernel",
    "IrrepGroupConv2d",
    "LearnedSubset",
    "Lift",
    "LiftingConv2d",
    "Linear2d",
    "MergeGroup",
    "MonotoneGates",
    "MonteCarloGroupConv2d",
    "MonteCarloLiftingConv2d",
    "PairSeparableConv2d",
    "PartialGroupConv2d",
    "PartialLiftingConv2d",
    "PerElement",
    "PlanarSubset",
    "PolyphaseSubsample",
    "ResidualPathways",
    "RestrictGroup",
    "SampleBatchNorm",
    "SampleInstanceNorm",
    "SamplePool",
    "SeparableGroupConv2d",
    "SizeFault",
    "SparseConv2d",
    "SparseFactoredLinear2d",
    "SparseGroupConv2d",
    "SplitGroup",
    "SubgroupConv2d",
    "_attention",
    "_convolution",
    "_datum_norm",
    "_embedding",
    "_normalisation",
    "_prelu",
    "_transposed",
    "check_sizes",
    "expand_to",
    "monotone_penalty",
    "redraw",
    "require_exact_sizes",
    "to_conv2d",
]
