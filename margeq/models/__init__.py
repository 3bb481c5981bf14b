"""Whole networks."""

from margeq.models.digits import digit_network
from margeq.models.ella import ella

__all__ = ["digit_network", "ella"]
