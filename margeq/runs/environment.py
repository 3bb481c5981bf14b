"""What a result depends on besides its configuration."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["threads", "versions"]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads for torch while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Of margeq, torch and Python."""
    try:
        margeq = version("margeq")
    except PackageNotFoundError:  # run from its sources
        margeq = "unknown"
    return {
        "margeq": margeq,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
