"""What makes two calls the same call: arguments as plain values, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from margeq.errors import CheckpointMismatch
from margeq.likelihoods import Likelihood
from margeq.priors import GaussianPrior

__all__ = ["described", "flattened", "require_same_settings"]

_MOST_NAMED = 5


def described(value: Any) -> Any:
    """A value as plain data that is equal for equal arguments; functions go by their names."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().double().numpy().tobytes()
        return [str(value.dtype), list(value.shape), sha256(data).hexdigest()]
    if isinstance(value, GaussianPrior):
        return {"groups": dict(value.groups), **described(value.state_dict())}
    if isinstance(value, Likelihood):
        name, temperature = type(value).__name__, value.temperature
        # only where it says something: checkpoints of earlier versions have no such entry
        further = {"noise": "per-output"} if value.weighs_outputs else {}
        state = described(value.state_dict())
        return {"name": name, "temperature": temperature, **further, **state}
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [described(inner) for inner in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def require_same_settings(stored: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Refuse to go on with other arguments.

    Args:
        stored: from a checkpoint.
        live: of this call.

    Raises:
        CheckpointMismatch: naming the arguments that differ, with both values.
    """
    old, new = flattened(stored), flattened(live)
    differing = [
        f"{name}: {old.get(name)!r} in the checkpoint, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]
    if differing:
        more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        raise CheckpointMismatch(
            f"the checkpoint is that of a call with other arguments ({'; '.join(differing[:5])}"
            f"{more}); use the same ones, another checkpoint_dir, or resume=False to start anew"
        )


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by names with dots."""
    return dict(_flat(settings))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
