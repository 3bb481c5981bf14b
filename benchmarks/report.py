"""The results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.factored import TARGET, FactoredRow
from benchmarks.group_fourier import FourierRow
from benchmarks.group_layers import LayerRow
from benchmarks.memory import MemoryRow
from benchmarks.partial_layers import PartialRow, partial_table

__all__ = ["Report", "Row", "write"]

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Row:
    """One job: processor time, its multiple of the plain epoch, and what it should be."""

    job: str
    ms: float
    epochs: float
    target: float | None
    peak_mib: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met, if there is one."""
        return None if self.target is None else self.epochs <= self.target


@dataclass(frozen=True)
class Report:
    """Everything measured in one run."""

    facts: Mapping[str, float | int | str]
    rows: Sequence[Row]
    factored: Sequence[FactoredRow]
    lengthscales: Sequence[Row] = ()
    gradient_memory: Sequence[MemoryRow] = ()
    fourier: Sequence[FourierRow] = ()
    group_layers: Sequence[LayerRow] = ()
    partial_layers: Sequence[PartialRow] = ()

    def as_json(self) -> str:
        """All numbers."""
        rows, lengthscales = (
            [{**asdict(row), "met": row.met} for row in table]
            for table in (self.rows, self.lengthscales)
        )
        factored = [
            {**asdict(row), "speed_up": row.speed_up, "target": TARGET} for row in self.factored
        ]
        machine = {"torch": torch.__version__, "python": platform.python_version()}
        report = {
            "facts": {**self.facts, **machine},
            "rows": rows,
            "factored": factored,
            "lengthscales": lengthscales,
            "gradient_memory": [asdict(row) for row in self.gradient_memory],
            "group_layers": [asdict(row) for row in self.group_layers],
            "partial_layers": [asdict(row) for row in self.partial_layers],
            "fourier": [{**asdict(row), "speed_up": row.speed_up} for row in self.fourier],
        }
        return json.dumps(_rounded(report), indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        """The page ``docs/benchmarks.md``."""
        facts = self.facts
        return "\n".join(
            [
                "# Benchmarks",
                "",
                "Written by `make bench`; do not edit. Processor time of one thread, median of "
                f"{facts['repeats']}, all jobs interleaved in one process, each measurement "
                f"divided by a plain epoch right before it (torch {torch.__version__}): compare "
                f"the ratios. LeNet (conv6-conv16-120-10, "
                f"{facts['weights']:,} weights) on {facts['data']:,} digits of 28 × 28 in batches "
                f"of {facts['batch']}, trained to {facts['accuracy']:.1%}; the adaptive root keeps "
                f"{facts['captured_trace']:.3%} of the trace. Every update includes its "
                "eigenvalue decomposition.",
                "",
                *_table(self.rows),
                "",
                "Peak memory is the largest growth of the resident set, sampled every 0.5 ms, "
                "while the job runs once in a fresh process, after imports, data and one forward "
                "pass.",
                "",
                "## F-FC",
                "",
                "Forward and backward on batches of 32 at the last layers of the paper, beside "
                "block-diagonal matrices built by `torch.block_diag` per datum, or by "
                f"`torch.diag_embed` per batch. The faster of the two counts; target {TARGET:g} ×.",
                "",
                *_factored_table(self.factored),
                "",
                "## Lengthscales",
                "",
                "Gradient of the evidence in the two lengthscales of a LeNet whose convolutions "
                f"are S-CONV layers on grid anchors, {facts['lengthscale_data']:,} digits in "
                f"batches of {facts['batch']}, in plain epochs of that network on these data. The "
                "full graph is one double back-propagation through a pass that keeps the graph of "
                "all batches. The second phase and the closed form reuse the curvature sums that "
                "the evidence needs anyway.",
                "",
                *_table(self.lengthscales),
                "",
                *_memory_table(self.gradient_memory),
                "",
                "## Group convolutions",
                "",
                "Forward and backward, the gradient of the input included, of group convolutions "
                "of 16 channels on batches of 32 maps of 28 × 28, against one plain convolution of "
                "the full layer's expanded shape, right before each measurement.",
                "",
                *_layer_table(self.group_layers),
                "",
                "The same of layers that are left a part of the group on both sides: gates on "
                "grids, and samples, of which there are as many as fall into the part. Beside each "
                "is a plain convolution with as many multiplications.",
                "",
                *partial_table(self.partial_layers),
                "",
                "Eigenvalues of the input factor of a group convolution, of the whole factor and "
                "of its blocks in the Fourier basis of the group, one per irreducible "
                "representation.",
                "",
                *_fourier_table(self.fourier),
                "",
            ]
        )


def write(report: Report) -> None:
    """Write both files under ``docs/``."""
    (DOCS / "benchmarks.json").write_text(report.as_json(), encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(report.as_markdown(), encoding="utf-8")


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| job | ms | × plain epoch | target | met | peak MiB |", "|---|--:|--:|--:|---|--:|"]
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g}"
        met = "" if row.met is None else ("yes" if row.met else "no")
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        epochs = f"{row.epochs:.2f}" if row.epochs >= 0.1 else f"{row.epochs:.4f}"
        lines.append(f"| {row.job} | {row.ms:.2f} | {epochs} | {target} | {met} | {peak} |")
    return lines


def _factored_table(rows: Sequence[FactoredRow]) -> list[str]:
    lines = [
        "| layer | einsum ms | block_diag ms | diag_embed ms | speed-up | met |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        met = "yes" if row.speed_up >= TARGET else "no"
        lines.append(
            f"| {row.layer} | {row.einsum_ms:.2f} | {row.block_diagonal_ms:.0f} "
            f"| {row.diag_embed_ms:.0f} | {row.speed_up:.0f} × | {met} |"
        )
    return lines


def _layer_table(rows: Sequence[LayerRow]) -> list[str]:
    lines = [
        "| group | kernel | kind | ms | × plain | target | met |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g}"
        met = "" if row.target is None else ("yes" if row.ratio <= row.target else "no")
        lines.append(
            f"| {row.group} | {row.kernel} × {row.kernel} | {row.kind} | {row.ms:.1f} "
            f"| {row.ratio:.2f} | {target} | {met} |"
        )
    return lines


def _fourier_table(rows: Sequence[FourierRow]) -> list[str]:
    lines = [
        "| layer | dimension | whole ms | blocks ms | speed-up | target | met |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        met = "yes" if row.speed_up >= row.target else "no"
        lines.append(
            f"| {row.layer} | {row.dimension:,} | {row.dense_ms:.1f} | {row.blocks_ms:.1f} "
            f"| {row.speed_up:.1f} × | ≥ {row.target:g} × | {met} |"
        )
    return lines


def _memory_table(rows: Sequence[MemoryRow]) -> list[str]:
    sizes = list(rows[0].peak_mib) if rows else []
    lines = [
        "| peak MiB | " + " | ".join(f"{n:,} data" for n in sizes) + " |",
        "|---|" + "--:|" * len(sizes),
    ]
    for row in rows:
        cells = [f"{row.peak_mib[n]:.0f}" if n in row.peak_mib else "" for n in sizes]
        lines.append(f"| {row.job} | " + " | ".join(cells) + " |")
    return lines if rows else []


def _rounded(value: object) -> object:
    """Five significant digits: more would only be noise in the history of the file."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value
