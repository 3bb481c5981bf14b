"""A long run needs no more memory, hooks, files or threads than a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def soaked(n_updates, directory):
    """Measurements after each update, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", str(n_updates), str(directory)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_updates", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_grows_from_update_to_update(tmp_path, n_updates):
    """Weights, precisions, a lengthscale, dropout, paths and checkpoints; less than 2 % of memory.

    A fifth of the updates is the warm-up. The history of a run does grow, by 2 kilobytes per
    update here, and by three times as much for as long as a checkpoint is written.
    """
    found = soaked(n_updates, tmp_path / "run")
    assert len(found) == n_updates
    warm = found[n_updates // 5 :]
    largest = max(m["bytes"] for m in warm)
    assert largest < 1.02 * warm[0]["bytes"]
    for what in ("hooks", "files", "threads", "system threads"):
        assert {m[what] for m in warm} == {warm[0][what]}, what
    assert warm[0]["hooks"] == 0
    assert not list((tmp_path / "run").glob(".tmp-*"))
