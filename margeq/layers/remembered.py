"""What a layer computes from its parameters, kept for as long as their values stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Remembered"]


class Remembered:
    """The last result of a function of some tensors, recomputed when one of them has changed.

    Values are compared, not versions: writing through ``tensor.data`` leaves no other trace.
    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []
        self._result: Tensor | None = None

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()

    def of(self, compute: Callable[[], Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The result of ``compute()``, which reads nothing but ``tensors``.

        Computed anew where a gradient is wanted, and inside of function transforms, compilation,
        inference mode and automatic casts.

        Returns:
            The result, perhaps one that was returned before.
        """
        if torch.compiler.is_compiling() or _has_gradient(tensors) or not _are_plain(tensors):
            return compute()
        if self._result is None or not self._holds_for(tensors):
            self._tensors = list(tensors)
            self._values = [tensor.detach().clone() for tensor in tensors]
            self._result = compute()
        return self._result

    def _holds_for(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._tensors) and all(
            tensor is own
            and (tensor.dtype, tensor.device) == (value.dtype, value.device)
            and torch.equal(tensor, value)
            for tensor, own, value in zip(tensors, self._tensors, self._values, strict=True)
        )


def _has_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have values of their own, outside of function transforms."""
    try:
        # what inference mode computes can never be used in training, casts have another dtype
        return not torch.is_inference_mode_enabled() and all(
            t.data_ptr() != 0 and not torch.is_autocast_enabled(t.device.type) for t in tensors
        )
    except RuntimeError:
        return False
