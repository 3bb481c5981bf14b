"""What happened during training, update by update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "History", "Update"]


@dataclass(frozen=True)
class Event:
    """Something a callback may want to know.

    Attributes:
        kind: ``"start"``, ``"epoch"``, ``"update"``, ``"switch"``, ``"end"`` or ``"result"``.
        data: plain values, ready for JSON.
    """

    kind: str
    data: dict[str, Any]


Callback = Callable[[Event], None]
"""Any function of an event."""


@dataclass(frozen=True)
class Update:
    """One hyperparameter update.

    Attributes:
        epoch: epoch after which it took place, from 1.
        log_marginal_likelihood: nats, total over the data, after the update.
        log_likelihood: its fit term.
        occam: its Occam term, never positive.
        prior_precision: per group.
        effective: effective parameters per tensor.
        function_share: layer -> path -> share of function variance.
        sigma_noise: noise standard deviation, one per output if there are several, ``None`` for
            classification.
        captured_trace: share of the output Hessian's trace that the root kept.
        clamped: eigenvalues that had to be set to zero.
        seconds: wall time of curvature pass and hyperparameter steps.
        hyperparameters: values of those inside the network, at which the evidence was computed.
    """

    epoch: int
    log_marginal_likelihood: float
    log_likelihood: float
    occam: float
    prior_precision: dict[str, float]
    effective: dict[str, float]
    function_share: dict[str, dict[str, float]]
    sigma_noise: float | list[float] | None
    captured_trace: float
    clamped: int
    seconds: float
    hyperparameters: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class History:
    """Losses per epoch, updates, and paths switched on or off, of one run."""

    losses: list[float] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)

    def slope(self, n_data: int, last: int = 3) -> float:
        """Change of the log evidence per datum and epoch over the last updates, in nats.

        Returns:
            NaN after a single update, which cannot tell.
        """
        recent = self.updates[-last:]
        if len(recent) < 2:
            return float("nan")
        rise = recent[-1].log_marginal_likelihood - recent[0].log_marginal_likelihood
        return rise / (recent[-1].epoch - recent[0].epoch) / n_data

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what it says of each update is shared, as histories can be long."""
        return {
            "losses": list(self.losses),
            "updates": [dict(vars(update)) for update in self.updates],
            "switches": list(self.switches),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """The history of plain data."""
        updates = [Update(**update) for update in data["updates"]]
        return cls(list(data["losses"]), updates, list(data["switches"]))
