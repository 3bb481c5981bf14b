"""What a run is called: by its configuration, so that the same question finds its answer again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from margeq.config import RunConfig
from margeq.errors import ConfigError
from margeq.runs.plain import plain_config

__all__ = ["differences", "file_digest", "run_id"]

_DIGITS = 12


def run_id(config: RunConfig) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the configuration, defaults included."""
    text = json.dumps(plain_config(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode("ascii")).hexdigest()[:_DIGITS]


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Returns:
        Its hexadecimal digits.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def differences(stored: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Keys of two plain configurations that differ, each with both values."""
    old, new = dict(_flat(stored, "")), dict(_flat(live, ""))
    return [
        f"{key}: {old.get(key, '-')!r} there, {new.get(key, '-')!r} here"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(name, value)]
    nested = [_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()]
    return [entry for entries in nested for entry in entries]
