"""Whole networks."""

from margeq.models.digits import digit_network

__all__ = ["digit_network"]
