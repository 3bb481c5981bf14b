"""Strong scaling of one update over processes, beside the cost model, and what ranks send.

``python -m benchmarks.scaling`` measures one update (a pass over all data and the eigenvalues, each
of them on one rank) on 1 and 2 processes of one thread each, and needs as many idle cores. The
rates of the model come from one process and from an all-reduce of another size; so what it says
about two processes can be wrong. ``--write`` puts the tables into ``docs/scaling.md``, followed by
what the model says about a ResNet-18 on up to 64 GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.cost_model import ASSUMED, Layer, Machine, Update, resnet18, seconds
from benchmarks.networks import BATCH, N_DATA, digits, lenet
from margeq.comm import current_comm
from margeq.curvature.options import KfacOptions
from margeq.data import TensorLoader
from margeq.distributed import accumulate, decompose, shard

__all__ = ["NETWORKS", "Scaling", "main", "measure", "vgg"]

_REPEATS = 5
_PROBE_MEGABYTES = 4.0
_PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def vgg() -> nn.Sequential:
    """Five layers on 28 x 28 whose factors are costly: up to 1,152 x 1,152."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(32, 128, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128, bias=False),
        nn.ReLU(),
        nn.Linear(128, 10, bias=False),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Layer]]] = {
    "LeNet": (
        lenet,
        [
            Layer(25, 6, 784, True),
            Layer(150, 16, 100, True),
            Layer(400, 120, 1, True),
            Layer(120, 10, 1, True),
        ],
    ),
    "VGG": (
        vgg,
        [
            Layer(9, 32, 784),
            Layer(288, 128, 49),
            Layer(1152, 128, 49),
            Layer(512, 128, 1),
            Layer(128, 10, 1),
        ],
    ),
}


@dataclass(frozen=True)
class Scaling:
    """Medians of one update.

    Attributes:
        ranks: number of processes.
        accumulation: seconds of the pass over the data, with its reduction.
        eigenvalues: seconds until all ranks have all eigenvalues.
        megabytes: what each rank adds to the sums.
        probe: seconds of an all-reduce of ``_PROBE_MEGABYTES``.
    """

    ranks: int
    accumulation: float
    eigenvalues: float
    megabytes: float
    probe: float

    @property
    def seconds(self) -> float:
        """Of the whole update."""
        return self.accumulation + self.eigenvalues


def measure(ranks: int, network: str) -> Scaling:
    """Run the update on ``ranks`` processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (ranks, network, folder), nprocs=ranks, start_method="spawn")
        return Scaling(**json.loads(Path(folder, "scaling.json").read_text()))


def _work(rank: int, ranks: int, network: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = _scaling(network)
    if rank == 0:
        Path(folder, "scaling.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def _scaling(network: str) -> Scaling:
    comm = current_comm()
    model, data = NETWORKS[network][0](), digits().dataset
    share = shard(TensorLoader(*data.tensors, BATCH))
    options = KfacOptions(hessian_root="mc")
    state = accumulate(model, share, options=options)
    sums = [t for kron in state.kron.values() for t in kron.tensors().values()]
    payload = torch.zeros(int(_PROBE_MEGABYTES * 1e6 / 8), dtype=torch.float64)
    return Scaling(
        comm.size,
        _median(lambda: accumulate(model, share, options=options)),
        _median(lambda: decompose(state)),
        (state.fit.numel() + sum(t.numel() for t in sums)) * 8 / 1e6,
        _median(lambda: comm.sum([payload])),
    )


def _median(run: Callable[[], object]) -> float:
    found = []
    for _ in range(_REPEATS + 1):
        current_comm().any(False)  # all ranks begin together
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def _calibrated(update: Update, alone: Scaling, pair: Scaling) -> Machine:
    """Rates of this machine, from one process and the all-reduce of another size."""
    return Machine(
        "here",
        update.operations / alone.accumulation,
        update.busiest(1) / alone.eigenvalues,
        _PROBE_MEGABYTES * 1e6 / pair.probe,
    )


def _measured_table() -> list[str]:
    lines = [
        "| network | ranks | pass s | eigenvalues s | update s | speed-up | model s | MB sent |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, (_, layers) in NETWORKS.items():
        update = Update(layers, N_DATA, 1)
        alone, pair = measure(1, name), measure(2, name)
        machine = _calibrated(update, alone, pair)
        for row in (alone, pair):
            model = sum(seconds(update, machine, row.ranks))
            sent = row.megabytes if row.ranks > 1 else 0.0
            lines.append(
                f"| {name} | {row.ranks} | {row.accumulation:.3f} | {row.eigenvalues:.3f} | "
                f"{row.seconds:.3f} | {alone.seconds / row.seconds:.2f} | {model:.3f} | "
                f"{sent:.2f} |"
            )
    return lines


def _assumed_table(update: Update, machines: Sequence[Machine]) -> list[str]:
    lines = [
        "| assumed machine | ranks | pass s | eigenvalues s | reduction s | update s | speed-up |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for machine in machines:
        alone = sum(seconds(update, machine, 1))
        for ranks in (1, 8, 16, 32, 64):
            parts = seconds(update, machine, ranks)
            cells = " | ".join(f"{part:.2f}" for part in (*parts, sum(parts)))
            lines.append(f"| {machine.name} | {ranks} | {cells} | {alone / sum(parts):.1f} |")
    return lines


def _page() -> str:
    update = Update(resnet18(), 50_000, 1)
    weights = sum(layer.inner * layer.out for layer in update.layers)
    largest = update.busiest(1) / update.busiest(64)
    return "\n".join([
        "# Scaling",
        "",
        f"Written by `python -m benchmarks.scaling --write`; do not edit. Wall time, median of "
        f"{_REPEATS}, processes of one thread, gloo, torch {torch.__version__}; one Monte-Carlo "
        f"column, {N_DATA:,} digits of 28 × 28 in all, in batches of {BATCH}. *Model* is "
        f"`benchmarks/cost_model.py` with the rates of one process and of an all-reduce of "
        f"{_PROBE_MEGABYTES:g} MB. It knows neither the messages by which ranks agree nor that the "
        f"processes share their memory, and is a lower bound.",
        "",
        *_measured_table(),
        "",
        "## A ResNet-18 on GPUs, by the model",
        "",
        f"**Computed, not measured**: {weights:,} weights, 50,000 pictures of 32 × 32, one column, "
        f"{update.megabytes:.0f} MB of sums per update in float64. The rates of the machines are "
        f"round figures that were assumed. Eigenvalues stop scaling at {largest:.2f} ×, where each "
        f"of the three factors of size 4,608 has a rank of its own.",
        "",
        *_assumed_table(update, ASSUMED),
        "",
    ])  # fmt: skip


def main() -> None:
    """Measure and print the tables, or write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {_PAGE.name}")
    arguments = parser.parse_args()
    page = _page()
    print(page)
    if arguments.write:
        _PAGE.write_text(page)


if __name__ == "__main__":
    main()
