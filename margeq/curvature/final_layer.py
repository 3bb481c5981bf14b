"""The last layer of a network, found by watching it run: names in a module tree have no order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import Batch, read_batches
from margeq.comm import ALONE, Comm, together
from margeq.curvature.capture import eval_mode, forward, require_outputs
from margeq.curvature.sampling import tensors_of
from margeq.errors import ConfigError
from margeq.parameters import LAST_LAYER, LastLayer, named_weights, owners, unwrapped

__all__ = ["chosen_parameters", "last_layer"]


def last_layer(model: nn.Module, inputs: Any) -> LastLayer:
    """The trainable tensors of the last layer that has parameters, for ``parameters=``.

    All that the outputs owe to other trainable tensors has to lead through this layer.

    Args:
        model: left as it is.
        inputs: of a batch: a tensor, or a sequence or mapping of them.

    Returns:
        Names of tensors; evidence of them has the flavour ``"last_layer"`` for any model.

    Raises:
        ConfigError: for a model without a single last layer, or with a frozen or tied one.
        DataError: if the model does not return one tensor with a row per datum.

    Example:
        >>> last_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(4, 2))
        ('2.weight', '2.bias')
    """
    model = unwrapped(model)
    weights = named_weights(model)
    layer = _last_called(model, inputs)
    names = [name for name, (owner, _) in owners(model).items() if owner is layer]
    chosen = [name for name in names if name in weights]
    if not names:
        raise ConfigError(
            f"parameters={LAST_LAYER!r}: the last layer ({type(layer).__name__}) has no weight of "
            f"its own, it is tied to another layer's; name weights with parameters=[...]"
        )
    if not chosen:
        raise ConfigError(
            f"parameters={LAST_LAYER!r}: the last layer has no trainable weight "
            f"({', '.join(names)}: frozen, or hyperparameters); unfreeze it, or name other weights "
            f"with parameters=[...]"
        )
    past = _past(model, layer, inputs, {n: w for n, w in weights.items() if n not in chosen})
    if past:
        raise ConfigError(
            f"parameters={LAST_LAYER!r}: the outputs depend on {', '.join(map(repr, past[:3]))} "
            f"past the last layer, {chosen[0].rpartition('.')[0]!r}; name the layers with "
            f"parameters=[...]"
        )
    return LastLayer(chosen)


def _last_called(model: nn.Module, inputs: Any) -> nn.Module:
    """The innermost module with parameters whose call ends last."""
    called: list[nn.Module] = []
    with ExitStack() as stack:
        for module in model.modules():
            inner = [p for child in module.children() for p in child.parameters()]
            if not inner and any(True for _ in module.parameters()):
                hook = module.register_forward_hook(lambda layer, *_: called.append(layer))
                stack.callback(hook.remove)
        stack.enter_context(eval_mode(model))
        with torch.no_grad():
            forward(model, inputs)
    if not called:
        raise ConfigError(
            f"parameters={LAST_LAYER!r}: the model calls no module that has parameters; name its "
            f"weights with parameters=[...]"
        )
    return called[-1]


def _past(
    model: nn.Module, layer: nn.Module, inputs: Any, others: dict[str, nn.Parameter]
) -> list[str]:
    """Other weights that the outputs depend on with the inputs of the layer held."""

    def hold(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return (
            tuple(a.detach() if isinstance(a, Tensor) else a for a in args),
            {k: a.detach() if isinstance(a, Tensor) else a for k, a in kwargs.items()},
        )

    hook = layer.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        with eval_mode(model), torch.enable_grad():
            outputs = forward(model, inputs)
            require_outputs(outputs, len(tensors_of(inputs)[0]))
            if not others or not outputs.requires_grad:
                return []
            found = torch.autograd.grad(outputs.sum(), list(others.values()), allow_unused=True)
    finally:
        hook.remove()
    return [name for name, grad in zip(others, found, strict=True) if grad is not None]


def chosen_parameters(
    model: nn.Module,
    parameters: str | Sequence[str],
    loader: Iterable[Any],
    batch_fn: Callable[[Any], tuple[Any, Any]] | None,
    comm: Comm = ALONE,
    look: Callable[[Batch], object] = lambda batch: None,
) -> str | Sequence[str]:
    """Names for ``"last_layer"``, by the first batch of a loader; anything else as it is.

    Args:
        model: left as it is.
        parameters: as the caller gave them.
        loader: of batches.
        batch_fn: makes a pair of inputs and targets of one.
        comm: ranks that agree.
        look: what the batch has to pass before.

    Returns:
        Names, or the argument.
    """
    if parameters != LAST_LAYER:
        return parameters
    model = unwrapped(model)
    with together(comm):
        found: list[str] = []
        device = next(model.parameters()).device
        for batch in read_batches(loader, device, batch_fn, least=int(comm.size == 1)):
            look(batch)
            found = list(last_layer(model, batch.inputs))
            break
    # a rank without data takes the names that others have found
    return LastLayer(next((names for names in comm.gather(found) if names), found))
