"""Import of the neighbouring libraries, for the benchmarks and for the oracles in the tests.

torchvision, which laplace-torch needs through torchmetrics, registers shapes for its compiled
operators at import. A torchvision built for another torch (the usual one beside a CPU build of
torch) cannot load them, and the import dies although nothing here uses them: they are declared.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

__all__ = ["import_laplace", "import_torchvision"]

_NMS_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

# A library object undeclares its operators when it is collected: this one has to stay alive.
_declared: torch.library.Library | None = None


def import_laplace() -> ModuleType:
    """laplace-torch, with its import-time warnings (torch.jit.script) silenced."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return importlib.import_module("laplace")


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
