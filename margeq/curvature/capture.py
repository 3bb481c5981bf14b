"""Hooks that record the input and the output of every weight-carrying module in one forward.

Nothing of the caller's model is left changed: hooks are removed, every sub-module gets its own
train/eval flag back, and in-place activations work on an alias of the hooked output.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from margeq.curvature.bare import bare_weights, joined, per_datum_copies, rule_of_bare
from margeq.curvature.copies import Calls
from margeq.curvature.io import Rule, rule_for
from margeq.curvature.sampling import tensors_of
from margeq.curvature.uncompiled import uncompiled
from margeq.errors import DataError, UnsupportedLayerError

__all__ = [
    "Cut",
    "Use",
    "backpropagate",
    "cut_off",
    "eval_mode",
    "forward",
    "record",
    "require_outputs",
    "run_recorded",
    "used_differently",
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
    calls, recorders = Calls(), {}
    name_of = {id(parameter): name for name, parameter in weights.items()}
    for prefix, layer in model.named_modules():
        names = {
            local: name_of[id(parameter)]
            for local, parameter in layer.named_parameters(recurse=False)
            if id(parameter) in name_of
        }
        rule = rule_for(type(layer))
        if names and rule is not None:
            recorders[layer] = _Recorder(prefix, rule, names, uses, calls, keep_graph)
    with ExitStack() as stack:
        for layer, recorder in recorders.items():
            if recorder.rule.listen is None:
                # first in line, so that hooks of the user see and may change the output after us
                handle = layer.register_forward_hook(recorder, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
        for rule in dict.fromkeys(rule_for(type(layer)) for layer in model.modules()):
            if rule is not None and rule.listen is not None:
                layers = [layer for layer in model.modules() if rule_for(type(layer)) is rule]
                stack.enter_context(rule.listen(layers, _Listener(recorders)))
        yield uses


def require_outputs(outputs: Any, n_data: int) -> None:
    """Check that a model returned one tensor with a row per datum.

    Raises:
        DataError: saying what it returned.
    """
    if isinstance(outputs, Tensor):
        if outputs.ndim and len(outputs) == n_data:
            return
        what, way_out = str(tuple(outputs.shape)), "one row per datum, [n, ...]"
    else:
        what, way_out = f"a {type(outputs).__name__}", "a tensor [n, ...]"
        way_out += "; wrap it in a module whose forward returns the logits or means alone"
    raise DataError(f"the model returned {what} for {n_data} data, expected {way_out}")


def run_recorded(
    model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Any
) -> tuple[Tensor, list[Use]]:
    """Outputs of a model in evaluation mode, and the calls behind them.

    Weights that no module with a rule owns are calls of their own; see
    :mod:`margeq.curvature.bare`.

    Returns:
        Both.

    Raises:
        DataError: if the model does not return one tensor with a row per datum.
        UnsupportedLayerError: for a layer that does not map one tensor to one tensor, or a model
            with bare parameters that ``torch.vmap`` cannot run.
    """
    with record(model, weights) as uses:
        outputs = forward(model, inputs)
    n_data = len(tensors_of(inputs)[0])
    require_outputs(outputs, n_data)
    bare = bare_weights(model, weights)
    if not bare:
        return outputs, uses
    copies = per_datum_copies({name: weights[name] for name in bare}, n_data)
    if torch.is_grad_enabled():
        outputs = joined(model, copies, inputs, outputs)
    for name, (layer, local) in bare.items():
        copy = copies[name]
        rule = rule_of_bare(local, weights[name].numel())
        x = copy.detach().new_zeros(n_data, 1)
        edge = get_gradient_edge(copy)
        prefix = name.rpartition(".")[0]
        uses.append(Use(prefix, layer, rule, {local: name}, x, copy, edge, Cut(), object(), None))
    return outputs, uses


@dataclass(frozen=True)
class _Listener:
    """Notes maps of layers that call no modules."""

    recorders: Mapping[nn.Module, _Recorder]

    def __call__(
        self, layer: nn.Module, names: Sequence[str], rule: Rule, x: Tensor, y: Tensor
    ) -> Tensor:
        recorder = self.recorders.get(layer)
        if recorder is None:
            return y
        own = {local: name for local, name in recorder.names.items() if local in names}
        return replace(recorder, rule=rule, names=own)(layer, (x,), {}, y) if own else y


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


def used_differently(name: str) -> UnsupportedLayerError:
    """What to raise for a weight whose uses have no common form."""
    return UnsupportedLayerError(
        f"{name!r} is used by layers of different kinds (a tied embedding?), whose curvature does "
        f"not add up; untie them, freeze the weight (requires_grad_(False)), or exclude it with "
        f"parameters=[...]"
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
