"""JSON in one spelling only: what is read has to be what would have been written."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from margeq.errors import CheckpointCorrupt

__all__ = ["from_json", "to_canonical_json"]


def to_canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII only; numbers survive to the last digit."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def from_json(data: bytes, what: str) -> Any:
    """The value of JSON bytes.

    Args:
        data: bytes from a file that nobody vouches for.
        what: name of their source, for messages.

    Returns:
        Plain dicts, lists, strings, numbers, booleans and ``None``.

    Raises:
        CheckpointCorrupt: for anything that is no strict JSON.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointCorrupt(f"{what} is no JSON: {str(error)[:200]}") from error


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON number")
