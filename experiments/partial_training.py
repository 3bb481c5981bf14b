"""One run: by the task loss or by the evidence, the same network and the same steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import margeq
from experiments.evaluate import evaluate
from experiments.partial_data import load_partial
from experiments.partial_networks import build_partial
from experiments.partial_presets import PartialSettings
from experiments.plain_training import PlainOptions
from experiments.records import Cell
from experiments.resume import run_missing
from experiments.runs import rate
from experiments.summary import starts
from margeq.curvature.options import KfacOptions
from margeq.data import ImageTask
from margeq.errors import ConvergenceWarning
from margeq.layers import MonotoneGates
from margeq.models import AugmentedInputs
from margeq.subsets import learned_subsets, named_gates

__all__ = ["Observe", "PartialOptions", "run_partial"]

Training = Literal["loss", "evidence"]
Observe = Callable[[nn.Module, ImageTask, Cell], dict[str, Any]]
_EVALUATION_BATCH = 250


@dataclass(frozen=True)
class PartialOptions(PlainOptions):
    """Runs of the tables; a run whose record exists is skipped, so call again to resume."""

    training: tuple[Training, ...] = ("loss", "evidence")
    """What moves gates, distributions and widths."""


def run_partial(
    experiment: str, settings: PartialSettings, options: PartialOptions, observe: Observe
) -> None:
    """Run every cell that has no record yet and say so line by line."""
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # weights that are priced out become denormal, which is slow

    def run(cell: Cell) -> dict[str, Any]:
        task = load_partial(cell.task, settings, cell.seed, options.data_dir)
        return run_cell(cell, settings, task, options.device, observe)

    cells = partial_cells(experiment, settings, options)
    run_missing(cells, options.out, lambda cell: resolved(cell, settings), run, in_short)


def partial_cells(
    experiment: str, settings: PartialSettings, options: PartialOptions
) -> Iterator[Cell]:
    """All runs, whole tables of one seed before the next seed."""
    return (
        Cell(experiment, options.preset, task, model, training, seed)
        for seed in options.seeds or settings.seeds
        for task, models in settings.questions
        if not options.tasks or task in options.tasks
        for model in models
        if not options.models or model in options.models
        for training in options.training
        if training == "loss" or model.partition("-")[0] not in settings.loss_only
    )


def resolved(cell: Cell, settings: PartialSettings) -> dict[str, Any]:
    """All settings of one run, and not which other runs its table has."""
    others = ["questions", "loss_only", "seeds"]
    others += [] if on_samples(cell.model) else [name for name in asdict(settings) if "mc_" in name]
    return {name: value for name, value in asdict(settings).items() if name not in others}


def on_samples(model: str) -> bool:
    """Whether a network's maps lie on samples of the group, not on a grid."""
    return model.startswith(("mc-", "cnn13-"))


def in_short(record: dict[str, Any]) -> str:
    """Test accuracy, and what is left of the symmetry."""
    results = record["results"]
    left = [f"{subset['words']}" for subset in results["subsets"].values()]
    left += [f"{name} {width:.2f}" for name, width in results["widths"].items()]
    return "; ".join([f"test accuracy {results['test']['accuracy']:.2%}", *left])


def run_cell(
    cell: Cell, settings: PartialSettings, task: ImageTask, device: str, observe: Observe
) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The record, but for the versions.
    """
    began = time.perf_counter()
    standard = task.standardised()
    torch.manual_seed(cell.seed)
    trained_by: Training = "loss" if cell.training == "loss" else "evidence"
    model = build_partial(cell.model, settings, task, trained_by).to(device)
    train = _by_loss if cell.training == "loss" else _by_evidence
    results = train(model, standard, cell, settings)
    trained = time.perf_counter()
    model.eval()
    parts = {
        "test": standard.test_loader(_EVALUATION_BATCH),
        "validation": standard.validation_loader(_EVALUATION_BATCH),
        "train": standard.marglik_loader(_EVALUATION_BATCH),
    }
    results |= {name: evaluate(model, loader) for name, loader in parts.items()}
    results |= {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_seconds": trained - began,
        "subsets": {name: left.to_dict() for name, left in learned_subsets(model).items()},
        "widths": model.named_widths() if isinstance(model, AugmentedInputs) else {},
        **observe(model, task, cell),
    }
    return {
        **asdict(cell),
        "cell": cell.name,
        "config": resolved(cell, settings),
        "data": {
            "name": task.name,
            "n_train": len(task.train_images),
            "n_validation": len(standard.validation_loader(1)),
            "n_test": len(task.test_images),
            "shape": list(task.train_images.shape[1:]),
            "n_classes": task.n_classes,
        },
        "threads": torch.get_num_threads(),
        "device": device,
        "seconds": time.perf_counter() - began,
        "results": results,
    }


def _by_loss(
    model: nn.Module, task: ImageTask, cell: Cell, settings: PartialSettings
) -> dict[str, Any]:
    """Adam on the cross entropy; gates and widths have a learning rate of their own."""
    epochs, lr = settings.epochs, settings.lr
    if on_samples(cell.model):
        epochs, lr = settings.mc_epochs, settings.mc_lr
    device = next(model.parameters()).device
    loader = task.train_loader(settings.batch_size, seed=cell.seed)
    optimizer = torch.optim.Adam(_by_rate(model, lr, settings.gate_lr))
    steps = epochs * len(loader)
    schedule = LambdaLR(optimizer, partial(rate, steps=steps, warmup=settings.warmup))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
            (loss + _price(model, settings, len(task.train_images))).backward()
            optimizer.step()
            schedule.step()
    return {}


def _by_rate(model: nn.Module, lr: float, gate_lr: float) -> list[dict[str, Any]]:
    owners = [*named_gates(model).values()]
    own = {id(p) for owner in owners if isinstance(owner, nn.Module) for p in owner.parameters()}
    if isinstance(model, AugmentedInputs):
        own.add(id(model.logit_widths))
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in own], "lr": lr},
        {"params": [p for p in parameters if id(p) in own], "lr": gate_lr},
    ]


def _price(model: nn.Module, settings: PartialSettings, n_train: int) -> Tensor | float:
    """What a loss alone would not ask for, per picture."""
    if isinstance(model, AugmentedInputs):
        return model.bonus(settings.bonus)
    return -model.log_hyperprior() / n_train if isinstance(model, MonotoneGates) else 0.0


def _by_evidence(
    model: nn.Module, task: ImageTask, cell: Cell, settings: PartialSettings
) -> dict[str, Any]:
    """The same steps with learned precisions; returns evidence and what each start came to."""
    loader = task.train_loader(settings.batch_size, seed=cell.seed)
    steps = settings.epochs * len(loader)
    with warnings.catch_warnings():
        # whether the evidence has settled is in the record
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = margeq.optimize_marglik(
            model,
            loader,
            marglik_loader=task.marglik_loader(settings.curvature_batch),
            n_epochs=settings.epochs,
            n_epochs_burnin=settings.burnin,
            marglik_frequency=settings.frequency,
            optimizer_kwargs={"lr": settings.lr},
            scheduler_cls=LambdaLR,
            scheduler_kwargs={"lr_lambda": partial(rate, steps=steps, warmup=settings.warmup)},
            lr_hyp=settings.lr_hyp,
            curvature=KfacOptions(settings.hessian_root),
            restarts=_starts(model, settings),
            progress="none",
            seed=cell.seed,
        )
    return {
        "log_evidence_per_datum": result.log_marginal_likelihood / result.n_data,
        "settled": result.success,
        "kept": next(restart.start for restart in result.restarts if restart.kept),
        "starts": starts(result, "function-scale"),
        "gates": _gate_curves(result),
    }


def _starts(model: nn.Module, settings: PartialSettings) -> str | list[str]:
    if not named_gates(model):
        return "current"
    return "auto" if settings.starts == ("auto",) else list(settings.starts)


def _gate_curves(result: margeq.MargLikResult) -> dict[str, dict[str, list[float]]]:
    """Start -> hyperparameter inside the network -> its raw value at each update."""
    return {
        restart.start: {
            name: [update.hyperparameters[name][0] for update in restart.history.updates]
            for name in result.hyperparameters
            if "raw_" in name
        }
        for restart in result.restarts
    }
