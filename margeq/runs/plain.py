"""Plain data -> RunConfig, with every key and type checked; and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from margeq.config import DemoConfig, RunConfig
from margeq.errors import ConfigError

__all__ = ["config_from", "plain_config", "require_known", "require_plain", "require_task_name"]

_C = TypeVar("_C", RunConfig, DemoConfig)
_TASK_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def config_from(values: Mapping[str, Any], where: str, kind: type[_C] = RunConfig) -> _C:
    """The configuration of a mapping that was read from a file.

    Args:
        values: option -> value; what is missing has its default.
        where: the file, for messages.
        kind: what is configured.

    Returns:
        The configuration; integers are floats where floats are meant.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type, or a name of a task that is
            anything but a name.
    """
    types = get_type_hints(kind)
    for key in values:
        require_known(key, where, types)
    config = kind(**{key: _checked(value, types[key], key, where) for key, value in values.items()})
    if isinstance(config, RunConfig):
        _check(config, where)
    return config


def require_known(key: str, where: str, known: Iterable[str]) -> None:
    """Refuse a key that is no option.

    Raises:
        ConfigError: with the nearest name, and all of them.
    """
    names = list(known)
    if key not in names:
        near = get_close_matches(str(key), names, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{where}: unknown key {key!r}{hint}; known are {', '.join(names)}")


def _check(config: RunConfig, where: str) -> None:
    if config.task:
        require_task_name(config.task)
    if config.threads < 1:
        raise ConfigError(f"{where}: threads = {config.threads}, at least 1")
    if config.momentum is not None and config.optimizer != "sgd":
        raise ConfigError(f"{where}: momentum is for optimizer 'sgd', not {config.optimizer!r}")


def require_task_name(name: str) -> None:
    """Refuse what could be a path to code: configurations name registered tasks only.

    Raises:
        ConfigError: naming it.
    """
    if not _TASK_NAME.fullmatch(name):
        raise ConfigError(
            f"task {name!r} is no name of a task (letters, digits, _ and -): a configuration "
            f"cannot point to code; register a task in a file and give that by --factory"
        )


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON has it: the same for equal configurations."""
    return {key: _listed(value) for key, value in asdict(config).items()}


def require_plain(value: Any, name: str) -> None:
    """Refuse what JSON cannot hold.

    Raises:
        ConfigError: naming the entry.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name}: key {key!r} is no text")
            require_plain(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            require_plain(inner, f"{name}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} is not finite")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ConfigError(f"{name} = {value!r} is a {type(value).__name__}, which JSON has not")


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _checked(value: Any, wanted: Any, key: str, where: str) -> Any:
    require_plain(value, f"{where}: {key}")
    for kind in get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,):
        found = _as(value, kind)
        if found is not _NO:
            return found
    raise ConfigError(f"{where}: {key} = {value!r}, expected {_described(wanted)}")


_NO: Any = object()


def _as(value: Any, kind: Any) -> Any:
    """The value as that type, or ``_NO``; a truth value is no number, and text is no list."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else _NO
    if get_origin(kind) is tuple:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, (list, tuple)):
            return _NO
        found = tuple(_as(entry, get_args(kind)[0]) for entry in listed)
        return _NO if _NO in found else found
    if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping):
        return _listed(value) if isinstance(value, Mapping) else _NO
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else _NO


def _described(wanted: Any) -> str:
    if get_origin(wanted) in (Union, UnionType):
        return " or ".join(_described(kind) for kind in get_args(wanted) if kind is not type(None))
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple:
        return f"a list, each {_described(get_args(wanted)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return names.get(wanted, "a table")
