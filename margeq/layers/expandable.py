"""Layers on a group that can say what they are on a subgroup."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from margeq.groups import FiniteGroup

__all__ = ["Expandable"]


class Expandable(nn.Module):
    """Base of group layers: :func:`margeq.layers.expand_to` as a method."""

    # set by the module of that function, which has to know all of these layers
    expander: ClassVar[Callable[[nn.Module, FiniteGroup], nn.Module]]

    def expand_to(self, subgroup: FiniteGroup) -> nn.Module:
        """The same function as a layer of a subgroup, see :func:`margeq.layers.expand_to`."""
        return type(self).expander(self, subgroup)
