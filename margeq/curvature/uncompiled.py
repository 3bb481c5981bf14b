"""Models as they are written, where compiled code would pass over the hooks that record calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["uncompiled"]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Modules and functions of ``torch.compile`` run uncompiled while the context is open.

    Code that was compiled before a hook came does not call it, and weights whose calls nobody
    records would seem to have no curvature.
    """
    if "torch._dynamo" not in sys.modules:  # slow to import, and without it nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
