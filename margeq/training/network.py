"""Evidence steps on hyperparameters inside the network; the training loss never sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from margeq.accumulation import CurvatureState
from margeq.adjoint import network_gradient
from margeq.closed_form import (
    FixedFilters,
    closed_form_gradient,
    factor_cotangent,
    fixed_filters,
    moved,
)
from margeq.comm import ALONE, Comm
from margeq.curvature.capture import eval_mode, forward
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, NonFiniteError
from margeq.likelihoods import Likelihood
from margeq.output_scales import of_scaled_outputs
from margeq.parameters import named_hyperparameters, requiring_grad
from margeq.paths import idle_parameters
from margeq.priors import GaussianPrior
from margeq.revisit import ALL_DATA, Revisit
from margeq.subsets import trained_gates

__all__ = [
    "NetworkSteps",
    "NetworkStepsOptions",
    "collect_hyperparameters",
    "require_finite",
    "require_influence",
]

_METHODS = ("auto", "exact", "sketched", "closed-form")
_SKETCH = Revisit(sketched=True, share=0.1)


def collect_hyperparameters(model: nn.Module, further: Sequence[Tensor]) -> dict[str, Tensor]:
    """What layers declare, and any leaf tensor of the caller's.

    Args:
        model: any module tree.
        further: parameters of the model, or other tensors that its output depends on.

    Returns:
        Name -> tensor; tensors outside the model are called ``hyperparameters[i]``.

    Raises:
        ConfigError: for something that is no floating-point leaf tensor, or one that cannot be
            written to element by element.
    """
    found: dict[str, Tensor] = dict(named_hyperparameters(model))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    if isinstance(further, (Tensor, Mapping)) or not isinstance(further, Iterable):
        raise ConfigError(f"hyperparameters is a {type(further).__name__}; pass a list of tensors")
    for index, tensor in enumerate(further):
        if not (isinstance(tensor, Tensor) and tensor.is_leaf and tensor.is_floating_point()):
            raise ConfigError(
                f"hyperparameters[{index}] is no floating-point leaf tensor; pass nn.Parameters, "
                f"or tensors that were not computed from others"
            )
        if all(tensor is not other for other in found.values()):
            found[name_of.get(id(tensor), f"hyperparameters[{index}]")] = tensor
    for name, tensor in found.items():
        _require_writable(name, tensor)
    _require_ascending(model, found)
    return found


def _require_ascending(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    # at its ends such a gate passes gradients of a loss, which lead the other way
    for name, gate in trained_gates(model, found.values()).items():
        if not gate.hyperparameter_names:
            raise ConfigError(
                f"hyperparameters: the gate {name!r} was made with trained_by='loss'; make it with "
                f"trained_by='evidence', which needs no hyperparameters="
            )


def _require_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise ConfigError(
            f"{name!r} was made in torch.inference_mode() and has no gradient; use its clone(), "
            f"made outside"
        )
    # elements in the order of their strides: each axis has to step over all that came before
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ConfigError(
                f"{name!r} is expanded: several of its elements share memory and cannot move on "
                f"their own; use its clone(), or the tensor before it was expanded"
            )
        reach += (size - 1) * stride


def require_finite(hyperparameters: Mapping[str, Tensor]) -> None:
    """Check that no hyperparameter begins as NaN or infinite, from where no step leads away.

    Raises:
        ConfigError: naming the first one that does.
    """
    for name, tensor in hyperparameters.items():
        unusable = int((~torch.isfinite(tensor.detach())).sum())
        if unusable:
            raise ConfigError(
                f"{name!r} begins with {unusable} of {tensor.numel()} values NaN or infinite; "
                f"give it finite ones"
            )


def require_influence(model: nn.Module, hyperparameters: Mapping[str, Tensor], inputs: Any) -> None:
    """Check that the model's output depends on each hyperparameter.

    Raises:
        ConfigError: naming the first one that it does not depend on.
    """
    if not hyperparameters:
        return
    with eval_mode(model), requiring_grad(hyperparameters.values()), torch.enable_grad():
        outputs = forward(model, inputs)
        grads: Sequence[Tensor | None] = [None] * len(hyperparameters)
        if outputs.requires_grad:
            leaves = list(hyperparameters.values())
            grads = torch.autograd.grad(outputs.sum(), leaves, allow_unused=True)
    for name, grad in zip(hyperparameters, grads, strict=True):
        if grad is None:
            raise ConfigError(
                f"the model's output does not depend on {name!r}; hyperparameters must take part "
                f"in the forward pass, undetached (freeze a declared one with "
                f"requires_grad_(False) to keep it as it is)"
            )


@dataclass(frozen=True)
class NetworkStepsOptions:
    """How the gradient inside the network is found, and how far a step goes.

    Attributes:
        method: ``"exact"`` (two-phase pass over all data), ``"sketched"`` (one random column on a
            tenth of the batches), ``"closed-form"`` (at fixed filters, no pass at all),
            ``"auto"`` (closed form where it exists, sketched for the rest), or a ``Revisit``.
        lr: step size of Adam.
        n_steps: steps per update of the closed form; the others take one.

    Raises:
        ConfigError: for an unknown method.
    """

    method: str | Revisit
    lr: float
    n_steps: int

    def __post_init__(self) -> None:
        if not (isinstance(self.method, Revisit) or self.method in _METHODS):
            raise ConfigError(f"network_gradient={self.method!r}: use one of {_METHODS}")

    @property
    def revisit(self) -> Revisit:
        """How the batches are visited for what has no closed form."""
        if isinstance(self.method, Revisit):
            return self.method
        return ALL_DATA if self.method == "exact" else _SKETCH

    @property
    def prefers_closed_form(self) -> bool:
        """Whether lengthscales with an invertible basis move at fixed filters."""
        return self.method in ("auto", "closed-form")


class NetworkSteps:
    """Climbs the evidence in hyperparameters inside the network, one update at a time.

    Args:
        model: in place.
        hyperparameters: by name.
        options: see there.
        parameters: as in :func:`margeq.named_weights`.

    Raises:
        ConfigError: if only the closed form is allowed and one of them has none.
    """

    def __init__(
        self,
        model: nn.Module,
        hyperparameters: Mapping[str, Tensor],
        options: NetworkStepsOptions,
        parameters: str | Sequence[str] = "all",
    ) -> None:
        self._model, self._options, self._parameters = model, options, parameters
        self._fixed: list[FixedFilters] = []
        if options.prefers_closed_form:
            self._fixed = fixed_filters(model, hyperparameters, parameters)
        closed = {candidate.hyperparameter for candidate in self._fixed}
        self._visited = {n: t for n, t in hyperparameters.items() if n not in closed}
        if options.method == "closed-form" and self._visited:
            raise ConfigError(
                f"network_gradient='closed-form': {sorted(self._visited)} have none (it needs a "
                f"lengthscale and a trained weight of one layer, with as many anchors as pixels, "
                f"anchors='grid', at which the basis can be inverted); use 'auto', 'exact' or "
                f"'sketched'"
            )
        self._adam = {
            name: torch.optim.Adam([tensor], lr=options.lr, maximize=True)
            for name, tensor in hyperparameters.items()
        }

    def step(
        self,
        state: CurvatureState,
        prior: GaussianPrior,
        likelihood: Likelihood,
        loader: Iterable[Any],
        curvature: KfacOptions,
        *,
        batch_fn: Callable[[Any], tuple[Any, Any]] | None,
        comm: Comm = ALONE,
    ) -> None:
        """Move the hyperparameters, and weights whose filters are held.

        Those of paths that are off stay where they are, against the momentum of earlier steps and
        against their priors: a path that is probed later begins with what the data said last.

        Raises:
            NonFiniteError: naming a hyperparameter whose gradient is not finite.
        """
        state, likelihood = of_scaled_outputs(state, likelihood)
        # first, since these steps take the state along: it stays that of the model
        for candidate in self._fixed:
            if state.kron[candidate.weight].n_shared > 0:  # not in a path that is off
                state = self._move_filters_fixed(candidate, state, prior, likelihood)
        idle = {id(tensor) for tensor in idle_parameters(self._model)}
        visited = {n: t for n, t in self._visited.items() if id(t) not in idle}
        if not visited:
            return
        # other signs and other batches in every update
        chosen = self._options.revisit
        revisit = replace(chosen, seed=chosen.seed + curvature.seed)
        grads = network_gradient(
            self._model, loader, state, prior, likelihood, visited, curvature,
            revisit=revisit, parameters=self._parameters, batch_fn=batch_fn, comm=comm,
        )  # fmt: skip
        for name, grad in grads.items():
            self._ascend(name, visited[name], grad)

    def state_dict(self) -> dict[str, Any]:
        """Moments of Adam, by hyperparameter."""
        return {name: adam.state_dict() for name, adam in self._adam.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these moments."""
        for name, adam in self._adam.items():
            adam.load_state_dict(state[name])

    def _move_filters_fixed(
        self,
        candidate: FixedFilters,
        state: CurvatureState,
        prior: GaussianPrior,
        likelihood: Likelihood,
    ) -> CurvatureState:
        """Some steps of one lengthscale; none to where its basis can no longer be inverted."""
        logs = candidate.basis.log_lengthscale
        assert logs is not None
        for _ in range(self._options.n_steps):
            kron = state.kron[candidate.weight]
            cotangent = factor_cotangent(candidate, kron, prior, likelihood)
            grad = closed_form_gradient(candidate, kron, cotangent, prior)
            before = logs.detach().clone()
            self._ascend(candidate.hyperparameter, logs, grad)
            after = logs.detach().clone()
            logs.data.copy_(before)
            if not candidate.is_invertible_at(after):
                break
            state = moved(candidate, state, after)
        return state

    def _ascend(self, name: str, tensor: Tensor, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NonFiniteError(f"the evidence gradient of {name!r} is not finite; lower lr_hyp")
        tensor.grad = gradient.to(tensor)
        self._adam[name].step()
        tensor.grad = None
