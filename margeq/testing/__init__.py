"""The contract of a layer type, as one call: ``margeq.testing.check_layer``."""

from margeq.testing.contracts import block_mask, check_layer
from margeq.testing.subject import ContractError, LayerCase

__all__ = ["ContractError", "LayerCase", "block_mask", "check_layer"]
