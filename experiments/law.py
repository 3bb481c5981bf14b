"""Table 4's law: at a maximum of the evidence, each precision is ``δ = γ / |θ|²`` (MacKay 1992)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.published import TABLE_4

__all__ = ["TOLERANCE", "Deviation", "deviations", "law", "published_deviations"]

TOLERANCE = 1e-3
"""Relative, for tensors with at least one effective parameter."""


@dataclass(frozen=True)
class Deviation:
    """How far one weight tensor of one run is from the law.

    Attributes:
        run: name of the run.
        tensor: name of the tensor.
        gamma: its effective parameters.
        gap: ``|δ |θ|² − γ|``, twice the slope of the log evidence in log δ.
    """

    run: str
    tensor: str
    gamma: float
    gap: float

    @property
    def relative(self) -> float:
        """``|δ |θ|² / γ − 1|``."""
        return self.gap / self.gamma

    @property
    def is_determined(self) -> bool:
        """With less than one effective parameter, the evidence is flat in the precision."""
        return self.gamma >= 1.0


def deviations(record: Mapping[str, Any]) -> list[Deviation]:
    """Every tensor with weights and a precision inside its bounds: one that can be stationary.

    Returns:
        One entry per tensor.
    """
    results = record["results"]
    bounded = set(results["diagnostics"]["at_bounds"])
    found = []
    for row in results["tensors"]:
        squares, gamma = row["mean_square"] * row["parameters"], row["effective"]
        if row["name"] not in bounded and squares > 0:
            gap = abs(row["prior_precision"] * squares - gamma)
            found.append(Deviation(record["cell"], row["name"], gamma, gap))
    return found


def published_deviations() -> list[float]:
    """The same of the published table, where its eight decimals show a mean square weight."""
    numbers = [path for row in TABLE_4 for path in (row.fc, row.conv)]
    return [
        abs(n.precision * n.mean_square / n.normalised - 1) for n in numbers if n.mean_square > 1e-5
    ]


def law(records: Sequence[Mapping[str, Any]]) -> str:
    """How well our runs and the published table keep to it.

    Returns:
        Markdown.
    """
    learned = [r for r in records if r["training"] == "evidence"]
    found = [deviation for r in learned for deviation in deviations(r)]
    lines = ["### Table 4's law δ = γ / |θ|²", ""]
    if not found:
        return "\n".join([*lines, "No runs with learned precisions yet."])
    determined = [d for d in found if d.is_determined]
    flat = [d for d in found if not d.is_determined]
    excluded = sum(len(r["results"]["tensors"]) for r in learned) - len(found)
    published = published_deviations()
    if determined:
        within = sum(d.relative <= TOLERANCE for d in determined)
        worst = max(determined, key=lambda d: d.relative)
        lines.append(
            f"- {within} of {len(determined)} tensors with at least one effective parameter keep "
            f"to it within {TOLERANCE:g} (relative; {len(learned)} runs); worst {worst.tensor} of "
            f"{worst.run}, {worst.relative:.1e}"
        )
    if flat:
        worst = max(flat, key=lambda d: d.gap)
        lines.append(
            f"- {len(flat)} tensors have less, so the evidence is flat in their precision: "
            f"δ|θ|² and γ differ by at most {worst.gap:.1e} ({worst.tensor} of {worst.run})"
        )
    lines += [
        f"- {excluded} tensors have zero weights or a precision at a bound: nothing to compare",
        f"- published: {len(published)} rows whose mean square weight is printed with three "
        f"digits or more, worst {max(published):.1e}",
    ]
    return "\n".join(lines)
