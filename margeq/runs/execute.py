"""One run in its directory: begun, gone on with, or read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq.runs.questions  # noqa: F401  registers the built-in tasks
from margeq.callbacks import Callback, JsonlCallback
from margeq.checkpoint import run_lock
from margeq.config import RunConfig
from margeq.errors import ConfigError
from margeq.optimize import MargLikResult, optimize_marglik
from margeq.runs.environment import threads, versions
from margeq.runs.files import mend_lines, read_if_there, read_table, write_json, writing
from margeq.runs.held_out import held_out_score
from margeq.runs.identity import file_digest, run_id
from margeq.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    RESULT,
    is_free,
    require_same_config,
    warn_if_factory_changed,
)
from margeq.runs.plain import plain_config
from margeq.runs.tasks import Task, build, load_factory, registered

__all__ = ["execute", "with_task"]

_OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


def with_task(config: RunConfig, factory: Path | None) -> RunConfig:
    """The configuration with its task named, and that task's file loaded.

    Args:
        config: may leave the task out if the file registers exactly one.
        factory: Python file with tasks.

    Returns:
        The configuration.

    Raises:
        ConfigError: if the task remains open, or the file has none.
    """
    names = [] if factory is None else load_factory(factory)
    if config.task:
        return config
    if len(names) != 1:
        raise ConfigError(
            f"task is missing: name one of {', '.join(names or registered())} by --task"
        )
    return replace(config, task=names[0])


def execute(
    config: RunConfig,
    directory: Path,
    *,
    factory: Path | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train as configured and write ``result.json``, or give the result that is there.

    Args:
        config: with a task that is registered.
        directory: of this run; made if there is none.
        factory: the file that registered the task; its digest is noted.
        resume: go on from the checkpoints there; ``False`` removes what is there.
        callbacks: functions of an event.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: for a configuration that cannot work, or the directory of another run.
        CheckpointError: if another process is at it, or its checkpoints cannot be trusted.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with run_lock(directory):
        plain = plain_config(config)
        if resume:
            require_same_config(directory, "run", plain)
            warn_if_factory_changed(directory, factory)
            if (finished := read_if_there(directory / RESULT)) is not None:
                return finished
        task = _built(config)
        _begin(config, directory, factory, resume)
        summary = _trained(task, config, directory, resume, callbacks)
        write_json(directory / RESULT, summary)
        return read_table(directory / RESULT)


def _begin(config: RunConfig, directory: Path, factory: Path | None, resume: bool) -> None:
    with writing(directory):
        if not resume:
            for name in (RESULT, CONFIG, EVENTS):
                (directory / name).unlink(missing_ok=True)
    if is_free(directory):
        noted = factory and {"path": str(factory), "sha256": file_digest(factory)}
        entry = {
            "command": "run",
            "id": run_id(config),
            "config": plain_config(config),
            "versions": versions(),
            "factory": noted,
        }
        write_json(directory / CONFIG, entry)
    mend_lines(directory / EVENTS)


def _built(config: RunConfig) -> Task:
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed} must be an integer from 0 to 2**63 - 1")
    # a task may draw from the global state, such as initial weights: the same ones every time
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build(config.task, config.seed, config.arguments)


def _trained(
    task: Task,
    config: RunConfig,
    directory: Path,
    resume: bool,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    began = time.perf_counter()
    write = JsonlCallback(directory / EVENTS)

    def log(event: Any) -> None:
        with writing(directory):
            write(event)

    with threads(config.threads):
        result = optimize_marglik(
            task.model,
            task.train_loader,
            marglik_loader=task.marglik_loader,
            batch_fn=task.batch_fn,
            **_options(config, task),
            checkpoint_dir=directory / CHECKPOINTS,
            resume=resume,
            callbacks=[log, *callbacks],
            progress="none",
        )
        held_out = held_out_score(task, config.likelihood)
    return _summary(config, result, held_out, time.perf_counter() - began)


def _options(config: RunConfig, task: Task) -> dict[str, Any]:
    """Arguments of :func:`optimize_marglik`; names become classes here and nowhere else."""
    same = (
        "seed", "n_epochs", "n_epochs_burnin", "marglik_frequency", "n_hypersteps", "lr_hyp",
        "likelihood", "sigma_noise_init", "temperature", "prior", "prior_prec_init",
        "hyper_solver", "network_gradient", "curvature", "hessian_root", "mc_samples",
        "kfac_approx", "deterministic",
    )  # fmt: skip
    options = {name: getattr(config, name) for name in same}
    options["restarts"] = "auto" if config.restarts == ("auto",) else list(config.restarts)
    options["optimizer_cls"] = _OPTIMIZERS[config.optimizer]
    options["optimizer_kwargs"] = {"lr": config.lr}
    if config.momentum is not None:
        options["optimizer_kwargs"]["momentum"] = config.momentum
    if config.scheduler == "cosine":
        options["scheduler_cls"] = CosineAnnealingLR
        options["scheduler_kwargs"] = {"T_max": config.n_epochs * task.n_batches}
    return options


def _summary(
    config: RunConfig, result: MargLikResult, held_out: dict[str, float] | None, seconds: float
) -> dict[str, Any]:
    return {
        "command": "run",
        "id": run_id(config),
        "config": plain_config(config),
        "versions": versions(),
        "seconds": seconds,
        "held_out": held_out,
        "log_marginal_likelihood_per_datum": result.log_marginal_likelihood / result.n_data,
        **result.to_dict(),
    }
