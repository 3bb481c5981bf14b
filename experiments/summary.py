"""What a record keeps of a :class:`margeq.MargLikResult`: all that the tables need, in short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from margeq import MargLikResult
from margeq.training.history import History

__all__ = ["starts", "summary"]

_CURVE_POINTS = 12
_TENSOR_KEYS = ("name", "layer", "path", "parameters", "prior_precision", "effective")


def summary(result: MargLikResult) -> dict[str, Any]:
    """Evidence per datum with its flavour, and the table of effective dimensions.

    Returns:
        Plain data, without the history.
    """
    plain = result.to_dict()
    table = plain["effective_dimension"]
    squares = mean_squares(result.model)
    return {
        "log_evidence_per_datum": result.log_marginal_likelihood / result.n_data,
        "flavour": plain["flavour"],
        "n_data": result.n_data,
        "settled": result.success,
        "message": result.message,
        "diagnostics": plain["diagnostics"],
        "selected": plain["selected"],
        "hyperparameters": {
            name: tensor.detach().flatten().tolist()
            for name, tensor in result.hyperparameters.items()
        },
        "paths": table["paths"],
        "tensors": [
            {key: row[key] for key in _TENSOR_KEYS} | {"mean_square": squares[row["name"]]}
            for row in table["tensors"]
        ],
    }


def starts(result: MargLikResult, prior_prec_init: float | str) -> list[dict[str, Any]]:
    """Every run that the evidence compared, with its thinned curve."""
    return [
        {
            "start": restart.start,
            "prior_prec_init": prior_prec_init,
            "log_evidence_per_datum": restart.log_marginal_likelihood / result.n_data,
            "error": restart.error,
            "curve": evidence_curve(restart.history, result.n_data),
            "final_loss": restart.history.losses[-1] if restart.history.losses else None,
            "switches": len(restart.history.switches),
        }
        for restart in result.restarts
    ]


def mean_squares(model: nn.Module) -> Mapping[str, float]:
    """Mean square of each weight tensor."""
    named = model.named_parameters()
    return {name: float(weight.detach().double().square().mean()) for name, weight in named}


def evidence_curve(history: History, n_data: int) -> list[tuple[int, float]]:
    """Epoch and log evidence per datum of evenly chosen updates, the last one included."""
    updates = history.updates
    step = max(1, -(-len(updates) // _CURVE_POINTS))
    chosen = updates[::-1][::step][::-1]
    return [(update.epoch, update.log_marginal_likelihood / n_data) for update in chosen]
