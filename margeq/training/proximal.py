"""MAP steps that treat the prior implicitly, in the optimizer's own metric.

The optimizer sees the gradient ``g`` of the mean tempered negative log-likelihood only; after its
step the weights are shrunk by the proximal map of the prior in the same metric,

    Adam-like:  w <- (w - lr * m / d) / (1 + lr * delta / (N d)),   d = sqrt(v) + eps
    SGD:        w <- (w - lr * b) / (1 + lr * c * delta / N),       c -> (1 - damp) / (1 - momentum)

where ``c`` is what a constant unit gradient would have built up in the momentum ``b`` so far,
so that the fixed point is the MAP, ``N g + delta w = 0``, and any ``delta`` is stable. Decoupled
weight decay has another fixed point; explicit L2 diverges for large ``delta``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from margeq.errors import CheckpointError, ConfigError, NumericalWarning

__all__ = ["ProximalSteps", "build_optimizer", "build_scheduler", "scheduler_state"]

Group = Mapping[str, Any]
Memory = dict[nn.Parameter, float]
StepGain = Callable[[Optimizer, Group, nn.Parameter, Memory], "Tensor | float"]


def build_optimizer(
    optimizer_cls: type[Optimizer], parameters: list[nn.Parameter], kwargs: Mapping[str, Any] | None
) -> Optimizer:
    """Instantiate the user's optimizer without its own weight decay; ``kwargs`` stay untouched.

    Returns:
        The optimizer.

    Raises:
        ConfigError: for a weight decay, ``maximize``, a closure-based optimizer, or arguments that
            the optimizer does not take.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ConfigError(f"optimizer_cls={optimizer_cls!r} is no optimizer class, such as Adam")
    options = dict(kwargs or {})
    if options.get("weight_decay"):
        raise ConfigError(
            f"optimizer_kwargs has weight_decay={options['weight_decay']}; the prior precisions "
            f"take its place and are learned, so leave it out"
        )
    try:
        optimizer = optimizer_cls(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{optimizer_cls.__name__} does not take {options}: {error}") from error
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS needs a closure over all data; use Adam or SGD for the MAP steps")
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ConfigError("optimizer_kwargs: maximize=True would climb the loss")
        if "weight_decay" in group:  # e.g. the default of AdamW
            group["weight_decay"] = 0.0
    return optimizer


def build_scheduler(
    scheduler_cls: Callable[..., Any] | None, optimizer: Optimizer, kwargs: Mapping[str, Any] | None
) -> Any:
    """Instantiate the user's scheduler, if any.

    Returns:
        An object with ``step()``, or ``None``.

    Raises:
        ConfigError: for arguments it does not take, or one that steps on a metric.
    """
    if scheduler_cls is None:
        return None
    try:
        scheduler = scheduler_cls(optimizer, **dict(kwargs or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler_cls does not take {dict(kwargs or {})}: {error}") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau needs a metric; use a schedule such as cosine annealing"
        )
    return scheduler


def scheduler_state(scheduler: Any) -> dict[str, Any] | None:
    """State of the user's scheduler, if any.

    Returns:
        ``None`` without a scheduler.

    Raises:
        CheckpointError: for a scheduler that has no state to go on from.
    """
    if scheduler is None:
        return None
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise CheckpointError(
            f"{type(scheduler).__name__} has no state_dict() and load_state_dict(), so it cannot "
            f"be resumed; give it both, or leave checkpoint_dir out"
        )
    return scheduler.state_dict()


class ProximalSteps:
    """Steps of an optimizer on the log joint density of data and weights.

    Args:
        optimizer: holds the likelihood's gradients only.
        weights: tensors that have a prior, by name.
        n_data: ``N``, the number of data behind the mean loss.
    """

    def __init__(
        self, optimizer: Optimizer, weights: Mapping[str, nn.Parameter], n_data: int
    ) -> None:
        self.optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in weights.items()}
        self._n_data = n_data
        self._memory: Memory = {}
        self._gain = _STEP_GAINS.get(type(optimizer))
        if self._gain is None:
            warnings.warn(
                f"the preconditioner of {type(optimizer).__name__} is not known; the prior enters "
                f"as explicit L2, which is unstable for large precisions (use Adam, AdamW or SGD)",
                NumericalWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, precisions: Mapping[str, float]) -> None:
        """One step on gradients that are already there; ``precisions`` by weight name."""
        if self._gain is None:
            self._explicit(precisions)
            self.optimizer.step()
            return
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                gain = self._gain(self.optimizer, group, parameter, self._memory)
                strength = float(group["lr"]) * precisions[name] / self._n_data
                parameter.div_(1.0 + strength * gain)

    def forget(self, names: set[str]) -> None:
        """Drop the optimizer's memory of some weights, e.g. of a path that starts anew."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if self._names.get(id(parameter)) in names:
                    self.optimizer.state.pop(parameter, None)
                    self._memory.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and what constant gradients would have built up in momenta."""
        memory = {
            index: self._memory[parameter]
            for index, parameter in enumerate(self._parameters())
            if parameter in self._memory
        }
        return {"optimizer": self.optimizer.state_dict(), "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.optimizer.load_state_dict(state["optimizer"])
        parameters = self._parameters()
        self._memory = {parameters[index]: value for index, value in state["memory"].items()}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _explicit(self, precisions: Mapping[str, float]) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None and parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=precisions[name] / self._n_data)


def _sgd_gain(optimizer: Optimizer, group: Group, parameter: nn.Parameter, memory: Memory) -> float:
    momentum = group["momentum"]
    if not momentum:
        return 1.0
    # the first buffer is the bare gradient, later ones mix as torch does
    before = memory.get(parameter)
    now = 1.0 if before is None else momentum * before + 1.0 - group["dampening"]
    memory[parameter] = now
    return 1.0 + momentum * now if group["nesterov"] else now


def _adam_gain(
    optimizer: Optimizer, group: Group, parameter: nn.Parameter, memory: Memory
) -> Tensor:
    state = optimizer.state[parameter]
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    return 1.0 / ((second / correction).sqrt() + group["eps"])


_STEP_GAINS: dict[type[Optimizer], StepGain] = {
    SGD: _sgd_gain,
    Adam: _adam_gain,
    AdamW: _adam_gain,
}
