"""Fixtures for all tests: one thread, fixed seeds, and laplace-torch as an oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings

from benchmarks.peers import import_laplace
from margeq.errors import ConfigError
from tests import network_guard

network_guard.install()

torch.set_num_threads(1)  # parallelism comes from the workers; one thread is reproducible

# The same examples in every run, and no time limit that a busy machine could break.
settings.register_profile("margeq", derandomize=True, deadline=None)
settings.load_profile("margeq")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    network_guard.attempts.clear()
    yield
    assert not network_guard.attempts, network_guard.attempts


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """Number of threads and treatment of denormal numbers are restored, which scripts set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def laplace_torch() -> ModuleType:
    """The module ``laplace``, importable also beside a CPU build of torch."""
    try:
        return import_laplace()
    except ConfigError as error:
        pytest.skip(f"oracle not installed: {error}")
