"""Functions that run on several ranks at once, connected by gloo through a file: no fixed ports."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# a clean server forks the ranks after the slow imports, also those that torch puts off until the
# first gradient and the first DistributedDataParallel, and before any thread is there
_SLOW = ["tests.test_distributed", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_SLOW)


def on_ranks(size: int, function: Callable[..., Any], *args: Any, seconds: float = 30.0) -> list:
    """What a function gives on each rank, or the exception that it raises there.

    A rank that ends without an answer gives ``None``.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_run, args=(rank, size, folder, seconds, function, args))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + 10 + 2 * seconds
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.is_alive() for process in ranks):
            for process in ranks:
                process.kill()
            raise TimeoutError("a rank still runs, long after its timeout")
        answers = [Path(folder, f"{rank}.pickle") for rank in range(size)]
        return [pickle.loads(a.read_bytes()) if a.exists() else None for a in answers]


def _run(rank: int, size: int, folder: str, seconds: float, function: Any, args: Any) -> None:
    if sys.platform == "linux":  # wherever the host's name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    try:
        answer = function(rank, *args)
    except Exception as error:
        answer = error
    half_written = Path(folder, f"{rank}.part")
    half_written.write_bytes(pickle.dumps(answer))
    half_written.rename(Path(folder, f"{rank}.pickle"))
    if not isinstance(answer, Exception):
        with suppress(RuntimeError):  # others may have ended with an error
            dist.barrier()
    dist.destroy_process_group()
