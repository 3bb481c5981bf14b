"""New paths begin as the zero function, but with a gradient."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from margeq.curvature.capture import eval_mode
from margeq.errors import ConfigError

__all__ = ["silence"]


def silence(path: nn.Module, x: Tensor, out_shape: torch.Size, place: str) -> None:
    """Set the weights of the last map in a path to zero, but not those of its first factor.

    Of ``V U x`` with ``V = 0`` the gradient in ``V`` is not zero, unless ``U`` is zero too.

    Args:
        path: module.
        x: inputs that it takes, not zero.
        out_shape: of an output, without the data axis.
        place: layer and path, for messages.

    Raises:
        ConfigError: if the outputs have another shape, or the path cannot be silenced.
    """
    with eval_mode(path), torch.enable_grad():
        y, last = _run(path, x)
        if not isinstance(y, Tensor) or y.shape[1:] != out_shape:
            got = tuple(y.shape[1:]) if isinstance(y, Tensor) else type(y).__name__
            raise ConfigError(f"{place} returns {got}, the layer returns {tuple(out_shape)}")
        with torch.no_grad():
            for weight in _output_weights(last):
                weight.zero_()
        y, _ = _run(path, x)
        weights = [p for p in path.parameters() if p.requires_grad]
        if bool((y != 0).any()) or not _has_gradient(y, weights):
            raise ConfigError(
                f"{place} cannot start at the zero function with a gradient: the last module with "
                f"weights that it calls has to be zero where these are zero; end it with a linear "
                f"map, without anything behind that adds"
            )


def _run(path: nn.Module, x: Tensor) -> tuple[Any, nn.Module | None]:
    """Output, and the module with weights that finishes last."""
    called: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        called.append(module)

    with ExitStack() as stack:
        for module in path.modules():
            if _output_weights(module):
                stack.callback(module.register_forward_hook(hook).remove)
        y = path(x)
    return y, called[-1] if called else None


def _output_weights(module: nn.Module | None) -> list[nn.Parameter]:
    """Own weights that are neither first factors of a product nor hyperparameters."""
    if module is None:
        return []
    apart = {*getattr(module, "first_factors", ()), *getattr(module, "hyperparameter_names", ())}
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if name not in apart]


def _has_gradient(y: Tensor, weights: list[nn.Parameter]) -> bool:
    if not (weights and y.requires_grad):
        return False
    columns = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    grads = torch.autograd.grad(y, weights, columns, allow_unused=True)
    return any(grad is not None and bool((grad != 0).any()) for grad in grads)
