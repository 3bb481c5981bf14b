"""Curvature of parameters that no module with a rule owns: class tokens, position tables, gains.

    g[n,v] = d (column_v . f(x_n, theta_n)) / d theta_n,   theta_n a copy of theta

Each datum goes through the model once more, by ``torch.vmap``, with a copy of its own, so that
gradients of the copies are gradients of single data, whatever is done with them. Up to 512 entries
are one exact block, more of them are blocks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode
from torch.utils import _pytree as pytree

from margeq.curvature.io import InputRows, PositionSampler, Rule, bias_rows, registered_types
from margeq.errors import UnsupportedLayerError
from margeq.parameters import owners

__all__ = ["bare_weights", "joined", "per_datum_copies", "refuse_bare", "rule_of_bare"]

_LARGEST_BLOCK = 512
_LARGEST = 2**20
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


def bare_weights(
    model: nn.Module, weights: Mapping[str, nn.Parameter]
) -> dict[str, tuple[nn.Module, str]]:
    """Weights that belong to a module without a rule, whatever it does with them.

    Layers of torch and margeq, and what is derived from layers with a rule, are left out: there a
    rule is missing, and a diagonal in its place would be a surprise. So are tensors of more than a
    million entries.

    Returns:
        Name -> owner and local name.
    """
    return {
        name: (layer, local)
        for name, (layer, local) in owners(model).items()
        if name in weights and _is_bare(layer) and weights[name].numel() <= _LARGEST
    }


def _is_bare(layer: nn.Module) -> bool:
    if isinstance(layer, _CONTAINERS):
        return True
    # what modules of margeq keep outside of layers is no weight
    is_library = type(layer).__module__.startswith(("torch.", "margeq."))
    return not (is_library or isinstance(layer, registered_types()))


def refuse_bare(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse to move hyperparameters inside a network that has bare weights.

    Raises:
        UnsupportedLayerError: naming them, with the ways out.
    """
    bare = bare_weights(model, weights)
    if bare:
        raise UnsupportedLayerError(
            f"hyperparameters inside the network cannot move beside {', '.join(map(repr, bare))}, "
            f"which no module with a rule owns; freeze either (requires_grad_(False)), exclude "
            f"the weights with parameters=[...], or register a rule for their module"
        )


def rule_of_bare(local: str, n_entries: int) -> Rule:
    """The rule of one bare parameter: a constant input, and the gradient of each datum's copy."""
    is_one_block = n_entries <= _LARGEST_BLOCK

    def inputs(layer: nn.Module, x: Tensor, sampler: PositionSampler) -> dict[str, InputRows]:
        return {local: bias_rows(len(x), 1, 1 if is_one_block else n_entries, x)}

    def output_grads(layer: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
        rows = grad_y.reshape(*grad_y.shape[:2], 1, -1)
        return {local: rows[..., None, :] if is_one_block else rows[..., None]}

    return Rule(inputs, output_grads, starts_at={local: None})


def per_datum_copies(weights: Mapping[str, Tensor], n_data: int) -> dict[str, Tensor]:
    """Copies ``[n, *shape]`` of some weights, leaves of the graph."""
    return {
        name: weight.detach()[None].expand(n_data, *weight.shape).requires_grad_()
        for name, weight in weights.items()
    }


def joined(model: nn.Module, copies: Mapping[str, Tensor], inputs: Any, outputs: Tensor) -> Tensor:
    """The outputs, whose gradients reach the copies too.

    Args:
        model: in evaluation mode.
        copies: of some of its weights, by name.
        inputs: of a batch.
        outputs: of the model on this batch.

    Returns:
        The same values.

    Raises:
        UnsupportedLayerError: for a model that ``torch.vmap`` cannot run.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fixed = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def one(own: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
        single = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            single[place] = tensor[None]
        given = pytree.tree_unflatten(single, structure)
        named = {**fixed, **own}
        if isinstance(given, Mapping):
            return torch.func.functional_call(model, named, (), dict(given))[0]
        arguments = (given,) if isinstance(given, Tensor) else tuple(given)
        return torch.func.functional_call(model, named, arguments)[0]

    try:
        # fused attention has no rule for vmap. Torch's modules keep away from fused kernels without
        # derivatives if a parameter requires gradients, which none does here, or somebody listens
        with BaseTorchFunctionMode(), sdpa_kernel(SDPBackend.MATH):
            by_copies = torch.vmap(one, randomness="different")(
                dict(copies), [leaves[place] for place in places]
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedLayerError(
            f"the curvature of {', '.join(map(repr, copies))}, which no module with a rule owns, "
            f"needs torch.vmap over the data, which this model does not allow: {error}. Freeze "
            f"them (requires_grad_(False)), exclude them with parameters=[...], or register a rule "
            f"for their module"
        ) from error
    return cast(Tensor, _Joined.apply(outputs, by_copies))


class _Joined(torch.autograd.Function):
    """The first of two equal tensors; gradients go to both."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, twin: Tensor) -> Tensor:
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
