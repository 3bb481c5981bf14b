"""Runs without evidence: a network, Adam on the cross entropy, the test error, one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from experiments.evaluate import evaluate
from experiments.group_presets import PlainSettings
from experiments.presets import PresetName
from experiments.records import RESULTS, Cell
from experiments.resume import run_missing
from experiments.runs import rate
from margeq.data import ImageTask
from margeq.data.batching import Augmentation, TensorLoader

__all__ = [
    "PlainExperiment",
    "PlainOptions",
    "cells",
    "fitted",
    "run_plain",
    "run_plain_cell",
    "train_plain",
]

_EVALUATION_BATCH = 50  # maps of networks on groups are wide: larger batches leave the cache
_TRAINING = "plain"


def _observe_nothing(model: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class PlainExperiment:
    """What one experiment asks.

    Attributes:
        name: of the script and of the folder of its records.
        presets: settings.
        load: the cell's question.
        network: the cell's network, with random weights.
        augment: what changes the training pictures of a cell, if anything.
        observe: what else the record says of the network, before and after training.
    """

    name: str
    presets: Mapping[PresetName, PlainSettings]
    load: Callable[[Cell, PlainSettings, str], ImageTask]
    network: Callable[[Cell, PlainSettings, ImageTask], nn.Module]
    augment: Callable[[Cell, PlainSettings], Augmentation | None]
    observe: Callable[[nn.Module], dict[str, Any]] = _observe_nothing


@dataclass(frozen=True)
class PlainOptions:
    """Runs of the tables; a run whose record exists is skipped, so call again to resume."""

    preset: PresetName = "cpu"
    """Settings: as published, half an hour on one GPU, or two cores."""
    seeds: tuple[int, ...] = ()
    """Seeds; the preset's by default."""
    models: tuple[str, ...] = ()
    """Networks; those of the preset's table and curves by default."""
    tasks: tuple[str, ...] = ()
    """Questions; those of the preset's table and curves by default."""
    data_dir: str = ""
    """Folder with the data; the environment variable MARGEQ_DATA by default."""
    out: Path = RESULTS
    """Where the records go."""
    threads: int = 1
    """Threads for torch."""
    device: str = "cpu"
    """Device of torch, such as cuda."""


def run_plain(experiment: PlainExperiment, options: PlainOptions) -> None:
    """Run every cell that has no record yet and say so line by line."""
    torch.set_num_threads(options.threads)
    settings = experiment.presets[options.preset]

    def run(cell: Cell) -> dict[str, Any]:
        task = experiment.load(cell, settings, options.data_dir)
        return run_plain_cell(experiment, cell, settings, task, options.device)

    wanted = cells(experiment.name, options, settings)
    run_missing(wanted, options.out, lambda cell: resolved(settings), run, _errors)


def _errors(record: Mapping[str, Any]) -> str:
    test, train = (record["results"][part]["accuracy"] for part in ("test", "train"))
    return f"test error {100 - 100 * test:.2f} %, training error {100 - 100 * train:.2f} %"


def cells(experiment: str, options: PlainOptions, settings: PlainSettings) -> Iterator[Cell]:
    """The table, whole seeds one after the other, and then the curves."""
    grids = (
        (settings.seeds, settings.tasks, settings.models),
        (settings.curve_seeds, settings.curve_tasks, settings.models),
        (settings.curve_seeds, settings.tasks, settings.curve_models),
    )
    for seeds, tasks, models in grids:
        for seed in options.seeds or seeds:
            for task in _chosen(tasks, options.tasks):
                for model in _chosen(models, options.models):
                    yield Cell(experiment, options.preset, task, model, _TRAINING, seed)


def _chosen(offered: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in offered if not wanted or name in wanted)


def resolved(settings: PlainSettings) -> dict[str, Any]:
    """All settings of one run: not which other runs its table and curves have."""
    others = ("models", "tasks", "seeds", "curve_models", "curve_tasks", "curve_seeds")
    return {name: value for name, value in asdict(settings).items() if name not in others}


def run_plain_cell(
    experiment: PlainExperiment,
    cell: Cell,
    settings: PlainSettings,
    task: ImageTask,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The record, but for the versions.
    """
    began = time.perf_counter()
    model, before = fitted(experiment, cell, settings, task, device)
    trained = time.perf_counter()
    results = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "test": evaluate(model, task.test_loader(_EVALUATION_BATCH)),
        "train": evaluate(model, task.marglik_loader(_EVALUATION_BATCH)),
        "training_seconds": trained - began,
        **{
            name: {"before": before[name], "after": after}
            for name, after in experiment.observe(model).items()
        },
    }
    return {
        **asdict(cell),
        "cell": cell.name,
        "config": resolved(settings),
        "data": {
            "name": task.name,
            "n_train": len(task.train_images),
            "n_test": len(task.test_images),
            "shape": list(task.train_images.shape[1:]),
            "n_classes": task.n_classes,
        },
        "threads": torch.get_num_threads(),
        "device": device,
        "seconds": time.perf_counter() - began,
        "results": results,
    }


def fitted(
    experiment: PlainExperiment,
    cell: Cell,
    settings: PlainSettings,
    task: ImageTask,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a cell, and what was observed of it before training."""
    torch.manual_seed(cell.seed)
    model = experiment.network(cell, settings, task).to(device)
    before = experiment.observe(model)
    augment = experiment.augment(cell, settings)
    loader = task.train_loader(settings.batch_size, augment=augment, seed=cell.seed)
    train_plain(model, loader, settings)
    return model, before


def train_plain(model: nn.Module, loader: TensorLoader, settings: PlainSettings) -> None:
    """Minimise the cross entropy with AdamW and a cosine; leaves the model in evaluation mode."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * len(loader)
    schedule = LambdaLR(optimizer, partial(rate, steps=steps, warmup=settings.warmup))
    model.train()
    for _ in range(settings.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
