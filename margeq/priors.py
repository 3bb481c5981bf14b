"""Gaussian priors on weights: log precisions, one per group of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.parameters import matches, named_weights, unwrapped
from margeq.paths import path_prefixes

__all__ = ["LOG_PRECISION_RANGE", "GaussianPrior"]

LOG_PRECISION_RANGE = 17.0
"""Log precisions stay within this distance of function scale (a factor of 2.4e7)."""


class GaussianPrior:
    """``theta_t ~ N(0, 1 / delta_t)``: one precision per group ``g`` of tensors ``t``.

        log delta_t = log delta_g(t) + offset_t

    Factors of one product, as those of a factored layer, leave the function as it is under
    ``U -> c U, V -> V / c``: precisions of their own have a direction in which the evidence is
    flat. ``"tied"`` gives such factors one precision, relative to the function scale of each:
    offsets are the differences between those scales. They are zero otherwise.

    Args:
        model: the model whose weights it is for.
        structure: ``"layerwise"`` (one per tensor), ``"tied"`` (one per product of the tensors
            that a layer declares in ``tied_factors``, named as in ``"0.weight_u*weight_v"``, and
            one per tensor elsewhere), ``"scalar"`` (one for all), ``"pathwise"`` (one per
            candidate path, one per tensor elsewhere), or a mapping from names of parameters or
            modules to group names, tensor names being their own group otherwise.
        prior_precision: one value, or one per group, in units of 1 / weight^2; of a product the
            geometric mean over its factors.
        parameters: as in :func:`margeq.named_weights`.

    Attributes:
        groups: tensor name -> group name.
        log_offset: tensor name -> ``offset_t``; those of a group have mean 0.
        log_prior_precision: group name -> scalar float64 tensor.
        log_center: group name -> logarithm of the function-scale precision around which
            log precisions are kept.

    Raises:
        ConfigError: for an unknown structure or group, a precision that is not positive, or
            products to tie that share a factor or have one that is no parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str | Mapping[str, str] = "layerwise",
        prior_precision: float | Mapping[str, float] = 1.0,
        parameters: str | Sequence[str] = "all",
    ) -> None:
        model = unwrapped(model)
        weights = named_weights(model, parameters)
        self.groups = _groups(model, weights, structure)
        self.log_offset = dict.fromkeys(weights, 0.0)
        self._ties_factors = isinstance(structure, str) and structure == "tied"
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
        return self.log_prior_precision[self.groups[tensor]] + self.log_offset[tensor]

    def members(self, group: str) -> list[str]:
        """Weight tensors of a group."""
        return [tensor for tensor, name in self.groups.items() if name == group]

    def bounds(self, group: str) -> tuple[float, float]:
        """Smallest and largest log precision allowed."""
        center = self.log_center[group]
        return center - LOG_PRECISION_RANGE, center + LOG_PRECISION_RANGE

    def set_function_scale(self, precisions: Mapping[str, float]) -> None:
        """Keep log precisions around function scale, and tie factors relative to it.

        Args:
            precisions: function-scale precision of each weight tensor.
        """
        logs = {tensor: math.log(value) for tensor, value in precisions.items()}
        self.log_center = self.group_means(logs)
        if self._ties_factors:
            self.log_offset = {t: log - self.log_center[self.groups[t]] for t, log in logs.items()}

    def group_means(self, log_precisions: Mapping[str, float]) -> dict[str, float]:
        """Mean over each group that has members among some tensors."""
        logs: dict[str, list[float]] = {}
        for tensor, value in log_precisions.items():
            logs.setdefault(self.groups[tensor], []).append(value)
        return {group: sum(values) / len(values) for group, values in logs.items()}

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

    def state_dict(self) -> dict[str, Any]:
        """What training changes; groups follow from model and structure."""
        return {
            "log_prior_precision": dict(self.log_prior_precision),
            "log_center": dict(self.log_center),
            "log_offset": dict(self.log_offset),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a prior of the same groups, on the device of this one."""
        self.log_prior_precision = {
            name: state["log_prior_precision"][name].to(old.device)
            for name, old in self.log_prior_precision.items()
        }
        self.log_center = dict(state["log_center"])
        self.log_offset = dict(state["log_offset"])

    def copy(self) -> GaussianPrior:
        """An independent copy."""
        return deepcopy(self)


def _groups(
    model: nn.Module, weights: Mapping[str, nn.Parameter], structure: str | Mapping[str, str]
) -> dict[str, str]:
    tensors = list(weights)
    if isinstance(structure, Mapping):
        _require_known(tensors, structure)
        return {t: _lookup(t, structure) for t in tensors}
    if structure == "layerwise":
        return {t: t for t in tensors}
    if structure == "tied":
        return {t: t for t in tensors} | _products(model, weights)
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
        f"structure={structure!r}: use 'scalar', 'layerwise', 'tied', 'pathwise' or a mapping of "
        f"names"
    )


def _products(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Tensor -> product ``"layer.u*v"`` for the factors that layers declare in ``tied_factors``."""
    name_of = {id(weight): name for name, weight in weights.items()}
    found: dict[str, str] = {}
    members: dict[str, set[str]] = {}
    for prefix, module in model.named_modules():
        declared: Sequence[Sequence[str]] = getattr(module, "tied_factors", ())
        for factors in declared:
            own = {factor: name_of.get(id(_factor(prefix, module, factor))) for factor in factors}
            present = {factor: tensor for factor, tensor in own.items() if tensor is not None}
            tensors = set(present.values())
            # one factor alone has no other to trade its scale with
            if len(tensors) < 2 or tensors in members.values():
                continue
            product = f"{prefix}.{'*'.join(present)}".removeprefix(".")
            _refuse_common(product, tensors, found)
            members[product] = tensors
            found |= dict.fromkeys(tensors, product)
    return found


def _factor(prefix: str, module: nn.Module, factor: str) -> nn.Parameter:
    try:
        return module.get_parameter(factor)
    except AttributeError as error:
        raise ConfigError(
            f"structure='tied': {prefix or 'the model'} ({type(module).__name__}) declares "
            f"{factor!r} in tied_factors, but has no such parameter ({error}); was it "
            f"parametrised or replaced? Undo that, or use 'layerwise' or a mapping of names"
        ) from error


def _refuse_common(product: str, tensors: set[str], found: Mapping[str, str]) -> None:
    for tensor in sorted(tensors & found.keys()):
        raise ConfigError(
            f"structure='tied': {tensor!r} is a factor of {found[tensor]!r} and of {product!r}, "
            f"two products that cannot have a precision each; give every layer factors of its "
            f"own, or use 'layerwise' or a mapping of names"
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
