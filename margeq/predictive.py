"""Covariances of linearised outputs, layer by layer in the eigenvectors of the posterior.

    Cov[f_k, f_l] = sum_(b,o,i) G_k[b,o,i] G_l[b,o,i] s[b,o,i],
    G_k = sum_t (U_B^T g_k[t]) (U_A^T a[t])^T

with the inputs ``a`` and the gradients ``g_k`` of output ``k`` that the curvature rules know. Where
a weight has one position, ``G_k`` is an outer product and is never formed. ``K`` backward passes
that stop at activations take the place of a Jacobian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from margeq.batches import map_tensors
from margeq.curvature.capture import Use, backpropagate, eval_mode, run_recorded
from margeq.curvature.explained import require_batch_axis
from margeq.curvature.per_datum import Call, CallReader
from margeq.curvature.sampling import tensors_of
from margeq.curvature.spectral import SpectralBlock
from margeq.errors import ConfigError
from margeq.linalg import project

__all__ = ["LinearisedOutputs"]

_GRADIENT_NUMBERS = 2**25
_CHUNK_NUMBERS = 2**23


class LinearisedOutputs:
    """The outputs of a model, linear in its weights, under a Gaussian of independent tensors.

    Args:
        model: at the mean.
        weights: by name.
        blocks: eigenvectors per weight.
        variances: eigenvalues of the covariance per weight, ``[b, o, i]``.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        blocks: Mapping[str, SpectralBlock],
        variances: Mapping[str, Tensor],
    ) -> None:
        self._model, self._weights, self._blocks = model, weights, blocks
        self._variances = {
            # a weight that no datum has reached has its prior, whatever its shape
            name: values.flatten()[:1].reshape(1, 1, 1) if blocks[name].is_empty else values
            for name, values in variances.items()
        }

    def variance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, K]`` and their covariance per datum ``[n, K, K]``."""
        means, parts = [], []
        for outputs, calls in self._pieces(inputs):
            n_data, n_outputs = outputs.shape
            total = outputs.new_zeros(n_data, n_outputs, n_outputs)
            for name, by_output in calls.items():
                total += _variance(by_output, self._variances[name])
            means.append(outputs)
            parts.append(total)
        return torch.cat(means), torch.cat(parts)

    def covariance(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, K]`` and their covariance over all data ``[n K, n K]``."""
        pieces = list(self._pieces(inputs))
        outputs = torch.cat([mean for mean, _ in pieces])
        total = outputs.new_zeros(outputs.numel(), outputs.numel())
        for name in pieces[0][1]:
            variance = self._variances[name]
            for out in _slices(pieces[0][1][name], variance, outputs.numel()):
                rows = [_whitened(calls[name], variance, slice(None), out) for _, calls in pieces]
                flat = torch.cat(rows).flatten(0, 1)
                total += flat @ flat.mT
        return outputs, total

    def _pieces(self, inputs: Any) -> Iterator[tuple[Tensor, dict[str, list[list[Call]]]]]:
        """Outputs and the calls of each weight per output, for as many data as fit in memory."""
        n_data = len(tensors_of(inputs)[0])
        size, start = n_data, 0
        with eval_mode(self._model):
            while start < n_data:
                piece = map_tensors(lambda t: t[start : start + size], inputs)  # noqa: B023
                with torch.enable_grad():
                    outputs, uses = run_recorded(self._model, self._weights, piece)
                fitting = _fitting(outputs, uses)
                if size > fitting:
                    size = fitting
                    continue
                require_batch_axis(uses, len(outputs))
                yield outputs.detach().flatten(1).clone(), self._calls(outputs, uses)
                start += size

    def _calls(self, outputs: Tensor, uses: Sequence[Use]) -> dict[str, list[list[Call]]]:
        reader = CallReader(self._rotated_inputs)
        found: dict[str, list[list[Call]]] = {}
        for k in range(outputs[0].numel()):
            column = torch.zeros_like(outputs).flatten(1)
            column[:, k] = 1.0
            grads = backpropagate(outputs, uses, column.reshape(outputs.shape))
            for name, calls in reader.read(uses, grads).items():
                found.setdefault(name, []).append([self._rotated(name, call) for call in calls])
        return found

    def _rotated_inputs(self, name: str, inputs: Tensor) -> Tensor:
        basis = self._blocks[name].basis
        return inputs if basis is None else _times(name, inputs, basis[1])

    def _rotated(self, name: str, call: Call) -> Call:
        basis = self._blocks[name].basis
        return call if basis is None else Call(call.inputs, _times(name, call.grads, basis[0]))


def _times(name: str, rows: Tensor, basis: Tensor) -> Tensor:
    """``U^T`` times rows ``[n, t, b, d]``."""
    if basis.shape[:2] != rows.shape[2:]:
        raise ConfigError(
            f"the posterior of {name!r} has {basis.shape[0]} blocks of size {basis.shape[1]}, the "
            f"layer has {rows.shape[2]} of size {rows.shape[3]}; fit the posterior on this model"
        )
    return project(rows, basis.mT.to(rows))


def _fitting(outputs: Tensor, uses: Sequence[Use]) -> int:
    """Number of data whose gradients of all outputs, at all layers, fit in memory together."""
    per_datum = outputs[0].numel() * sum(use.y[0].numel() for use in uses if len(use.y))
    return max(1, _GRADIENT_NUMBERS // max(1, per_datum))


def _variance(by_output: Sequence[Sequence[Call]], variance: Tensor) -> Tensor:
    """What one weight contributes, ``[n, K, K]``."""
    first = by_output[0][0]
    if len(by_output[0]) == 1 and not first.is_shared:
        grads = torch.stack([calls[0].grads[:, 0] for calls in by_output], 1)
        variance = variance.to(grads.dtype).expand(-1, grads.shape[-1], first.inputs.shape[-1])
        # rows of outputs [n, b, o]; blocks that write one output share its gradient
        weights = torch.einsum(
            "nbi,boi->nbo", first.inputs[:, 0].to(grads.dtype).square(), variance
        )
        if grads.shape[2] == 1:
            weights = weights.sum(1, keepdim=True)
        return (grads * weights[:, None]).flatten(2) @ grads.flatten(2).mT
    per_datum = len(by_output) * first.inputs[0, 0].numel() * first.grads.shape[-1]
    size = max(1, _CHUNK_NUMBERS // per_datum)
    parts = []
    for start in range(0, len(first.inputs), size):
        rows = _whitened(by_output, variance, slice(start, start + size), slice(None))
        parts.append(rows @ rows.mT)
    return torch.cat(parts)


def _whitened(
    by_output: Sequence[Sequence[Call]], variance: Tensor, data: slice, out: slice
) -> Tensor:
    """``G_k s^1/2`` of some data at some of the outputs of each block, ``[n, K, b o i]``."""
    total = None
    for number in range(len(by_output[0])):
        inputs = by_output[0][number].inputs[data]
        grads = torch.stack([calls[number].grads[data][..., out] for calls in by_output], 1)
        by_block = grads.permute(0, 3, 1, 4, 2)  # n b k o t
        product = by_block.flatten(2, 3) @ inputs.to(grads.dtype).transpose(1, 2)
        product = product.unflatten(2, by_block.shape[2:4]).transpose(1, 2)  # n k b o i
        total = product if total is None else total + product
    assert total is not None
    roots = variance.sqrt().to(total.dtype)
    return (total * (roots if roots.shape[1] == 1 else roots[:, out])).flatten(2)


def _slices(by_output: Sequence[Sequence[Call]], variance: Tensor, n_rows: int) -> Iterator[slice]:
    """Parts of a weight's outputs whose gradients of all data fit in memory."""
    call = by_output[0][0]
    n_out = call.grads.shape[-1]
    size = max(1, _CHUNK_NUMBERS // (n_rows * call.inputs[0, 0].numel()))
    for start in range(0, n_out, size):
        yield slice(start, start + size)
