"""Gaussian priors on weights: log precisions, one per group of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.parameters import matches, named_weights
from margeq.paths import path_prefixes

__all__ = ["LOG_PRECISION_RANGE", "GaussianPrior"]

LOG_PRECISION_RANGE = 17.0
"""Log precisions stay within this distance of function scale (a factor of 2.4e7)."""


class GaussianPrior:
    """``theta_t ~ N(0, 1 / delta_g(t))``: one precision per group ``g`` of tensors ``t``.

    Args:
        model: the model whose weights it is for.
        structure: ``"layerwise"`` (one per tensor), ``"scalar"`` (one for all), ``"pathwise"``
            (one per candidate path, one per tensor elsewhere), or a mapping from names of
            parameters or modules to group names, tensor names being their own group otherwise.
        prior_precision: one value, or one per group, in units of 1 / weight^2.
        parameters: as in :func:`margeq.named_weights`.

    Attributes:
        groups: tensor name -> group name.
        log_prior_precision: group name -> scalar float64 tensor.
        log_center: group name -> logarithm of the function-scale precision around which
            log precisions are kept.

    Raises:
        ConfigError: for an unknown structure or group, or a precision that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str | Mapping[str, str] = "layerwise",
        prior_precision: float | Mapping[str, float] = 1.0,
        parameters: str | Sequence[str] = "all",
    ) -> None:
        weights = named_weights(model, parameters)
        self.groups = _groups(model, list(weights), structure)
        device = next(iter(weights.values())).device if weights else torch.device("cpu")
        names = list(dict.fromkeys(self.groups.values()))
        values = _per_group(names, prior_precision)
        self.log_prior_precision = {
            name: torch.tensor(math.log(values[name]), dtype=torch.float64, device=device)
            for name in names
        }
        self.log_center = dict.fromkeys(names, 0.0)

    @property
    def prior_precision(self) -> dict[str, Tensor]:
        """Precision per group."""
        return {name: log.exp() for name, log in self.log_prior_precision.items()}

    def log_precision_of(self, tensor: str) -> Tensor:
        """Log precision of one weight tensor."""
        return self.log_prior_precision[self.groups[tensor]]

    def members(self, group: str) -> list[str]:
        """Weight tensors of a group."""
        return [tensor for tensor, name in self.groups.items() if name == group]

    def bounds(self, group: str) -> tuple[float, float]:
        """Smallest and largest log precision allowed."""
        center = self.log_center[group]
        return center - LOG_PRECISION_RANGE, center + LOG_PRECISION_RANGE

    def assign(self, log_precisions: Mapping[str, Tensor | float]) -> None:
        """Set log precisions, clamped to their bounds."""
        for group, value in log_precisions.items():
            low, high = self.bounds(group)
            old = self.log_prior_precision[group]
            new = torch.as_tensor(value, dtype=old.dtype, device=old.device).detach()
            self.log_prior_precision[group] = new.clamp(low, high)

    def at_bounds(self) -> list[str]:
        """Groups whose precision sits at one of its bounds."""
        found = []
        for group, value in self.log_prior_precision.items():
            low, high = self.bounds(group)
            if not low + 1e-9 < float(value) < high - 1e-9:
                found.append(group)
        return found

    def copy(self) -> GaussianPrior:
        """An independent copy."""
        return deepcopy(self)


def _groups(
    model: nn.Module, tensors: list[str], structure: str | Mapping[str, str]
) -> dict[str, str]:
    if isinstance(structure, Mapping):
        _require_known(tensors, structure)
        return {t: _lookup(t, structure) for t in tensors}
    if structure == "layerwise":
        return {t: t for t in tensors}
    if structure == "scalar":
        return dict.fromkeys(tensors, "all")
    if structure == "pathwise":
        prefixes = [p for paths in path_prefixes(model).values() for p in paths.values()]
        # nested pathways: the innermost, that is the longest, prefix owns the tensor
        prefixes.sort(key=len, reverse=True)
        return {t: next((p for p in prefixes if matches(t, [p])), t) for t in tensors}
    if structure == "diagonal":
        raise ConfigError(
            "structure='diagonal' needs a diagonal evidence: Kronecker eigenvalues exist for one "
            "precision per tensor or coarser; use 'layerwise'"
        )
    raise ConfigError(
        f"structure={structure!r}: use 'scalar', 'layerwise', 'pathwise' or a mapping of names"
    )


def _lookup(tensor: str, structure: Mapping[str, str]) -> str:
    hits = [key for key in structure if matches(tensor, [key])]
    return structure[max(hits, key=len)] if hits else tensor


def _require_known(tensors: list[str], structure: Mapping[str, str]) -> None:
    for key in structure:
        if not any(matches(tensor, [key]) for tensor in tensors):
            raise ConfigError(f"structure: no weight is called, or lies below, {key!r}")


def _per_group(names: list[str], precision: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(precision, Mapping):
        unknown = set(precision) - set(names)
        if unknown:
            raise ConfigError(f"prior_precision: no group {sorted(unknown)}; groups: {names}")
        values = {name: float(precision.get(name, 1.0)) for name in names}
    else:
        values = dict.fromkeys(names, float(precision))
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"prior precision of {name!r} is {value}; it must be positive")
    return values
