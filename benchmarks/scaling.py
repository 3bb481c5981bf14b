"""Strong scaling of the curvature pass over processes, and what they send each other.

``python -m benchmarks.scaling`` prints the wall time of one update (accumulation over all ranks and
eigenvalues, each of them on one rank) on the LeNet of the other benchmarks, for 1 and 2 processes
of one thread each, and the megabytes of sums that one update adds up over the ranks. It needs as
many idle cores as processes. Beside it stands the model

    T(W) = T_pass(1) / W + T_eigen(1) / W + 2 (W - 1) / W * megabytes / bandwidth

with both times measured on one process and the bandwidth of an all-reduce of the same size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.networks import BATCH, N_DATA, digits, lenet
from margeq.comm import current_comm
from margeq.curvature.options import KfacOptions
from margeq.data import TensorLoader
from margeq.distributed import accumulate, decompose, shard
from margeq.state import CurvatureState

__all__ = ["Scaling", "main", "measure", "predicted"]

_REPEATS = 5


@dataclass(frozen=True)
class Scaling:
    """Medians of one update.

    Attributes:
        ranks: number of processes.
        accumulation: seconds of the pass over the data, with its reduction.
        eigenvalues: seconds until all ranks have all eigenvalues.
        reduction: seconds of an all-reduce of the same size alone.
        megabytes: what each rank adds to the sum.
    """

    ranks: int
    accumulation: float
    eigenvalues: float
    reduction: float
    megabytes: float

    @property
    def seconds(self) -> float:
        """Of the whole update."""
        return self.accumulation + self.eigenvalues


def predicted(alone: Scaling, ranks: int, reduction: float) -> float:
    """Seconds of one update on several ranks, from those on one and of the all-reduce."""
    return alone.seconds / ranks + reduction


def measure(ranks: int, root: str) -> Scaling:
    """Run the update on ``ranks`` processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (ranks, root, folder), nprocs=ranks, start_method="spawn")
        return Scaling(**json.loads(Path(folder, "scaling.json").read_text()))


def _work(rank: int, ranks: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = _scaling(KfacOptions(hessian_root=root))
    if rank == 0:
        Path(folder, "scaling.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def _scaling(options: KfacOptions) -> Scaling:
    comm = current_comm()
    model, data = lenet(), digits().dataset
    share = shard(TensorLoader(*data.tensors, BATCH))
    state = accumulate(model, share, options=options)
    payload = torch.zeros(_numbers(state), dtype=torch.float64)
    return Scaling(
        comm.size,
        _median(lambda: accumulate(model, share, options=options)),
        _median(lambda: decompose(state)),
        _median(lambda: comm.sum([payload])),
        payload.numel() * payload.element_size() / 1e6,
    )


def _numbers(state: CurvatureState) -> int:
    sums = [t for kron in state.kron.values() for t in kron.tensors().values()]
    return state.fit.numel() + sum(t.numel() for t in sums)


def _median(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        current_comm().any(False)  # all ranks begin together
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--root", default="exact", choices=["exact", "adaptive", "mc"])
    arguments = parser.parse_args()
    print(f"{N_DATA} data, root {arguments.root}\n")
    print("| ranks | pass s | eigenvalues s | update s | speed-up | model s | MB per update |")
    print("|---|---|---|---|---|---|---|")
    alone = measure(1, arguments.root)
    for ranks in arguments.ranks:
        row = alone if ranks == 1 else measure(ranks, arguments.root)
        print(
            f"| {ranks} | {row.accumulation:.3f} | {row.eigenvalues:.3f} | {row.seconds:.3f} | "
            f"{alone.seconds / row.seconds:.2f} | "
            f"{predicted(alone, ranks, row.reduction if ranks > 1 else 0.0):.3f} | "
            f"{row.megabytes if ranks > 1 else 0.0:.2f} |"
        )


if __name__ == "__main__":
    main()
