"""Models in and out: candidate paths around a network's layers, and a plain network from them."""

from margeq.convert.costs import Costs, cost_table, costs
from margeq.convert.hardening import harden
from margeq.convert.record import Relaxation, RelaxedLayer, relaxation
from margeq.convert.relaxing import relax

__all__ = [
    "Costs",
    "Relaxation",
    "RelaxedLayer",
    "cost_table",
    "costs",
    "harden",
    "relax",
    "relaxation",
]
