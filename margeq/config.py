"""Configurations of the command line; plain data, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DemoConfig"]


@dataclass(frozen=True)
class DemoConfig:
    """Ask real digits two questions and see which symmetry each layer chooses (offline)."""

    seed: int = 0
    """Seed of the split, the placements and the training."""
    restarts: str = "symmetric,free"
    """Starts to compare by evidence, separated by commas; 'auto' runs all of them."""
    epochs: int = 30
    """Epochs of each run."""
    threads: int = 1
    """Threads for torch; the last digits depend on it, and more hardly help so small a network."""
    questions: tuple[Literal["digit", "corner"], ...] = ("digit", "corner")
    """Questions to ask."""
    out: str = ""
    """Run directory; runs/demo-SEED by default."""
    quiet: bool = False
    """Only errors."""
    json: bool = False
    """Print the result as JSON on standard output and nothing else."""
    debug: bool = False
    """Show tracebacks."""
