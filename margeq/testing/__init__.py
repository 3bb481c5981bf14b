"""Contracts as calls: of a layer type, ``check_layer``, of a symmetry, ``equivariance_error``."""

from margeq.testing.contracts import block_mask, check_layer
from margeq.testing.equivariance import (
    EquivarianceError,
    EquivarianceReport,
    equivariance_error,
)
from margeq.testing.subject import ContractError, LayerCase

__all__ = [
    "ContractError",
    "EquivarianceError",
    "EquivarianceReport",
    "LayerCase",
    "block_mask",
    "check_layer",
    "equivariance_error",
]
