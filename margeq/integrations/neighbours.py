"""Import of the neighbouring libraries, which happens only where they are used.

torchvision, which laplace-torch needs through torchmetrics, registers shapes for its compiled
operators at import. A torchvision built for another torch (the usual one beside a CPU build of
torch) cannot load them, and the import dies although nothing here uses them: they are declared.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress
from types import ModuleType

import torch

from margeq.errors import ConfigError

__all__ = ["import_laplace", "import_neighbour", "import_torchvision"]

_NMS_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# A library object undeclares its operators when it is collected: this one has to stay alive.
_declared: torch.library.Library | None = None


def import_neighbour(module: str, package: str) -> ModuleType:
    """A module of another library, with its import-time warnings (torch.jit.script) silenced.

    Args:
        module: its name.
        package: what to install for it.

    Returns:
        The module.

    Raises:
        ConfigError: if the package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{package} is not installed ({error}); pip install {package}") from error


def import_laplace() -> ModuleType:
    """laplace-torch.

    Returns:
        The module ``laplace``.

    Raises:
        ConfigError: if it is not installed.
    """
    with suppress(ModuleNotFoundError):  # then laplace-torch itself says what is missing
        import_torchvision()
    return import_neighbour("laplace", "laplace-torch")


def import_torchvision() -> ModuleType:
    """torchvision, without its compiled operators if they are for another torch."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        _declare_torchvision_operators()
        return importlib.import_module("torchvision")


def _declare_torchvision_operators() -> None:
    global _declared
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        _declared.define(operator + _NMS_SIGNATURE)
