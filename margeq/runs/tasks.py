"""Tasks by name: the only way from a configuration to code.

A configuration can name a task, never point to a file or a function. Tasks come with margeq, or
from a file that the user gives on the command line::

    from margeq.runs import Task, register_task

    @register_task("mine")
    def mine(seed, width=8):
        return Task(model, train_loader)
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from margeq.errors import ConfigError
from margeq.runs.plain import require_task_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Task", "build", "load_factory", "register_task", "registered"]


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
        model: the network.
        train_loader: re-iterable batches ``(inputs, targets)``.
        marglik_loader: data of the evidence, without augmentation; default ``train_loader``.
        held_out: batches that nothing is tuned on; scored once, at the end.
        batch_fn: turns a batch into ``(inputs, targets)``.
    """

    model: nn.Module
    train_loader: Iterable[Any]
    marglik_loader: Iterable[Any] | None = None
    held_out: Iterable[Any] | None = None
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None

    @property
    def n_batches(self) -> int:
        """Steps per epoch, for a schedule over all of them.

        Raises:
            ConfigError: for a training loader that does not know.
        """
        if not isinstance(self.train_loader, Sized):
            raise ConfigError(
                f"a cosine schedule needs the number of batches, but the training loader, a "
                f"{type(self.train_loader).__name__}, has no len(); use scheduler 'none'"
            )
        return len(self.train_loader)


TaskFunction = Callable[..., Task]
_F = TypeVar("_F", bound=TaskFunction)
_TASKS: dict[str, TaskFunction] = {}


def register_task(name: str) -> Callable[[_F], _F]:
    """Give a function ``(seed, **arguments) -> Task`` a name that configurations can use.

    Args:
        name: letters, digits, ``_`` and ``-``.

    Returns:
        The decorator, which returns the function as it is.

    Raises:
        ConfigError: for another name, or one that another function has.
    """
    require_task_name(name)

    def register(function: _F) -> _F:
        taken = _TASKS.get(name)
        if taken is not None and _origin(taken) != _origin(function):
            raise ConfigError(
                f"task {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}; "
                f"choose another name"
            )
        _TASKS[name] = function
        return function

    return register


def registered() -> list[str]:
    """Names of all tasks."""
    return sorted(_TASKS)


def build(name: str, seed: int, arguments: Mapping[str, Any]) -> Task:
    """Call a registered task.

    Args:
        name: of the task.
        seed: its first argument.
        arguments: the others, by name.

    Returns:
        What it made.

    Raises:
        ConfigError: for an unknown name, arguments that the task does not take, or a result that
            is no :class:`Task`.
    """
    if name not in _TASKS:
        raise ConfigError(
            f"task {name!r} is not registered; there are {', '.join(registered())}, and those of "
            f"a file given by --factory"
        )
    function = _TASKS[name]
    signature = inspect.signature(function)
    try:
        signature.bind(seed, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"task {name!r} is called as {name}{signature}, not with "
            f"{', '.join(arguments) or 'a seed alone'}: {error}"
        ) from error
    task = function(seed, **arguments)
    if not isinstance(task, Task):
        raise ConfigError(f"task {name!r} returned a {type(task).__name__}, not a margeq.runs.Task")
    return task


def load_factory(path: Path) -> list[str]:
    """Run a file that registers tasks; a plain ``def task(seed, ...)`` goes by the file's name.

    Its folder is put on ``sys.path``, as by ``python FILE``.

    Args:
        path: a Python file.

    Returns:
        Names of its tasks.

    Raises:
        ConfigError: if there is no such file, or no task in it.
    """
    path = path.resolve()
    # one name per file: the same file can be given twice, two files cannot be taken for each other
    module_name = f"margeq_factory_{sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"--factory {path}: no such Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pickle and dataclasses look there
    spec.loader.exec_module(module)
    if not _tasks_of(module_name) and callable(getattr(module, "task", None)):
        register_task(path.stem)(module.task)
    names = _tasks_of(module_name)
    if not names:
        raise ConfigError(
            f"--factory {path} registers no task; decorate a function by "
            f"@margeq.runs.register_task('name'), or define task(seed, ...)"
        )
    return names


def _tasks_of(module_name: str) -> list[str]:
    return [name for name, function in _TASKS.items() if function.__module__ == module_name]


def _origin(function: TaskFunction) -> tuple[str, str]:
    return function.__module__, function.__qualname__
