"""Which path did each layer choose, and how much of it: effective parameters and verdicts.

Raw effective parameters alone mislead: a path with a thousandth of the function variance can hold
most of them, so the table shows four columns beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from margeq.function_share import Variances, shares
from margeq.laplace import Spectrum, effective_parameters
from margeq.likelihoods import Likelihood
from margeq.parameters import unwrapped
from margeq.paths import path_prefixes
from margeq.priors import GaussianPrior
from margeq.subsets import LearnedSubset, gate_label, learned_subsets

__all__ = [
    "OFF_SHARE",
    "SELECTED_SHARE",
    "EffectiveDimension",
    "PathRow",
    "TensorRow",
    "effective_dimension",
]

OFF_SHARE = 0.01
"""Share of a layer's function variance below which a path is off."""
SELECTED_SHARE = 0.9
"""Share from which a path is selected, if all others are off."""


@dataclass(frozen=True)
class TensorRow:
    """One weight tensor.

    Attributes:
        name: tensor.
        layer: layer it belongs to.
        path: candidate path, or ``""`` outside of path sums.
        parameters: ``P``.
        prior_precision: ``delta``, in 1 / weight^2.
        effective: ``gamma``, between 0 and ``P``.
        frozen: not trained, so without curvature and prior.
    """

    name: str
    layer: str
    path: str
    parameters: int
    prior_precision: float
    effective: float
    frozen: bool = False

    @property
    def normalised(self) -> float:
        """``gamma / P``."""
        return self.effective / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class PathRow:
    """One candidate path of one layer, or a layer without candidate paths.

    Attributes:
        layer: layer name.
        path: path name, ``""`` for a layer without candidate paths.
        parameters: ``P`` of weights and biases.
        prior_precision: geometric mean over the path's weight tensors.
        effective: raw ``gamma`` of weights and biases.
        normalised: mean ``gamma / P`` over the path's weight tensors (biases left out).
        relative: share of ``normalised`` among the layer's paths (ELLA D.2).
        function_share: share of the variance over the data of the path outputs.
        prior_share: share of the prior function variance, relative to function scale.
        verdict: ``"selected"``, ``"mixed"``, ``"off"``, ``"frozen"``, or ``""`` without candidates.
    """

    layer: str
    path: str
    parameters: int
    prior_precision: float
    effective: float
    normalised: float
    relative: float
    function_share: float
    prior_share: float
    verdict: str


@dataclass(frozen=True)
class EffectiveDimension:
    """The learned-symmetry table; ``print`` it, or read its parts.

    Attributes:
        paths: a row per layer and path.
        tensors: a row per weight tensor.
        selected: layer -> path with the largest share of function variance.
        subsets: gate -> what it leaves of its group.
    """

    paths: tuple[PathRow, ...]
    tensors: tuple[TensorRow, ...]
    selected: Mapping[str, str] = field(default_factory=dict)
    subsets: Mapping[str, LearnedSubset] = field(default_factory=dict)

    def of(self, layer: str, path: str) -> PathRow:
        """The row of one path.

        Returns:
            The row.

        Raises:
            KeyError: if there is no such row.
        """
        for row in self.paths:
            if (row.layer, row.path) == (layer, path):
                return row
        raise KeyError((layer, path))

    @property
    def layers(self) -> dict[str, float]:
        """Raw effective parameters per layer; a path sum inside a path is counted in both."""
        totals: dict[str, float] = {}
        for row in self.paths:
            totals[row.layer] = totals.get(row.layer, 0.0) + row.effective
        return totals

    @property
    def subset_lines(self) -> list[str]:
        """A line per gate: its layer and path, and what it leaves; a path that is off says so."""
        off = [row for row in self.paths if row.path and row.verdict == "off"]
        return [
            f"{gate_label(name)}: {subset}"
            + " (path off)" * any(_is_below(name, row.layer, row.path) for row in off)
            for name, subset in self.subsets.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a frozen tensor has no precision, ``None``."""
        return {
            "paths": [_without_nan(asdict(row)) for row in self.paths],
            "tensors": [
                _without_nan(asdict(row) | {"normalised": row.normalised}) for row in self.tensors
            ],
            "selected": dict(self.selected),
            "subsets": {name: subset.to_dict() for name, subset in self.subsets.items()},
            "subset_lines": self.subset_lines,
        }

    def __str__(self) -> str:
        """A table in columns as wide as the longest name, and a line per gate."""
        wide = max([16, *(len(row.layer) for row in self.paths)])
        narrow = max([8, *(len(row.path) for row in self.paths)])
        header = (
            f"{'layer':<{wide}} {'path':<{narrow}} {'parameters':>10} {'prior prec.':>11} "
            f"{'effective':>10} {'eff./P':>7} {'relative':>8} {'function':>8}  verdict"
        )
        lines = [header, "-" * len(header)]
        for r in self.paths:
            precision = "–" if math.isnan(r.prior_precision) else f"{r.prior_precision:.3g}"
            lines.append(
                f"{r.layer:<{wide}} {r.path:<{narrow}} {r.parameters:>10,} "
                f"{precision:>11} {r.effective:>10.1f} {r.normalised:>7.1%} "
                f"{r.relative:>8.1%} {r.function_share:>8.1%}  {r.verdict}"
            )
        return "\n".join([*lines, *self.subset_lines])


def effective_dimension(
    model: nn.Module,
    spectrum: Spectrum,
    prior: GaussianPrior,
    likelihood: Likelihood,
    variances: Variances,
) -> EffectiveDimension:
    """Effective parameters per tensor, layer and path, and a verdict per path.

        gamma_t = sum lambda / (lambda + delta)      (ELLA eqs. 43-45, MacKay 1992)

    Args:
        model: the trained model.
        spectrum: of a curvature pass at the same weights.
        prior: precisions.
        likelihood: noise and temperature.
        variances: from :func:`function_variances`.

    Returns:
        Rows per tensor and path; ``selected`` names the path with the largest function share of
        each layer, ``subsets`` what each gate leaves.
    """
    model = unwrapped(model)
    tensors = _tensor_rows(model, effective_parameters(spectrum, prior, likelihood), prior)
    by_share = shares(variances)
    layers = dict.fromkeys(layer for t in tensors for layer, _ in _places(model, t.name))
    rows: list[PathRow] = []
    for layer in layers:
        inside = [t for t in tensors if layer in dict(_places(model, t.name))]
        rows.extend(_path_rows(layer, inside, prior, by_share.get(layer, {})))
    selected = {
        layer: max(s, key=s.__getitem__) for layer, s in by_share.items() if sum(s.values())
    }
    return EffectiveDimension(tuple(rows), tuple(tensors), selected, learned_subsets(model))


def _tensor_rows(
    model: nn.Module, gammas: Mapping[str, Tensor], prior: GaussianPrior
) -> list[TensorRow]:
    rows = []
    for name, parameter in model.named_parameters():
        layer, path = _places(model, name)[-1]
        known = name in gammas
        if not known and parameter.requires_grad:
            continue  # trained, but excluded from the Laplace approximation
        precision = float(prior.log_precision_of(name).exp()) if known else float("nan")
        gamma = float(gammas[name]) if known else 0.0
        rows.append(
            TensorRow(name, layer, path, parameter.numel(), precision, gamma, frozen=not known)
        )
    return rows


def _places(model: nn.Module, tensor: str) -> list[tuple[str, str]]:
    """Layers and paths that a tensor belongs to, from the outermost path sum inwards."""
    found = [
        (layer, path)
        for layer, named in path_prefixes(model).items()
        for path, prefix in named.items()
        if tensor.startswith(f"{prefix}.")
    ]
    return found or [(tensor.rpartition(".")[0], "")]


def _path_rows(
    layer: str, tensors: list[TensorRow], prior: GaussianPrior, by_share: Mapping[str, float]
) -> list[PathRow]:
    paths = list(by_share) or [""]
    members = {path: [t for t in tensors if _is_below(t.name, layer, path)] for path in paths}
    weights = {path: _without_biases(members[path]) for path in paths}
    normalised = {p: _mean([t.normalised for t in weights[p]]) for p in paths}
    prior_variance = {p: _prior_variance(weights[p], prior) for p in paths}
    total, prior_total = sum(normalised.values()), sum(prior_variance.values())
    return [
        PathRow(
            layer=layer,
            path=path,
            parameters=sum(t.parameters for t in members[path]),
            prior_precision=_geometric_mean(
                [t.prior_precision for t in weights[path] if not t.frozen]
            ),
            effective=sum(t.effective for t in members[path]),
            normalised=normalised[path],
            relative=normalised[path] / total if total > 0 else 0.0,
            function_share=by_share.get(path, 1.0),
            prior_share=prior_variance[path] / prior_total if prior_total > 0 else 0.0,
            verdict=_verdict(path, members[path], by_share),
        )
        for path in paths
    ]


def _is_below(tensor: str, layer: str, path: str) -> bool:
    prefix = f"{layer}.paths.{path}." if layer else f"paths.{path}."
    return not path or tensor.startswith(prefix)


def _verdict(path: str, tensors: list[TensorRow], by_share: Mapping[str, float]) -> str:
    if tensors and all(t.frozen for t in tensors):
        return "frozen"
    if not by_share or not sum(by_share.values()):
        return ""  # no candidates, or an output that does not vary over the data
    share = by_share[path]
    if share < OFF_SHARE:
        return "off"
    others_off = all(other < OFF_SHARE for name, other in by_share.items() if name != path)
    return "selected" if share >= SELECTED_SHARE and others_off else "mixed"


def _without_biases(tensors: list[TensorRow]) -> list[TensorRow]:
    weights = [t for t in tensors if not t.name.rpartition(".")[2].startswith("bias")]
    return weights or tensors


def _prior_variance(tensors: list[TensorRow], prior: GaussianPrior) -> float:
    """Prior function variance of a path, as a multiple of its function-scale start."""
    log_variance = 0.0
    for t in tensors:
        if not t.frozen:
            group = prior.groups[t.name]
            log_variance += prior.log_center[group] - float(prior.log_prior_precision[group])
    return float(torch.tensor(log_variance, dtype=torch.float64).exp())


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in row.items()}


def _geometric_mean(values: list[float]) -> float:
    if not values:
        return float("nan")
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
