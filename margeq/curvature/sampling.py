"""Random draws seeded by a sample's content: the same for any batch split, order or worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from margeq.errors import DataError

__all__ = [
    "checksum",
    "normals",
    "reseeded",
    "sample_keys",
    "sample_positions",
    "tensors_of",
    "uniforms",
]

# odd 64-bit constants of the splitmix64 generator (Steele, Lea & Flood 2014), as signed integers
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors in a model input: a tensor, or a sequence or mapping of them."""
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if isinstance(inputs, (Mapping, Sequence)) and not isinstance(inputs, str):
        nested = (Tensor, Mapping, list, tuple)
        return [t for value in values if isinstance(value, nested) for t in tensors_of(value)]
    raise DataError(
        f"a batch holds {type(inputs).__name__} as input; pass batch_fn=... to turn a batch into "
        f"(inputs, targets) with tensors, or a sequence or mapping of tensors, as inputs"
    )


def sample_keys(inputs: Any, seed: int = 0) -> Tensor:
    """One 64-bit key per datum, from its content and ``seed`` alone. Shape ``[n]``."""
    tensors = tensors_of(inputs)
    keys = torch.zeros(len(tensors[0]), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        keys = _mix(keys + _content(tensor))
    return reseeded(keys, seed)


def reseeded(keys: Tensor, seed: int) -> Tensor:
    """Other keys for each seed; seed 0 keeps them."""
    return _mix(keys + seed) if seed else keys


def checksum(keys: Tensor) -> int:
    """A sum over data that does not depend on their order."""
    return int(_mix(keys).sum())


def uniforms(keys: Tensor, stream: int, count: int) -> Tensor:
    """``[n, count]`` float64 uniforms in (0, 1); ``stream`` separates independent uses."""
    counters = torch.arange(count, device=keys.device) + (stream << 32)
    bits = _mix(keys[:, None] + _mix(counters)[None, :])
    # the top 53 bits fill the mantissa; half a step keeps the draw away from 0 and 1
    return ((bits >> 11) & ((1 << 53) - 1)).double().add(0.5) * 2.0**-53


def normals(keys: Tensor, stream: int, count: int) -> Tensor:
    """``[n, count]`` float64 standard normals."""
    return torch.special.ndtri(uniforms(keys, stream, count))


def sample_positions(keys: Tensor, stream: int, n_positions: int, fraction: float) -> Tensor | None:
    """A systematic sample of shared positions per datum.

    Each position is included with probability ``m / n_positions``, so that sums over the sample
    times ``n_positions / m`` are unbiased.

    Returns:
        Positions ``[n, m]``, or ``None`` to keep all.
    """
    count = max(1, round(fraction * n_positions))
    if count >= n_positions:
        return None
    starts = uniforms(keys, stream, count)
    stratum = n_positions / count
    positions = ((torch.arange(count, device=keys.device) + starts) * stratum).long()
    return positions.clamp_max(n_positions - 1)


def _content(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(len(tensor), -1)
    bits = _as_integers(flat)
    return (bits * _weights(bits.shape[1], bits.device)).sum(-1)


@lru_cache(maxsize=8)
def _weights(length: int, device: torch.device) -> Tensor:
    return _mix(torch.arange(1, length + 1, device=device)) | 1


def _as_integers(flat: Tensor) -> Tensor:
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.is_floating_point():
        by_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        flat = flat.contiguous().view(by_size[flat.element_size()])
    return flat.long()


def _mix(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes it a logical shift
    return (z >> by) & ((1 << (64 - by)) - 1)
