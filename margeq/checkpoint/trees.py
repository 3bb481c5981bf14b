"""Nested state as plain JSON beside named tensors, and back: the same values, types and keys.

A state is made of dicts, lists, tuples, ``None``, booleans, integers, floats, strings and tensors.
JSON has no tensors, tuples, keys other than strings, or numbers that are not finite; they become

    {"$tensor": name}   {"$tuple": [...]}   {"$items": [[key, value], ...]}   {"$float": "inf"}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from margeq.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, MargeqError

__all__ = ["from_plain", "require_same_tensors", "to_plain", "trusting"]

_SYMPTOMS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What code raises that was given another value than it can use."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_plain(state: Any, path: str) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a state.

    Args:
        state: nested state.
        path: its name, with which the names of its tensors begin.

    Returns:
        A value ready for JSON, and the tensors by name.

    Raises:
        CheckpointError: naming a value that is none of the above; it would need pickle.
    """
    tensors: dict[str, Tensor] = {}
    return _plain(state, path, tensors), tensors


def from_plain(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back.

    Args:
        plain: from JSON.
        tensors: by name; each is used exactly once.

    Returns:
        The nested state.

    Raises:
        CheckpointCorrupt: for a tensor that is missing, left over or used twice, or unknown marks.
    """
    left = dict(tensors)
    try:
        state = _nested(plain, left)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"state.json does not describe a state: {error!r}") from error
    if left:
        raise CheckpointCorrupt(f"state.json does not mention tensor {next(iter(left))!r}")
    return state


@contextmanager
def trusting(what: str) -> Iterator[None]:
    """Turn what a state of unexpected structure raises inside into a typed error.

    Raises:
        CheckpointCorrupt: instead of lookup, type and value errors.
        MargeqError: as it is.
    """
    try:
        yield
    except MargeqError:
        raise
    except _SYMPTOMS as error:
        raise CheckpointCorrupt(
            f"{what} is undamaged, but not the state of such a run: {error!r}; start anew with "
            f"another checkpoint_dir or resume=False"
        ) from error


def require_same_tensors(stored: Mapping[str, Any], live: Mapping[str, Any], what: str) -> None:
    """Compare names, shapes and dtypes before a single value is assigned.

    Args:
        stored: flat state from a checkpoint.
        live: the state that it is for.
        what: whose state, for messages.

    Raises:
        CheckpointMismatch: naming the first entry that differs.
    """
    for name in [*live, *(name for name in stored if name not in live)]:
        old = _description(stored[name]) if name in stored else "nothing"
        new = _description(live[name]) if name in live else "nothing"
        if old != new:
            raise CheckpointMismatch(
                f"{what}: {name!r} is {old} in the checkpoint and {new} here; resume with the "
                f"same model, or start anew with another checkpoint_dir or resume=False"
            )


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        name = path
        while name in tensors:  # keys may hold the separator
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = [(key, _plain(v, f"{path}/{key}", tensors)) for key, v in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            # the order of keys is part of the state, JSON is written sorted
            order = [key for key, _ in items]
            return dict(items) if order == sorted(order) else {"$items": [list(i) for i in items]}
        return {"$items": [[_plain(key, path, tensors), inner] for key, inner in items]}
    if isinstance(value, (list, tuple)):
        inner = [_plain(v, f"{path}/{number}", tensors) for number, v in enumerate(value)]
        return inner if isinstance(value, list) else {"$tuple": inner}
    raise CheckpointError(
        f"{path!r} is a {type(value).__name__}, which cannot be stored without pickle; keep "
        f"numbers, strings, tensors, and lists, tuples and dicts of them in states"
    )


def _nested(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_nested(inner, tensors) for inner in plain]
    if not isinstance(plain, dict):
        return plain
    if not any(key.startswith("$") for key in plain):
        return {key: _nested(inner, tensors) for key, inner in plain.items()}
    ((mark, content),) = plain.items()
    if mark == "$tensor":
        return tensors.pop(content)
    if mark == "$float":
        return _NOT_FINITE[content]
    if mark == "$tuple":
        return tuple(_nested(inner, tensors) for inner in content)
    if mark == "$items":
        return {_nested(key, tensors): _nested(inner, tensors) for key, inner in content}
    raise ValueError(f"unknown mark {mark!r}")
