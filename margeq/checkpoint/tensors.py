"""Tensors as safetensors bytes, whose header is checked before any tensor is made of them.

    8 bytes, length of the header, little-endian | JSON header | data, without gaps

A header says dtype, shape and place of every tensor. All three have to agree with each other and
with the bytes that are really there; a size that is only declared is never allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from margeq.checkpoint.text import from_json
from margeq.errors import CheckpointCorrupt, CheckpointError

__all__ = ["decode_tensors", "encode_tensors"]

_LARGEST_HEADER = 2**24
_MOST_AXES = 32
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4,
    "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.float16, torch.bfloat16,
    torch.uint32, torch.int32, torch.float32, torch.uint64, torch.int64, torch.float64,
    torch.complex64,
}  # fmt: skip


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file with these tensors, from any device.

    Returns:
        A whole safetensors file.

    Raises:
        CheckpointError: naming a tensor that such a file cannot hold.
    """
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
                f"checkpoints hold dense tensors of plain dtypes"
            )
    # copies: tied tensors share storage, which the format does not know
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(plain)


def decode_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors of such a file, on the CPU.

    Args:
        data: bytes that nobody vouches for.
        what: name of their source, for messages.

    Returns:
        Tensors by name.

    Raises:
        CheckpointCorrupt: if header and data do not agree in every detail.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    _check_header(data, what)
    try:
        return load(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{what} is no safetensors file: {error}") from error


def _check_header(data: bytes, what: str) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _LARGEST_HEADER):
        raise CheckpointCorrupt(
            f"{what} has {len(data)} bytes and declares a header of {length}; it is damaged"
        )
    header = from_json(data[8 : 8 + length], f"the header of {what}")
    if not isinstance(header, dict):
        raise CheckpointCorrupt(f"the header of {what} is a {type(header).__name__}")
    header.pop("__metadata__", None)
    places = sorted(_place(name, entry, what) for name, entry in header.items())
    end = 0
    for begin, stop in places:
        if begin != end:
            raise CheckpointCorrupt(f"the tensors of {what} overlap or leave a gap at byte {end}")
        end = stop
    if end != len(data) - 8 - length:
        raise CheckpointCorrupt(
            f"the tensors of {what} declare {end} bytes, there are {len(data) - 8 - length}"
        )


def _place(name: str, entry: Any, what: str) -> tuple[int, int]:
    """First and last byte of one tensor, which have to fit its dtype and shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointCorrupt(f"{what}: the entry of tensor {name[:80]!r} is incomplete")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise CheckpointCorrupt(f"{what}: tensor {name[:80]!r} has dtype {str(dtype)[:40]!r}")
    if not (_are_sizes(shape) and len(shape) <= _MOST_AXES and _are_sizes(place)):
        raise CheckpointCorrupt(f"{what}: shape or place of tensor {name[:80]!r} are no sizes")
    if len(place) != 2 or place[1] - place[0] != math.prod(shape) * _BYTES[dtype]:
        raise CheckpointCorrupt(
            f"{what}: tensor {name[:80]!r} of shape {str(shape)[:80]} and dtype {dtype} is not "
            f"what lies in bytes {str(place)[:80]}"
        )
    return place[0], place[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
