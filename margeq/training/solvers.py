"""Inner solvers: many cheap hyperparameter steps on the eigenvalues of one curvature pass."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, CurvatureError, NumericalWarning
from margeq.laplace import Spectrum, effective_parameters, evidence, hyper_gradient
from margeq.likelihoods import Gaussian, Likelihood
from margeq.parameters import requiring_grad
from margeq.priors import GaussianPrior

__all__ = ["HyperSolver", "hyper_solver", "mackay_step"]

_LOG_NOISE_RANGE = 17.0
_NOISE = "log_sigma_noise"
_REJECTIONS = 6
_TOLERATED_FALL = 0.01
_COSTLY_STEPS = 20
_SMALLEST_FRACTION = 1e-6


class HyperSolver(ABC):
    """Moves prior precisions and noise up the evidence, in place."""

    @abstractmethod
    def refresh(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """A few steps after one curvature pass during training."""

    @abstractmethod
    def converge(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """As many steps as it takes, at the end of a run."""

    def state_dict(self) -> dict[str, Any]:
        """What lives on between refreshes; most solvers remember nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        return


class MacKay(HyperSolver):
    """Fixed point ``delta = gamma / |theta|^2``, ``sigma^2 = SSE / (N K - T gamma)``.

    With a noise per output ``sigma_c^2 = SSE_c / (N - T gamma_c)``, where ``gamma_c`` is what
    output ``c`` contributes to the effective parameters, ``-1/2 d log det / d log sigma_c``.
    A precision of several tensors has their ``gamma``, and their norms relative to their offsets.

    Args:
        steps: iterations per refresh; three choose the same paths as twenty.
    """

    def __init__(self, steps: int = 3) -> None:
        self._steps = steps

    def refresh(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Iterate a fixed number of times."""
        for _ in range(self._steps):
            mackay_step(spectrum, prior, likelihood)

    def converge(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Iterate until logarithms move by less than 1e-6.

        With a noise per output each step decomposes factors anew, so that L-BFGS takes over soon.
        """
        for _ in range(_COSTLY_STEPS if likelihood.weighs_outputs else 1000):
            if mackay_step(spectrum, prior, likelihood) < 1e-6:
                return
        if likelihood.weighs_outputs:
            Lbfgs().converge(spectrum, prior, likelihood)


class AdamSolver(HyperSolver):
    """Adam on log precisions and log noise; its moments live on between refreshes.

    A refresh that ends clearly (0.01 nats per datum) below where it began is taken back and
    repeated with half the step.

    Args:
        steps: steps per refresh.
        lr: step size in log units.
    """

    def __init__(self, steps: int, lr: float) -> None:
        self._steps, self._lr = steps, lr
        self._vector: nn.Parameter | None = None
        self._adam: torch.optim.Adam | None = None

    def refresh(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Take the steps, halving the step size until the evidence does not fall."""
        before = float(evidence(spectrum, prior, likelihood).total)
        saved = _read(prior, likelihood)
        vector, adam = self._optimizer(len(saved))
        memory = deepcopy(adam.state_dict())
        for _ in range(_REJECTIONS):
            for _ in range(self._steps):
                self._step(vector, adam, spectrum, prior, likelihood)
            after = float(evidence(spectrum, prior, likelihood).total)
            # Adam circles an optimum; only a clear fall means that the step is too large
            if math.isfinite(after) and after >= before - _TOLERATED_FALL * spectrum.n_data:
                return
            _write(saved, prior, likelihood)
            adam.load_state_dict(deepcopy(memory))
            self._lr *= 0.5
            warnings.warn(
                f"hyperparameter steps lowered the evidence from {before:.6g} to {after:.6g} and "
                f"were taken back; step size halved to {self._lr:g}",
                NumericalWarning,
                stacklevel=2,
            )
        raise CurvatureError(
            f"no hyperparameter step size down to {self._lr:g} raises the evidence; lower lr_hyp "
            f"or use hyper_solver='mackay'"
        )

    def converge(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Hand over to L-BFGS, which reaches the optimum that Adam approaches."""
        Lbfgs().converge(spectrum, prior, likelihood)

    def state_dict(self) -> dict[str, Any]:
        """Step size, and moments if there were steps."""
        if self._vector is None or self._adam is None:
            return {"lr": self._lr}
        size = self._vector.numel()
        return {"lr": self._lr, "size": size, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with this step size and these moments."""
        self._lr = state["lr"]
        if "adam" in state:
            _, adam = self._optimizer(state["size"])
            adam.load_state_dict(state["adam"])

    def _optimizer(self, size: int) -> tuple[nn.Parameter, torch.optim.Adam]:
        if self._vector is None or self._adam is None:
            self._vector = nn.Parameter(torch.zeros(size, dtype=torch.float64))
            self._adam = torch.optim.Adam([self._vector], lr=self._lr)
        return self._vector, self._adam

    def _step(
        self,
        vector: nn.Parameter,
        adam: torch.optim.Adam,
        spectrum: Spectrum,
        prior: GaussianPrior,
        likelihood: Likelihood,
    ) -> None:
        names = list(_read(prior, likelihood))
        _, grads = hyper_gradient(spectrum, prior, likelihood)
        with torch.no_grad():
            values = list(_read(prior, likelihood).values())
            vector.copy_(torch.tensor(values, dtype=vector.dtype))
        flat = _scalars(grads)
        vector.grad = -torch.tensor([flat[name] for name in names], dtype=vector.dtype)
        adam.param_groups[0]["lr"] = self._lr
        adam.step()
        _write(dict(zip(names, vector.tolist(), strict=True)), prior, likelihood)


class Fixed(HyperSolver):
    """Hyperparameters stay as they are: plain MAP training, whose evidence is still reported."""

    def refresh(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Nothing moves."""

    def converge(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Nothing moves."""


class Lbfgs(HyperSolver):
    """L-BFGS-B of scipy within the bounds of the log precisions.

    Args:
        steps: iterations per refresh.
    """

    def __init__(self, steps: int = 20) -> None:
        self._steps = steps

    def refresh(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """A limited number of iterations."""
        self._minimise(spectrum, prior, likelihood, self._steps)

    def converge(self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> None:
        """Until the gradient vanishes."""
        self._minimise(spectrum, prior, likelihood, 1000)

    def _minimise(
        self, spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood, steps: int
    ) -> None:
        from scipy.optimize import minimize

        start = _read(prior, likelihood)
        names = list(start)

        def negative(values: np.ndarray) -> tuple[float, np.ndarray]:
            _write(dict(zip(names, values, strict=True)), prior, likelihood)
            value, grads = hyper_gradient(spectrum, prior, likelihood)
            flat = _scalars(grads)
            return -value, -np.array([flat[name] for name in names])

        bounds = [
            prior.bounds(name)
            if name in prior.log_center
            else (-_LOG_NOISE_RANGE, _LOG_NOISE_RANGE)
            for name in names
        ]
        options = {"maxiter": steps, "ftol": 1e-14, "gtol": 1e-8}
        values = np.array([start[name] for name in names])
        found = minimize(
            negative, values, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        _write(dict(zip(names, found.x, strict=True)), prior, likelihood)


@torch.no_grad()
def mackay_step(spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood) -> float:
    """One MacKay update of every precision and of the noise, damped where it would overshoot.

    In log space the fixed point lies uphill of every hyperparameter, so halving a step that
    lowers the evidence ends in one that does not. (Undamped, noise and precisions can swing
    between two states when there are more weights than observations.)

    Returns:
        The largest change of a logarithm.
    """
    before = _read(prior, likelihood)
    start = float(evidence(spectrum, prior, likelihood).total)
    target = _fixed_point(spectrum, prior, likelihood)
    fraction = 1.0
    while fraction > _SMALLEST_FRACTION:
        mixed = {name: old + fraction * (target[name] - old) for name, old in before.items()}
        _write(mixed, prior, likelihood)
        value = float(evidence(spectrum, prior, likelihood).total)
        if value >= start - 1e-12 * abs(start):
            return max((abs(mixed[name] - old) for name, old in before.items()), default=0.0)
        fraction *= 0.5
    _write(before, prior, likelihood)
    return 0.0


def _fixed_point(
    spectrum: Spectrum, prior: GaussianPrior, likelihood: Likelihood
) -> dict[str, float]:
    """Logarithms of ``gamma / sum_t exp(offset_t) |theta_t|^2`` within bounds, and of the noise."""
    gammas = effective_parameters(spectrum, prior, likelihood)
    target = _read(prior, likelihood)
    for group in prior.log_prior_precision:
        members = prior.members(group)
        gamma = sum(float(gammas[name]) for name in members)
        square_norm = sum(
            math.exp(prior.log_offset[name]) * float(spectrum.square_norms[name])
            for name in members
        )
        if square_norm > 0:
            low, high = prior.bounds(group)
            ratio = math.log(gamma / square_norm) if gamma > 0 else low
            target[group] = min(max(ratio, low), high)
    if isinstance(likelihood, Gaussian):
        if likelihood.log_sigma_noise.ndim:
            found = _noise_targets(spectrum, prior, likelihood)
        else:
            total = sum(float(gamma) for gamma in gammas.values())
            n_targets, squares = spectrum.n_data * spectrum.fit.numel(), float(spectrum.fit.sum())
            before = float(likelihood.log_sigma_noise)
            found = [_noise_target(squares, n_targets - likelihood.temperature * total, before)]
        target.update(zip(_scalars({_NOISE: likelihood.log_sigma_noise}), found, strict=True))
    return target


def _noise_targets(spectrum: Spectrum, prior: GaussianPrior, likelihood: Gaussian) -> list[float]:
    """The noise of each output."""
    leaf = likelihood.log_sigma_noise
    with requiring_grad([leaf]), torch.enable_grad():
        log_determinant = evidence(spectrum, prior, likelihood).log_determinant
        (slopes,) = torch.autograd.grad(log_determinant, leaf)
    free = spectrum.n_data + 0.5 * likelihood.temperature * slopes
    pairs = zip(spectrum.fit.tolist(), free.tolist(), leaf.tolist(), strict=True)
    return [_noise_target(*pair) for pair in pairs]


def _noise_target(squares: float, free: float, before: float) -> float:
    if free <= 0:
        # more effective parameters than observations: the evidence asks for more noise
        return before + 1.0
    return 0.5 * math.log(max(squares, 1e-300) / free)


def _scalars(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers by name; those of a vector by name and place."""
    found: dict[str, float] = {}
    for name, tensor in tensors.items():
        values = tensor.detach().flatten().tolist()
        places = [name] if tensor.ndim == 0 else [f"{name}[{i}]" for i in range(len(values))]
        found.update(zip(places, values, strict=True))
    return found


def _read(prior: GaussianPrior, likelihood: Likelihood) -> dict[str, float]:
    return _scalars({**prior.log_prior_precision, **likelihood.hyperparameters})


def _write(values: dict[str, float], prior: GaussianPrior, likelihood: Likelihood) -> None:
    prior.assign({name: v for name, v in values.items() if name in prior.log_prior_precision})
    if isinstance(likelihood, Gaussian):
        before = likelihood.log_sigma_noise
        named = [values[name] for name in _scalars({_NOISE: before})]
        clamped = torch.tensor(named, dtype=torch.float64).clamp(
            -_LOG_NOISE_RANGE, _LOG_NOISE_RANGE
        )
        likelihood.log_sigma_noise = clamped.reshape(before.shape)


def hyper_solver(name: str, steps: int, lr: float) -> HyperSolver:
    """The solver of a name.

    Returns:
        A solver with a memory of its own.

    Raises:
        ConfigError: for an unknown name.
    """
    if name == "mackay":
        return MacKay()
    if name == "adam":
        return AdamSolver(steps, lr)
    if name == "lbfgs":
        return Lbfgs(steps)
    if name == "fixed":
        return Fixed()
    raise ConfigError(f"hyper_solver={name!r}: use 'mackay', 'adam', 'lbfgs' or 'fixed'")
