"""Contracts as calls: of a layer type, of a symmetry, and of the curvature of a model."""

from margeq.testing.contracts import block_mask, check_layer
from margeq.testing.crosscheck import CrossCheck, CrossCheckRow, crosscheck
from margeq.testing.equivariance import (
    EquivarianceError,
    EquivarianceReport,
    equivariance_error,
)
from margeq.testing.subject import ContractError, LayerCase

__all__ = [
    "ContractError",
    "CrossCheck",
    "CrossCheckRow",
    "EquivarianceError",
    "EquivarianceReport",
    "LayerCase",
    "block_mask",
    "check_layer",
    "crosscheck",
    "equivariance_error",
]
