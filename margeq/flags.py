"""What the commands accept, turned into flags; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tyro.conf import Positional

from margeq.config import RunConfig

__all__ = ["CompareFlags", "ReportFlags", "ResumeFlags", "RunFlags", "SweepFlags"]


@dataclass(frozen=True)
class RunFlags(RunConfig):
    """Train one task by the marginal likelihood, in a directory that can be resumed."""

    config: str = ""
    """TOML or JSON file with options, or config.json of a run; flags come after it."""
    factory: str = ""
    """Python file that registers your own tasks."""
    out: str = ""
    """Run directory; runs/TASK-ID by default."""
    resume: bool = True
    """Go on from what is there; --no-resume removes it."""
    report: bool = True
    """Write report.html and figures at the end; 'margeq report' does so later."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Tracker that follows the run, if installed; TensorBoard's files are in OUT/tensorboard."""
    quiet: bool = False
    """Only errors."""
    json: bool = False
    """Print the result as JSON on standard output and nothing else."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class ResumeFlags:
    """Go on with an interrupted run or demonstration; a finished one gives its result again."""

    run: Positional[str]
    """Run directory."""
    factory: str = ""
    """Python file that registers the task, if it is not built in."""
    quiet: bool = False
    """Only errors."""
    json: bool = False
    """Print the result as JSON on standard output and nothing else."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class SweepFlags:
    """Run every combination of a specification; what is finished is not run again."""

    spec: Positional[str]
    """TOML or JSON file with [base], [grid] and seeds."""
    jobs: int = 1
    """Runs at a time; each gets its share of the cores."""
    out: str = ""
    """Directory of all runs; runs/NAME-OF-SPEC by default."""
    factory: str = ""
    """Python file that registers your own tasks."""
    slurm: bool = False
    """Submit each run as a Slurm job and return (needs margeq[slurm])."""
    slurm_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the jobs, such as slurm_partition=gpu timeout_min=60."""
    dry_run: bool = False
    """List the runs and their state, and do nothing."""
    json: bool = False
    """Print sweep.json on standard output and nothing else."""
    quiet: bool = False
    """Only errors."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class ReportFlags:
    """Write report.html and its figures from the directory of a finished run or demonstration."""

    run: Positional[str]
    """Run directory."""
    out: str = ""
    """Where to write; the run directory by default."""
    quiet: bool = False
    """Only errors."""
    json: bool = False
    """Print the path of the report as JSON on standard output and nothing else."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class CompareFlags:
    """Rank finished runs on the same data by evidence."""

    runs: Positional[tuple[str, ...]] = ()
    """Two run directories or more."""
    quiet: bool = False
    """Only errors."""
    json: bool = False
    """Print the comparison as JSON on standard output and nothing else."""
    debug: bool = False
    """Show tracebacks."""
