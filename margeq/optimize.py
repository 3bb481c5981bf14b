"""The one call: train a model and learn its hyperparameters from the training data alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from margeq.adjoint import Revisit
from margeq.callbacks import Callback, Event, progress_callback
from margeq.checkpoint import Checkpoints
from margeq.comm import Comm, current_comm, together
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.likelihoods import Likelihood, as_likelihood
from margeq.parameters import (
    named_weights,
    require_names,
    require_one_device,
    requiring_grad,
    unwrapped,
)
from margeq.priors import GaussianPrior
from margeq.training.conclusion import conclude
from margeq.training.guards import (
    Rewind,
    deterministic_algorithms,
    random_devices,
    transaction,
)
from margeq.training.interruption import listening
from margeq.training.network import NetworkStepsOptions, collect_hyperparameters
from margeq.training.problem import Schedule, first_look
from margeq.training.randomness import Randomness
from margeq.training.ranks import require_same_call
from margeq.training.restarts import Restarts
from margeq.training.result import MargLikResult
from margeq.training.run_directory import as_checkpoints, open_directory
from margeq.training.saving import Saving
from margeq.training.settings import described
from margeq.training.starts import resolve_starts

__all__ = ["MargLikResult", "optimize_marglik"]


def optimize_marglik(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    likelihood: str | Likelihood = "classification",
    prior: str | Mapping[str, str] | GaussianPrior = "layerwise",
    marglik_loader: Iterable[Any] | None = None,
    n_epochs: int = 300,
    n_epochs_burnin: int = 10,
    marglik_frequency: int = 5,
    n_hypersteps: int = 20,
    optimizer_cls: type[Optimizer] = Adam,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    scheduler_cls: Callable[..., Any] | None = None,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    lr_hyp: float = 0.1,
    prior_prec_init: str | float | Mapping[str, float] = "function-scale",
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    hyper_solver: str = "mackay",
    hyperparameters: Sequence[Tensor] = (),
    network_gradient: str | Revisit = "auto",
    parameters: str | Sequence[str] = "all",
    curvature: str | KfacOptions = "kfac",
    backend: str = "margeq",
    hessian_root: str = "adaptive",
    mc_samples: int = 1,
    kfac_approx: str | Mapping[str, str] = "expand",
    restarts: str | Sequence[str] = "auto",
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    deterministic: bool = False,
    checkpoint_dir: str | Path | Checkpoints | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    progress: str = "auto",
    seed: int | None = None,
) -> MargLikResult:
    """Train ``model`` and learn prior precisions and noise by the Laplace marginal likelihood.

    Alternates MAP steps on the weights (proximal in the optimizer's metric) with evidence steps
    on the hyperparameters (ELLA section 4, Immer et al. 2021). The kept weights are those of the
    highest evidence over all restarts and updates. On any failure model, optimizer arguments and
    random state are as before. Ctrl-C ends the call after the step in progress, with the best state
    so far in the model; a second one aborts it.

    In a process group of torch.distributed all ranks make this call alike, each with loaders of
    its own share of the data, and have the same result: that of all data together.

    Args:
        model: any module whose trainable tensors have curvature rules; trained in place. With
            candidate paths in it, every start but ``"current"`` draws all its weights anew. What
            wraps it, such as DistributedDataParallel, is left out.
        train_loader: re-iterable batches ``(inputs, targets)``; of several ranks each has its
            share, see :func:`margeq.distributed.shard`, which may be empty.
        likelihood: ``"classification"``, ``"regression"`` (one noise), ``"regression-per-output"``
            (a noise per output), or a likelihood object (copied).
        prior: structure of the precisions, ``"layerwise"``, ``"tied"`` (one precision for the
            factors of a product, as in factored and separable layers), ``"scalar"``,
            ``"pathwise"`` or a mapping, or a :class:`margeq.GaussianPrior` (copied).
        marglik_loader: data of the evidence, without augmentation; default ``train_loader``.
        n_epochs: epochs of each run.
        n_epochs_burnin: epochs before the first hyperparameter update.
        marglik_frequency: epochs between updates; the last epoch always has one.
        n_hypersteps: steps per update of ``"adam"`` and ``"lbfgs"`` (MacKay takes three), and of
            lengthscales in closed form; other tensors inside the network take one.
        optimizer_cls: ``Adam``, ``AdamW`` or ``SGD``; others get an explicit L2 prior.
        optimizer_kwargs: without ``weight_decay``; never changed.
        scheduler_cls: learning-rate scheduler, stepped after every batch.
        scheduler_kwargs: for it.
        lr_hyp: step size of ``hyper_solver="adam"``, and of ``hyperparameters``, in their units.
        prior_prec_init: ``"function-scale"``, a number, or one number per group.
        sigma_noise_init: initial noise for ``"regression"``, in units of the targets.
        temperature: ``T`` of the likelihood.
        hyper_solver: ``"mackay"``, ``"adam"``, ``"lbfgs"``, or ``"fixed"`` for plain MAP training
            with precisions, noise and hyperparameters inside the network as they begin.
        hyperparameters: leaf tensors that the model's output depends on, besides those that
            its layers declare: the evidence alone moves them, the training loss never does.
            A parameter that no layer declares counts as a weight again afterwards: freeze it.
        network_gradient: how their gradient is found: ``"exact"`` (two-phase pass), ``"sketched"``
            (one random column on a tenth of the batches), ``"closed-form"`` (lengthscales at
            fixed filters), ``"auto"`` (closed form where it exists, sketched elsewhere), or a
            :class:`margeq.adjoint.Revisit`.
        parameters: ``"all"``, ``"last_layer"``, or names of weights or modules to integrate out;
            others are trained without prior.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diag"``, ``"full"``, or
            :class:`margeq.curvature.options.KfacOptions` for all details (it then replaces
            ``hessian_root``, ``mc_samples`` and ``kfac_approx``). With ``hessian_root="exact"``
            the last three are bounds on the evidence of the full GGN (``flavour.is_bound``).
        backend: ``"margeq"``; or ``"backpack"`` or ``"asdl"`` for the same factors from another
            library, with ``hessian_root="exact"``.
        hessian_root: ``"adaptive"``, ``"exact"`` or ``"mc"``.
        mc_samples: columns of the Monte-Carlo root.
        kfac_approx: ``"expand"``, ``"reduce"``, or a mapping by layer name.
        restarts: ``"auto"`` (the symmetric start, a free start, and each path alone; one run from
            the current weights without candidate paths), or names of starts. A name can end in
            ``"@whole"`` or ``"@identity"``: group gates that the evidence trains then begin at the
            whole group, or at the identity alone, instead of where the model has them. With such
            gates ``"auto"`` also has its first start from both of these ends.
        batch_fn: turns a batch into ``(inputs, targets)``.
        deterministic: use PyTorch's deterministic algorithms meanwhile.
        checkpoint_dir: directory of this one run, or :class:`margeq.checkpoint.Checkpoints`: its
            state is written there as often as 2 % of the time allow, without pickle. A process
            that was stopped or killed is resumed by the same call: with the same torch, threads
            and data it ends in the very same state, bit for bit.
        resume: go on from the newest valid checkpoint in ``checkpoint_dir``, if there is one; that
            of a finished run gives its result again. ``False`` removes the checkpoints there and
            starts anew.
        callbacks: functions of an event; called on rank 0 only.
        progress: ``"auto"`` (a bar on a terminal), ``"rich"`` or ``"none"``; on rank 0 only.
        seed: of starts and data order; ``None`` draws one from torch's random state (rank 0's).

    Returns:
        The result; ``model`` holds the kept weights, in the train/eval mode it had.

    Raises:
        ConfigError: for arguments that cannot work.
        DataError: for data that cannot be used.
        MissingRuleError: for a trainable tensor without a curvature rule.
        CurvatureError: if every restart failed numerically.
        CheckpointError: if ``checkpoint_dir`` is in use, cannot be written to (three times in a
            row), holds a run with other arguments, or nothing that can be trusted.
        KeyboardInterrupt: after SIGINT, when the state is saved in ``checkpoint_dir``, if given.
        SystemExit: likewise after SIGTERM and SIGUSR1, with code 143; only with
            ``checkpoint_dir``, and only in the main thread where no other handler is set.
        UnsupportedLayerError: on several ranks, for statistics over batches (BatchNorm).
        DistributedError: if another rank has ended, does not answer, or differs in its arguments
            or weights (DistributedMismatchError).

    Reference:
        van der Ouderaa, Immer & van der Wilk 2023.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> y = 2 * x + 0.1 * torch.cos(40 * x)
        >>> result = optimize_marglik(
        ...     torch.nn.Linear(1, 1), [(x, y)], likelihood="regression", n_epochs=200,
        ...     optimizer_kwargs={"lr": 0.1}, seed=0)
        >>> result.success, f"{float(result.likelihood.sigma_noise):.2f}"
        (True, '0.07')
    """
    comm = current_comm()
    with together(comm):
        model = _checked_model(model)
        _check_numbers(
            n_epochs=n_epochs, n_epochs_burnin=n_epochs_burnin, marglik_frequency=marglik_frequency,
            n_hypersteps=n_hypersteps, lr_hyp=lr_hyp, seed=seed,
        )  # fmt: skip
        _check_callbacks(callbacks)
        parameters = require_names(model, parameters)
        checkpoints = as_checkpoints(checkpoint_dir)
        inside = collect_hyperparameters(model, hyperparameters)
        NetworkStepsOptions(network_gradient, lr_hyp, n_hypersteps)
        if isinstance(likelihood, Likelihood) and (sigma_noise_init, temperature) != (1.0, 1.0):
            raise ConfigError("likelihood is an object: give it noise and temperature itself")
        likelihood_object = deepcopy(
            as_likelihood(likelihood, sigma_noise=sigma_noise_init, temperature=temperature)
        )
        if isinstance(curvature, KfacOptions) and backend not in ("margeq", curvature.backend):
            raise ConfigError(f"backend={backend!r}: give it to curvature=KfacOptions(...) itself")
        options = (
            curvature
            if isinstance(curvature, KfacOptions)
            else KfacOptions(
                hessian_root,
                mc_samples,
                kfac_approx=kfac_approx,
                curvature=curvature,
                backend=backend,
            )
        )
        _require_factors(inside, options, hyper_solver)
        schedule = Schedule(
            n_epochs, n_epochs_burnin, marglik_frequency, n_hypersteps, lr_hyp, hyper_solver,
            optimizer_cls, optimizer_kwargs, scheduler_cls, scheduler_kwargs, network_gradient,
        )  # fmt: skip
        moving = {} if hyper_solver == "fixed" else inside
        starts = resolve_starts(model, restarts, moving.values())
        bar = progress_callback(progress)
        loaders = (train_loader, marglik_loader)
        rewind, randomness = Rewind(model, loaders, inside.values()), Randomness(model, loaders)
        settings = described({
            "schedule": schedule, "likelihood": likelihood_object, "prior": prior,
            "prior_prec_init": prior_prec_init, "parameters": parameters, "curvature": options,
            "hyperparameters": list(inside), "starts": starts, "deterministic": deterministic,
            "seed": seed, "loaders": randomness.describe(),
        })  # fmt: skip
    require_same_call(
        comm, model, settings, inside, loaders, resume=resume,
        checkpoint_dir=checkpoints is None, marglik_loader=marglik_loader is None,
    )  # fmt: skip
    if comm.rank > 0:
        callbacks, bar = (), None
    emit = _Fan([*callbacks, *([bar] if bar else [])], comm)
    with ExitStack() as stack:
        where = checkpoints and Path(checkpoints.directory)
        interruption = stack.enter_context(listening(where, alone=comm.size == 1))
        watched = interruption.watched(batch_fn)
        stack.enter_context(transaction(rewind))
        # no gradient of the training loss can reach them
        stack.enter_context(requiring_grad(inside.values(), False))
        drawn_seed = comm.gather(int(torch.randint(2**31, ())))[0] if seed is None else seed
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=random_devices(model)))
        stack.enter_context(deterministic_algorithms(deterministic))
        directory = stack.enter_context(open_directory(checkpoints, resume, comm))
        run_seed = settings["seed"] = directory.seed(seed, drawn_seed)
        origin = rewind if checkpoints is None else Rewind(model, loaders, inside.values())
        directory.begin_at(origin, settings, randomness)
        if bar is not None:
            stack.enter_context(bar)
        problem = first_look(
            model, train_loader, marglik_loader, watched, likelihood_object, prior,
            prior_prec_init, parameters, options, schedule, run_seed, inside, comm,
        )  # fmt: skip
        saving = Saving(directory.writer(problem), interruption, directory.next_number, comm)
        runs = Restarts(problem, starts, origin, randomness, emit, settings, saving)
        interruption.restore_best = runs.restore_best
        directory.resume(runs, problem, randomness)
        result = conclude(problem, runs.run())
        emit(Event("result", {"log_marginal_likelihood": result.log_marginal_likelihood}))
        return result


def _checked_model(model: nn.Module) -> nn.Module:
    """The model itself, without wrappers."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if torch.is_inference_mode_enabled():
        raise ConfigError("training needs gradients; leave torch.inference_mode() first")
    require_one_device(model)
    named_weights(model)  # refuses lazy modules and shared storage before anything is copied
    return unwrapped(model)


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        if not callable(callback):
            raise ConfigError(f"callbacks holds {callback!r}, which cannot be called")


def _check_numbers(*, lr_hyp: float, seed: int | None, **counts: int) -> None:
    for name, value in counts.items():
        least = 0 if name == "n_epochs_burnin" else 1
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
    if counts["n_epochs_burnin"] > counts["n_epochs"]:
        raise ConfigError(
            f"n_epochs_burnin={counts['n_epochs_burnin']} > n_epochs={counts['n_epochs']}: no "
            f"hyperparameter would ever be learned; train longer or shorten the burn-in"
        )
    if not (isinstance(lr_hyp, (int, float)) and lr_hyp > 0 and math.isfinite(lr_hyp)):
        raise ConfigError(f"lr_hyp={lr_hyp!r} must be a positive, finite number")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ConfigError(f"seed={seed!r} must be None or an integer from 0 to 2**63 - 1")


def _require_factors(inside: Mapping[str, Tensor], options: KfacOptions, hyper_solver: str) -> None:
    if inside and options.curvature != "kfac" and hyper_solver != "fixed":
        raise ConfigError(
            f"curvature={options.curvature!r} cannot move hyperparameters inside the network "
            f"({', '.join(inside)}); use curvature='kfac', or freeze them with "
            f"requires_grad_(False)"
        )


class _Fan:
    """Hands each event to all callbacks; their errors are those of all ranks."""

    def __init__(self, callbacks: Sequence[Callback], comm: Comm) -> None:
        self._callbacks, self._comm = callbacks, comm

    def __call__(self, event: Event) -> None:
        with together(self._comm):
            for callback in self._callbacks:
                callback(event)
