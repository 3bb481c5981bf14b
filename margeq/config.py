"""Configurations of the command line; plain data, importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DemoConfig", "RunConfig"]


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


@dataclass(frozen=True)
class RunConfig:
    """Train one task by the marginal likelihood; everything that decides the result, as plain data.

    The options are those of :func:`margeq.optimize_marglik`, with the same defaults.
    """

    task: str = ""
    """Name of a registered task: digit, corner, or one of the file given by --factory."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the task, such as copies=1."""
    seed: int = 0
    """Seed of the task and of the training."""
    threads: int = 1
    """Threads for torch; the last digits depend on it."""
    n_epochs: int = 300
    """Epochs of each start."""
    n_epochs_burnin: int = 10
    """Epochs before the first hyperparameter update."""
    marglik_frequency: int = 5
    """Epochs between updates."""
    n_hypersteps: int = 20
    """Steps per update."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer of the weights."""
    lr: float = 1e-3
    """Its step size."""
    momentum: float | None = None
    """Its momentum, for sgd."""
    scheduler: Literal["none", "cosine"] = "none"
    """Learning rate over the epochs."""
    lr_hyp: float = 0.1
    """Step size of the hyperparameters."""
    likelihood: Literal["classification", "regression", "regression-per-output"] = "classification"
    """What the targets are."""
    sigma_noise_init: float = 1.0
    """Initial noise for regression."""
    temperature: float = 1.0
    """Temperature of the likelihood."""
    prior: Literal["layerwise", "tied", "scalar", "pathwise"] = "layerwise"
    """Structure of the prior precisions."""
    prior_prec_init: float | Literal["function-scale"] = "function-scale"
    """Where they begin."""
    hyper_solver: Literal["mackay", "adam", "lbfgs", "fixed"] = "mackay"
    """How they move."""
    network_gradient: Literal["auto", "exact", "sketched", "closed-form"] = "auto"
    """How the gradient of hyperparameters inside the network is found."""
    curvature: Literal["kfac", "ekfac", "diag", "full"] = "kfac"
    """Approximation of the curvature."""
    hessian_root: Literal["adaptive", "exact", "mc"] = "adaptive"
    """Columns of the output Hessian's root."""
    mc_samples: int = 1
    """Columns of the mc root."""
    kfac_approx: Literal["expand", "reduce", "expand/reduce", "reduce/expand"] = "expand"
    """Kronecker factors over shared positions."""
    restarts: tuple[str, ...] = ("auto",)
    """Starts to compare by evidence; auto runs all of them."""
    deterministic: bool = False
    """Use PyTorch's deterministic algorithms."""
