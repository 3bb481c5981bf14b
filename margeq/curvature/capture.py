"""Hooks that record the input and the output of every weight-carrying module in one forward.

Nothing of the caller's model is left changed: hooks are removed, every sub-module gets its own
train/eval flag back, and in-place activations work on an alias of the hooked output.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from margeq.curvature.copies import Calls
from margeq.curvature.io import Rule, rule_for
from margeq.curvature.sampling import tensors_of
from margeq.curvature.uncompiled import uncompiled
from margeq.errors import DataError, MissingRuleError, UnsupportedLayerError
from margeq.parameters import owners

__all__ = [
    "Cut",
    "Use",
    "backpropagate",
    "check_calls",
    "check_rules",
    "cut_off",
    "eval_mode",
    "forward",
    "record",
    "require_rules",
]


@dataclass(frozen=True)
class Use:
    """One call of a weight-carrying module.

    Attributes:
        prefix: the module's name in the model.
        layer: the module.
        rule: its curvature rule.
        names: local parameter name -> name of the weight in the model.
        x: the module's input.
        y: the module's output; its values may have been overwritten by an in-place activation.
        edge: where the output's gradient arrives in the autograd graph, ``None`` without one.
        cut: where gradients on their way into this call can be held, see :class:`Cut`.
        call: equal for the copies of one call, see :mod:`margeq.curvature.copies`.
        share: of this copy in their average; ``None`` for a call without copies.
    """

    prefix: str
    layer: nn.Module
    rule: Rule
    names: Mapping[str, str]
    x: Tensor
    y: Tensor
    edge: GradientEdge | None
    cut: Cut
    call: Hashable
    share: float | Tensor | None


class Cut:
    """Holds the gradients that reach a call's output instead of passing them on.

    A second-order pull visits the whole forward graph again, for activations whose second
    derivative matters, and mostly with zeros. What arrives is summed up here over many pulls, and
    can go down once in the end.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.total: Tensor | None = None

    def hold(self, grad: Tensor) -> None:
        """Add what arrived."""
        self.total = grad if self.total is None else self.total + grad


@contextmanager
def cut_off(uses: Sequence[Use]) -> Iterator[None]:
    """No gradient passes through the outputs of these calls while the context is open."""
    for use in uses:
        use.cut.is_open = True
    try:
        yield
    finally:
        for use in uses:
            use.cut.is_open = False


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, uncompiled, with each sub-module's own flag restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with uncompiled():
            yield
    finally:
        for module, training in flags:
            module.training = training


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """Call the model with a tensor, a sequence of positional or a mapping of keyword inputs."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def require_rules(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Check that every weight sits in a module type with a curvature rule.

    Raises:
        MissingRuleError: naming the module, its type, the parameter and the ways out.
    """
    for name, (layer, _) in owners(model).items():
        if name in weights and rule_for(type(layer)) is None:
            prefix = name.rpartition(".")[0] or "the model itself"
            raise MissingRuleError(
                f"no curvature rule for parameter {name!r} of {prefix} "
                f"({type(layer).__name__}). Ways out: freeze it (requires_grad_(False)); exclude "
                f"it from the Laplace approximation (parameters=[...]); replace the module (for "
                f"LayerNorm: elementwise_affine=False); or register a rule with "
                f"margeq.register_kfac_rule({type(layer).__name__})"
            )


@contextmanager
def record(
    model: nn.Module, weights: Mapping[str, nn.Parameter], *, keep_graph: bool = False
) -> Iterator[list[Use]]:
    """Record each call of a module that owns one of ``weights`` while the context is open.

    With ``keep_graph`` the recorded inputs stay differentiable in what they were computed from.

    Yields:
        The calls, in their order; the list fills while the model runs.
    """
    uses: list[Use] = []
    handles, calls = [], Calls()
    name_of = {id(parameter): name for name, parameter in weights.items()}
    for prefix, layer in model.named_modules():
        names = {
            local: name_of[id(parameter)]
            for local, parameter in layer.named_parameters(recurse=False)
            if id(parameter) in name_of
        }
        rule = rule_for(type(layer))
        if names and rule is not None:
            hook = _Recorder(prefix, rule, names, uses, calls, keep_graph)
            # first in line, so that hooks of the user see and may change the output after us
            handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Recorder:
    prefix: str
    rule: Rule
    names: Mapping[str, str]
    uses: list[Use]
    calls: Calls
    keep_graph: bool

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            raise UnsupportedLayerError(
                f"{self.prefix or 'the model'} ({type(layer).__name__}) does not map one tensor "
                f"to one tensor; freeze it or exclude it with parameters=[...]"
            )
        # taken now: an in-place activation on a view would give the tensor another history
        edge = get_gradient_edge(y) if y.requires_grad else None
        x, cut = x if self.keep_graph else x.detach(), Cut()
        call, share = self.calls.next(self.prefix)
        self.uses.append(
            Use(self.prefix, layer, self.rule, self.names, x, y, edge, cut, call, share)
        )
        return cast(Tensor, _Alias.apply(y, cut)) if edge is not None else y


class _Alias(torch.autograd.Function):
    """The same values as another node of the graph.

    It goes on in place of the recorded output: an in-place activation then changes this node, and
    gradients still arrive at the recorded edge. Memory and version counter are shared, so nothing
    is copied, and overwriting what a backward pass needs is an error as ever.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if ctx.cut.is_open:
            ctx.cut.hold(grads[0])
            return None, None
        return grads[0], None


def require_batch_axis(uses: Sequence[Use], n_data: int) -> None:
    """Check that each recorded call saw one row per datum.

    Raises:
        UnsupportedLayerError: if a module was called with another leading size.
    """
    for use in uses:
        if len(use.x) != n_data or len(use.y) != n_data:
            raise UnsupportedLayerError(
                f"{use.prefix or 'the model'} ({type(use.layer).__name__}) was called with "
                f"{len(use.x)} rows for {n_data} data; keep the data axis first and leave shared "
                f"positions in axes of their own, [n, ..., features]"
            )


def backpropagate(
    outputs: Tensor, uses: Sequence[Use], column: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of ``sum(column * outputs)`` with respect to each recorded module output."""
    found: list[Tensor | None] = [None] * len(uses)
    edges = [(position, use.edge) for position, use in enumerate(uses) if use.edge is not None]
    if edges and outputs.requires_grad:
        positions, targets = zip(*edges, strict=True)
        grads = torch.autograd.grad(
            outputs, targets, column,
            retain_graph=True, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
        for position, grad in zip(positions, grads, strict=True):
            found[position] = _plain_strides(grad) if create_graph else grad
    return found


def _plain_strides(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else cast(Tensor, _PlainStrides.apply(grad))


class _PlainStrides(torch.autograd.Function):
    """The identity, whose own gradient is contiguous.

    Rules permute gradients, and some backward kernels of torch (batch normalisation of a single
    datum) go wrong on the strides that come back.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clone(memory_format=torch.contiguous_format)


def check_rules(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Any) -> None:
    """Compare the gradient of each weight by its rule with autograd's, on one batch.

    It catches what no rule can see: a weight used outside its module's ``forward``, a subclass
    trick, an input changed in place.

    Raises:
        UnsupportedLayerError: naming the weight and the relative difference.
    """
    n_data = len(tensors_of(inputs)[0])
    with eval_mode(model), torch.enable_grad(), record(model, weights) as uses:
        outputs = forward(model, inputs)
        _require_outputs(outputs, n_data)
        require_batch_axis(uses, n_data)
        check_calls(weights, outputs, uses)


def check_calls(weights: Mapping[str, nn.Parameter], outputs: Tensor, uses: Sequence[Use]) -> None:
    """As :func:`check_rules`, for calls that are recorded already; their graph is kept.

    Raises:
        UnsupportedLayerError: naming the weight and the relative difference.
    """
    # a fixed, sign-changing direction: no random state is touched
    column = torch.linspace(-1.0, 1.3, outputs.numel(), device=outputs.device)
    column = column.reshape(outputs.shape).to(outputs.dtype)
    by_rule = _gradients_by_rule(weights, uses, backpropagate(outputs, uses, column))
    by_autograd: dict[str, Tensor | None] = dict.fromkeys(weights)
    if outputs.requires_grad:
        found = torch.autograd.grad(
            outputs, list(weights.values()), column, retain_graph=True, allow_unused=True
        )
        by_autograd = dict(zip(weights, found, strict=True))
    for name, parameter in weights.items():
        _compare(name, parameter, by_rule.get(name), by_autograd[name])


def _require_outputs(outputs: Any, n_data: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n_data:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(f"the model returned {shape} for {n_data} data; expected [{n_data}, ...]")


def _gradients_by_rule(
    weights: Mapping[str, nn.Parameter], uses: Sequence[Use], grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for use, grad in zip(uses, grads, strict=True):
        if grad is None:
            continue
        for local, io in use.rule.io(use.layer, use.x, grad[None]).items():
            if local not in use.names:
                continue
            name = use.names[local]
            gradient = torch.einsum("vntbo,ntbi->obi", io.output_grads, io.inputs.to(grad.dtype))
            if io.layout == "boi":
                gradient = gradient.transpose(0, 1)
            gradient = gradient.reshape(weights[name].shape)
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _compare(
    name: str, parameter: nn.Parameter, by_rule: Tensor | None, by_autograd: Tensor | None
) -> None:
    if by_autograd is None and by_rule is None:
        return
    rule = torch.zeros_like(parameter) if by_rule is None else by_rule
    auto = torch.zeros_like(parameter) if by_autograd is None else by_autograd
    scale = auto.double().norm()
    difference = (rule.double() - auto.double()).norm()
    tolerance = torch.finfo(parameter.dtype).eps ** 0.5
    if difference > max(tolerance, 3e-3) * scale + 1e-12:
        raise UnsupportedLayerError(
            f"the curvature rule of {name!r} does not explain its gradient (relative difference "
            f"{float(difference / scale.clamp_min(1e-300)):.2g}). Is the weight also used outside "
            f"its module's forward, or its input changed in place? Freeze it, exclude it with "
            f"parameters=[...], or register a rule for the module that really uses it"
        )
