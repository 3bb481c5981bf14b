"""Gates that are not to leave more of a group than the gates before them.

    penalty = strength * sum_l relu(u_(l+1) - u_l) + relu(v_(l+1) - v_l)

Subsets then shrink with depth: deeper layers keep as much of the symmetry as earlier ones, or less.
Without it a later layer may return to the whole group, which does not bring back the symmetry that
an earlier one gave up, but lets it use the group axis for what depends on the pose. (Romero & Lohit
2022, appendix F; they find networks without it slightly better.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.subsets import SymmetryGate, named_gates

__all__ = ["MonotoneGates", "monotone_penalty"]


def monotone_penalty(gates: Iterable[SymmetryGate], strength: float = 1e-3) -> Tensor:
    """Price of gates that leave more than the one before, for a task loss.

        strength * sum_l relu(u_(l+1) - u_l) + relu(v_(l+1) - v_l)

    Args:
        gates: in the order of depth, with ``trained_by="loss"``, or the loss does not reach them.
        strength: ``lambda`` in units of the loss.

    Returns:
        A scalar to add to the loss, zero where widths ``u`` and mirrors ``v`` fall with depth.

    Raises:
        ConfigError: for fewer than two gates, or a strength that is no number from 0.

    Reference:
        Romero & Lohit 2022, appendix F.

    Example:
        >>> from margeq.groups import P4
        >>> from margeq.layers import GroupGate
        >>> wider = [GroupGate(P4, width) for width in (0.5, 0.75)]
        >>> monotone_penalty(wider, 2.0).item(), monotone_penalty(wider[::-1], 2.0).item()
        (0.5, 0.0)
    """
    in_order = list(gates)
    _check("monotone_penalty", len(in_order), strength)
    shares = torch.stack([torch.stack([gate.width, gate.mirror]) for gate in in_order])
    return strength * shares.diff(dim=0).relu().sum()


class MonotoneGates(nn.Module):
    """A network in whose evidence gates pay for leaving more than the one before them.

        log p(gates) = -strength * sum_l relu(u_(l+1) - u_l) + relu(v_(l+1) - v_l) + const

    The penalty is part of the evidence and of its gradient, as ``log_hyperprior``. Gates of paths
    that are off do not move, but others are compared with them.

    Args:
        network: whose gates are in the order of depth, as it registers its modules. It is called
            with whatever this module is called with.
        strength: nats per unit of width. A task loss that is a mean over N data has N times its
            strength here.

    Raises:
        ConfigError: for fewer than two gates, or a strength that is no number from 0.

    Reference:
        Romero & Lohit 2022, appendix F.

    Example:
        >>> from margeq.groups import P4
        >>> from margeq.layers import GroupGate
        >>> MonotoneGates(nn.Sequential(GroupGate(P4, 0.5), GroupGate(P4, 0.75)), 4.0)
        MonotoneGates(
          strength=4
          (network): Sequential(
            (0): GroupGate(P4, width=0.5)
            (1): GroupGate(P4, width=0.75)
          )
        )
    """

    def __init__(self, network: nn.Module, strength: float) -> None:
        super().__init__()
        _check("MonotoneGates", len(named_gates(network)), strength)
        self.network, self.strength = network, strength

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the network says."""
        return self.network(*inputs, **options)

    def log_hyperprior(self) -> Tensor:
        """The penalty, in nats, never positive."""
        return -monotone_penalty(named_gates(self.network).values(), self.strength)

    def extra_repr(self) -> str:
        """Strength, for ``print(model)``."""
        return f"strength={self.strength:g}"


def _check(name: str, n_gates: int, strength: float) -> None:
    if n_gates < 2:
        raise ConfigError(f"{name}: {n_gates} gates have no order; give it at least two")
    if not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
        raise ConfigError(f"{name}: strength={strength!r} must be a finite number of at least 0")
