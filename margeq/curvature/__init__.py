"""Curvature core: knows no layer, prior or likelihood."""

from margeq.curvature import exact
from margeq.curvature.io import InputRows, LinearIO, Rule, register_kfac_rule, register_split_rule
from margeq.curvature.kron import BlockKron

__all__ = [
    "BlockKron",
    "InputRows",
    "LinearIO",
    "Rule",
    "exact",
    "register_kfac_rule",
    "register_split_rule",
]
