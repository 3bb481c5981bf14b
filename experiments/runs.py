"""One run: draw the network, train it, look at it, write it down; and all runs of a table."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import margeq
from experiments.evaluate import evaluate
from experiments.presets import PresetName, Settings, Training
from experiments.records import RESULTS, Cell
from experiments.resume import run_missing
from experiments.summary import starts, summary
from margeq.curvature.options import KfacOptions
from margeq.data import ImageTask, random_shift_flip
from margeq.errors import ConfigError, ConvergenceWarning
from margeq.models import ella

__all__ = ["Build", "Options", "network", "run_cell", "run_table"]

_EVALUATION_BATCH = 500
Load = Callable[[Cell, Settings, str], ImageTask]
Build = Callable[[Cell, Settings, ImageTask], nn.Module]


@dataclass(frozen=True)
class Options:
    """Runs of the paper's tables; a run whose record exists is skipped, so call again to resume."""

    preset: PresetName = "cpu"
    """Settings: as published, half an hour on one GPU, or two cores."""
    seeds: tuple[int, ...] = ()
    """Seeds; the preset's by default."""
    models: tuple[str, ...] = ()
    """Kinds of networks; the preset's by default."""
    tasks: tuple[str, ...] = ()
    """Questions; the preset's by default."""
    training: tuple[Training, ...] = ("map", "evidence")
    """With unit precisions throughout, or with learned ones."""
    data_dir: str = ""
    """Folder with the data; the environment variable MARGEQ_DATA by default."""
    out: Path = RESULTS
    """Where the records go."""
    threads: int = 1
    """Threads for torch."""
    device: str = "cpu"
    """Device of torch, such as cuda."""


def network(cell: Cell, settings: Settings, task: ImageTask) -> nn.Module:
    """The paper's network, at the preset's width and size; on a group if a path needs one.

    ``s_conv@lengthscales`` has one lengthscale per filter, priced by a penalty in the evidence,
    where ``s_conv`` has one per layer.
    """
    kind, _, prior_on = cell.model.partition("@")
    if prior_on not in ("", "lengthscales"):
        raise ConfigError(f"network {cell.model!r}: after @ only 'lengthscales' is known")
    return ella(
        kind,
        per_filter=prior_on == "lengthscales",
        width=settings.width,
        in_channels=task.train_images.shape[1],
        num_classes=task.n_classes,
        size=settings.size,
        reduction=settings.reduction,
    )


def run_table(
    experiment: str,
    presets: Mapping[PresetName, Settings],
    load: Load,
    options: Options,
    build: Build = network,
) -> None:
    """Run every cell that has no record yet and say so line by line."""
    torch.set_num_threads(options.threads)
    # weights that the evidence prices out shrink to denormal numbers, which are slow on CPUs
    torch.set_flush_denormal(True)
    settings = presets[options.preset]

    def run(cell: Cell) -> dict[str, Any]:
        task = load(cell, settings, options.data_dir)
        return run_cell(cell, settings, task, options.device, build)

    wanted = cells(experiment, options, settings)
    run_missing(wanted, options.out, lambda cell: resolved(cell, settings), run, _in_short)


def _in_short(record: Mapping[str, Any]) -> str:
    results = record["results"]
    test, evidence = results["test"], results["log_evidence_per_datum"]
    return (
        f"evidence {evidence:.3f} nats per datum, test accuracy {test['accuracy']:.2%}, NLL "
        f"{test['nll']:.3f}"
    )


def cells(experiment: str, options: Options, settings: Settings) -> Iterator[Cell]:
    """All runs, whole tables of one seed before the next seed."""
    return (
        Cell(experiment, options.preset, task, model, training, seed)
        for seed in options.seeds or settings.seeds
        for task in options.tasks or settings.tasks
        for model in options.models or settings.models
        for training in options.training
    )


def resolved(cell: Cell, settings: Settings) -> dict[str, Any]:
    """All settings of one run: not which other runs its table has, and its own learning rate."""
    others = ("models", "tasks", "seeds", "map_lr")
    plain = {name: value for name, value in asdict(settings).items() if name not in others}
    return plain | {"lr": learning_rate(cell, settings)}


def learning_rate(cell: Cell, settings: Settings) -> float:
    """That of the run's training."""
    return settings.map_lr if cell.training == "map" else settings.lr


def run_cell(
    cell: Cell,
    settings: Settings,
    task: ImageTask,
    device: str = "cpu",
    build: Build = network,
) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The record, but for the versions.
    """
    began = time.perf_counter()
    results = train(cell, settings, task, device, build)
    init, best = max(results.items(), key=lambda item: item[1].log_marginal_likelihood)
    model = best.model
    task_facts = {
        "name": task.name,
        "n_train": len(task.train_images),
        "n_test": len(task.test_images),
        "shape": list(task.train_images.shape[1:]),
        "n_classes": task.n_classes,
    }
    return {
        **asdict(cell),
        "cell": cell.name,
        "config": resolved(cell, settings),
        "data": task_facts,
        "threads": torch.get_num_threads(),
        "device": device,
        "seconds": time.perf_counter() - began,
        "results": {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "test": evaluate(model, task.test_loader(_EVALUATION_BATCH)),
            "train": evaluate(model, task.marglik_loader(_EVALUATION_BATCH)),
            **summary(best),
            "prior_prec_init": init,
            "starts": [row for init, result in results.items() for row in starts(result, init)],
        },
    }


def train(
    cell: Cell, settings: Settings, task: ImageTask, device: str, build: Build
) -> dict[float | str, margeq.MargLikResult]:
    """One result per initial precision."""
    inits = (1.0,) if cell.training == "map" else settings.prior_prec_inits
    found = {}
    for init in inits:
        # data, weights and order have streams of their own, all from the cell's seed
        torch.manual_seed(cell.seed)
        model = build(cell, settings, task).to(device)
        found[init] = _train(cell, settings, task, model, init)
    return found


def _train(
    cell: Cell, settings: Settings, task: ImageTask, model: nn.Module, init: float | str
) -> margeq.MargLikResult:
    augment = random_shift_flip if settings.augment else None
    loader = task.train_loader(settings.batch_size, augment=augment, seed=cell.seed)
    with warnings.catch_warnings():
        # whether the evidence has settled is in the record
        warnings.simplefilter("ignore", ConvergenceWarning)
        return margeq.optimize_marglik(
            model,
            loader,
            marglik_loader=task.marglik_loader(settings.curvature_batch),
            n_epochs=settings.epochs,
            optimizer_kwargs={"lr": learning_rate(cell, settings)},
            scheduler_cls=LambdaLR,
            scheduler_kwargs={
                "lr_lambda": partial(
                    rate, steps=settings.epochs * len(loader), warmup=settings.warmup
                )
            },
            prior_prec_init=init,
            curvature=KfacOptions(
                settings.hessian_root, position_fraction=settings.position_fraction
            ),
            progress="none",
            seed=cell.seed,
            **_schedule(cell, settings),
        )


def rate(step: int, *, steps: int, warmup: float) -> float:
    """Share of the learning rate: a linear rise, then a cosine to zero."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / (steps - rise))))


def _schedule(cell: Cell, settings: Settings) -> dict[str, Any]:
    """MAP training is the same loop with hyperparameters that stay, and one evidence at the end."""
    if cell.training == "map":
        return {
            "hyper_solver": "fixed",
            "n_epochs_burnin": settings.epochs,
            "marglik_frequency": settings.epochs,
            "restarts": [settings.map_start],
        }
    return {
        "hyper_solver": settings.hyper_solver,
        "n_hypersteps": settings.n_hypersteps,
        "lr_hyp": settings.lr_hyp,
        "n_epochs_burnin": settings.burnin,
        "marglik_frequency": settings.frequency,
        "restarts": _starts(cell.model, settings),
    }


def _starts(model: str, settings: Settings) -> list[str]:
    *others, last = model.partition("@")[0].split("+")
    if not others:
        return [settings.single_start]
    return [f"only:{last}" if name == "convolutional" else name for name in settings.starts]
