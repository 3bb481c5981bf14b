"""One training run from one start: MAP steps on the weights, evidence steps on the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from margeq.accumulation import CurvatureState
from margeq.checkpoint import require_same_tensors
from margeq.comm import require_equal
from margeq.distributed.eigen import decompose
from margeq.errors import CurvatureError, NonFiniteError
from margeq.laplace import Spectrum, effective_parameters, evidence
from margeq.likelihoods import Gaussian
from margeq.paths import path_prefixes, path_sums
from margeq.training.bookmark import Bookmark
from margeq.training.epoch import MapEpoch
from margeq.training.history import Callback, Event, History, Update
from margeq.training.network import NetworkSteps, NetworkStepsOptions
from margeq.training.normalisation import HeldNorms
from margeq.training.outcome import Outcome
from margeq.training.passes import Passes
from margeq.training.problem import Problem
from margeq.training.proximal import (
    ProximalSteps,
    build_optimizer,
    build_scheduler,
    scheduler_state,
)
from margeq.training.ranks import tensors_that_agree
from margeq.training.solvers import hyper_solver
from margeq.training.starts import Start, apply_start, draw_path
from margeq.training.switching import PathSwitch

__all__ = ["Run"]


class Run:
    """MAP steps, epoch by epoch, and evidence steps in between.

    The model holds the last weights afterwards, the outcome the best.

    Args:
        problem: model and data.
        start: where to begin; the model is put there.
        emit: receives events.
        bookmark: where the pass over the training data stands.
    """

    def __init__(self, problem: Problem, start: Start, emit: Callback, bookmark: Bookmark) -> None:
        self._p, self._start, self._emit = problem, start, emit
        self._prior, self._likelihood = problem.prior.copy(), deepcopy(problem.likelihood)
        model, weights, plan = problem.model, problem.weights, problem.schedule
        apply_start(
            model,
            weights,
            self._prior,
            problem.scale,
            start,
            function_scale_prior=problem.function_scale_prior,
            seed=problem.seed,
            hyperparameters=problem.hyperparameters.values(),
        )
        self._norms = HeldNorms(model, weights, problem.scale, problem.first_inputs)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(plan.optimizer_cls, trainable, plan.optimizer_kwargs)
        self._steps = ProximalSteps(optimizer, weights, problem.n_data)
        self._scheduler = build_scheduler(plan.scheduler_cls, optimizer, plan.scheduler_kwargs)
        self._epoch = MapEpoch(problem, self._steps, self._norms, self._scheduler, bookmark)
        self._solver = hyper_solver(plan.hyper_solver, plan.n_hypersteps, plan.lr_hyp)
        self._network = NetworkSteps(
            model,
            problem.hyperparameters,
            NetworkStepsOptions(plan.network_gradient, plan.lr_hyp, plan.n_hypersteps),
            problem.parameters,
        )
        self._switch = PathSwitch(plan.n_updates)
        self._passes = Passes(problem)
        self._history = History()
        self._best: Outcome | None = None

    @property
    def epoch(self) -> int:
        """Number of epochs that are done."""
        return len(self._history.losses)

    @property
    def last_evidence(self) -> float | None:
        """Log marginal likelihood after the last epoch, if it was computed then."""
        updates = self._history.updates
        due = updates and updates[-1].epoch == self.epoch
        return updates[-1].log_marginal_likelihood if due else None

    @property
    def best(self) -> Outcome | None:
        """The best state so far, if there was an update."""
        return self._best

    @property
    def is_due(self) -> bool:
        """Whether the hyperparameter update after the last epoch is still to come."""
        epoch = self.epoch
        return epoch > 0 and self._p.schedule.is_due(epoch) and self.last_evidence is None

    # -- weights ---------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """One more pass of MAP steps."""
        epoch = self.epoch + 1
        precisions = {n: float(self._prior.log_precision_of(n).exp()) for n in self._p.weights}
        loss = self._epoch.run(epoch, self._likelihood, precisions)
        self._history.losses.append(loss)
        self._emit(Event("epoch", {"epoch": epoch, "loss": loss}))

    # -- hyperparameters -------------------------------------------------------------------------

    def update(self) -> None:
        """One curvature pass after the last epoch, and the hyperparameter steps on it."""
        epoch = self.epoch
        began = time.perf_counter()
        self._require_alike()
        state = self._passes.curvature(epoch, self._likelihood)
        spectrum = decompose(state, self._p.comm)
        self._solver.refresh(spectrum, self._prior, self._likelihood)
        terms = evidence(spectrum, self._prior, self._likelihood)
        value = float(terms.total)
        if not math.isfinite(value):
            raise NonFiniteError(f"epoch {epoch}: the evidence is {value}; lower lr_hyp")
        by_share = self._passes.shares()
        gammas = effective_parameters(spectrum, self._prior, self._likelihood)
        noise = self._likelihood.sigma_noise if isinstance(self._likelihood, Gaussian) else None
        update = Update(
            epoch=epoch,
            log_marginal_likelihood=value,
            log_likelihood=float(terms.log_likelihood),
            occam=float(terms.occam),
            prior_precision={g: float(d) for g, d in self._prior.prior_precision.items()},
            effective={name: float(gamma) for name, gamma in gammas.items()},
            function_share=by_share,
            sigma_noise=None if noise is None else noise.tolist(),
            captured_trace=state.captured_trace,
            clamped=spectrum.clamped,
            seconds=self._p.comm.gather(time.perf_counter() - began)[0],
            hyperparameters={
                name: tensor.detach().flatten().tolist()
                for name, tensor in self._p.hyperparameters.items()
            },
        )
        self._history.updates.append(update)
        self._keep_best(epoch, value, spectrum)
        self._emit(Event("update", {"start": self._start.name, **vars(update)}))
        # after the kept state was copied: the evidence of this update is that before the step;
        # before paths are switched: the curvature is that of the present ones
        if epoch < self._p.schedule.n_epochs:
            self._step_network(epoch, state)
        if self._start.only is None and by_share:
            self._switch_paths(epoch, by_share)

    def _step_network(self, epoch: int, state: CurvatureState) -> None:
        p = self._p
        if p.hyperparameters and p.schedule.hyper_solver != "fixed":
            self._network.step(
                state, self._prior, self._likelihood, p.marglik_loader, p.draws(epoch),
                batch_fn=p.batch_fn, comm=p.comm,
            )  # fmt: skip

    def _require_alike(self) -> None:
        """Ranks that have drifted apart would decide differently from here on."""
        if self._p.comm.size == 1:
            return
        logs = {f"log precision of {n}": v for n, v in self._prior.log_prior_precision.items()}
        noise = self._likelihood.hyperparameters
        tensors = tensors_that_agree(self._p.model, self._p.train_loader, self._p.marglik_loader)
        require_equal(self._p.comm, {**tensors, **self._p.hyperparameters, **logs, **noise})

    def _keep_best(self, epoch: int, value: float, spectrum: Spectrum) -> None:
        if self._best is not None and value <= self._best.log_marginal_likelihood:
            return
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._state().items()}
        self._best = Outcome(
            start=self._start.name,
            log_marginal_likelihood=value,
            epoch=epoch,
            model_state=state,
            prior=self._prior.copy(),
            likelihood=deepcopy(self._likelihood),
            spectrum=spectrum,
            history=self._history,
            hyperparameters=self._hyperparameters(),
            held_norms=self._norms.units,
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on, but random numbers; by section."""
        return {
            "model": {
                "state": self._state(),
                "buffers": dict(self._p.model.named_buffers()),
                "hyperparameters": dict(self._p.hyperparameters),
            },
            "optimizer": {
                "steps": self._steps.state_dict(),
                "scheduler": scheduler_state(self._scheduler),
            },
            "hyper": {
                "prior": self._prior.state_dict(),
                "likelihood": self._likelihood.state_dict(),
                "solver": self._solver.state_dict(),
                "network": self._network.state_dict(),
            },
            "best": None if self._best is None else self._best.state_dict(),
            "progress": {
                "switch": self._switch.state_dict(),
                "norms": self._norms.state_dict(),
                "history": self._history.to_dict(),
                "passes": self._passes.state_dict(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another process was.

        Raises:
            CheckpointMismatch: for a state of another model; nothing has changed then.
        """
        live = self.state_dict()["model"]
        for part, tensors in live.items():
            require_same_tensors(state["model"][part], tensors, f"model {part}")
        self._p.model.load_state_dict(state["model"]["state"])
        with torch.no_grad():
            for part in ("buffers", "hyperparameters"):
                for name, tensor in live[part].items():
                    tensor.copy_(state["model"][part][name])
        self._steps.load_state_dict(state["optimizer"]["steps"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["optimizer"]["scheduler"])
        self._prior.load_state_dict(state["hyper"]["prior"])
        self._likelihood.load_state_dict(state["hyper"]["likelihood"])
        self._solver.load_state_dict(state["hyper"]["solver"])
        self._network.load_state_dict(state["hyper"]["network"])
        progress = state["progress"]
        self._switch.load_state_dict(progress["switch"])
        self._norms.load_state_dict(progress["norms"])
        self._passes.load_state_dict(progress["passes"])
        self._history = History.from_dict(progress["history"])
        if state["best"] is not None:
            self._best = Outcome.from_state(state["best"], self._p, self._history)

    def _hyperparameters(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self._p.hyperparameters.items()}

    def _state(self) -> dict[str, Any]:
        return self._p.model.state_dict()

    # -- paths -----------------------------------------------------------------------------------

    def _switch_paths(self, epoch: int, by_share: Mapping[str, Mapping[str, float]]) -> None:
        sums = path_sums(self._p.model)
        active = {layer: sums[layer].active for layer in by_share}
        off, probe = self._switch.decide(by_share, active)
        for layer, path in off:
            sums[layer].switch_off(path)
            with torch.no_grad():
                for name in self._tensors_of(layer, path):
                    self._p.weights[name].zero_()
        for layer, path in probe:
            sums[layer].switch_on(path)
            names = self._tensors_of(layer, path)
            relaxed = self._p.scale.path_outputs[layer][path]
            seed = self._p.seed + epoch
            draw_path(self._p.weights, names, self._prior, self._p.scale, relaxed, seed)
            self._steps.forget(set(names))
        if off or probe:
            self._norms.refresh()
        for kind, changes in (("off", off), ("probe", probe)):
            for layer, path in changes:
                record = {"epoch": epoch, "layer": layer, "path": path, "to": kind}
                self._history.switches.append(record)
                self._emit(Event("switch", record))

    def _tensors_of(self, layer: str, path: str) -> list[str]:
        prefix = path_prefixes(self._p.model)[layer][path]
        return [name for name in self._p.weights if name.startswith(f"{prefix}.")]

    # -- result ----------------------------------------------------------------------------------

    def failure(self, error: CurvatureError) -> Outcome:
        """What is left of a run that failed numerically."""
        name = self._start.name
        prior, likelihood, units = self._prior, self._likelihood, self._norms.units
        return Outcome(
            name, -math.inf, 0, {}, prior, likelihood, None, self._history, {}, units, error
        )

    def outcome(self) -> Outcome:
        """The best state, with its hyperparameters converged on its own curvature."""
        best = self._best
        assert best is not None
        assert best.spectrum is not None
        self._solver.converge(best.spectrum, best.prior, best.likelihood)
        value = float(evidence(best.spectrum, best.prior, best.likelihood).total)
        return replace(best, log_marginal_likelihood=value)
