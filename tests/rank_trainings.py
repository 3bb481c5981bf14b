"""Small trainings of which every rank has a share, alike for any number of ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import margeq
from margeq.checkpoint import Checkpoints
from margeq.comm import current_comm
from margeq.data import TensorLoader
from margeq.distributed import shard
from margeq.layers import FactoredLinear2d, ResidualPathways, SparseConv2d
from tests.oracles import F64
from tests.resume_cases import digest

N_DATA = 29
GLOBAL_BATCH = 12

QUICK = {
    "n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "seed": 0, "progress": "none",
    "optimizer_kwargs": {"lr": 0.02},
}  # fmt: skip


def call(model, loader, **options):
    """One call that does not mind that it is short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", margeq.errors.ConvergenceWarning)
        return margeq.optimize_marglik(model, loader, **{**QUICK, **options})


def pictures(n=N_DATA, dtype=F64):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=F64)
    return x.to(dtype), (x.mean((1, 2, 3)) > 0).long()


def shuffled_share(seed=3, n=N_DATA, together=GLOBAL_BATCH, dtype=F64):
    """Batches that are the same for all ranks together, whatever their number."""
    data, size = TensorDataset(*pictures(n, dtype)), current_comm().size
    return shard(data, together // size, shuffle=True, seed=seed)


def smooth_net():
    """A lengthscale inside, no random numbers."""
    torch.manual_seed(2)
    return nn.Sequential(
        SparseConv2d(1, 2, 3, padding=1, lengthscale=1.0), nn.Tanh(), nn.Flatten(),
        nn.Linear(32, 2),
    ).double()  # fmt: skip


def paths_net(dropout=0.0):
    """Two candidate paths under a layer."""
    torch.manual_seed(2)
    named = {
        "conv": nn.Conv2d(1, 3, 3, padding=1),
        "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4)),
    }
    head = (nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(48, 2))
    return nn.Sequential(ResidualPathways(named), *head).double()


def parts(batches, edges):
    """Shares of batches: each cut at the edges, so that rank ``r`` has part ``r``, if not empty."""
    shares = [[] for _ in range(len(edges) + 1)]
    for x, y in batches:
        for share, (px, py) in zip(
            shares, zip(x.tensor_split(edges), y.tensor_split(edges), strict=True), strict=True
        ):
            if len(py):
                share.append((px, py))
    return shares


def ordered_share(rank, edges, dtype=F64):
    """Three batches in order, of 12, 12 and 5 data."""
    x, y = pictures(dtype=dtype)
    batches = list(zip(x.split(GLOBAL_BATCH), y.split(GLOBAL_BATCH), strict=True))
    return parts(batches, edges)[rank]


def numbers(result):
    """Losses and all that updates found, as numbers; and the weights."""
    found = []
    for restart in result.restarts:
        found += restart.history.losses
        for u in restart.history.updates:
            shares = [s for by_path in u.function_share.values() for s in by_path.values()]
            inside = [v for values in u.hyperparameters.values() for v in values]
            found += [u.log_marginal_likelihood, u.log_likelihood, u.occam, *shares, *inside]
            found += [*u.prior_precision.values(), *u.effective.values()]
    found += [v for values in result.variances.values() for v in values.values()]
    weights = [t.detach().flatten() for t in result.model.state_dict().values()]
    return torch.cat([torch.tensor(found, dtype=F64), *weights])


def resumable(directory, *, built=0, callbacks=(), dropout=0.3, gap=600.0, **options):
    """Paths, dropout, shuffled shares of all data; written after every epoch."""
    torch.manual_seed(built)
    where = directory and Checkpoints(directory, max_overhead=float("inf"), longest_gap=gap)
    result = call(
        paths_net(dropout), shuffled_share(), checkpoint_dir=where, callbacks=callbacks,
        **{"restarts": ["symmetric", "free"], "marglik_frequency": 1, "n_epochs": 3, **options},
    )  # fmt: skip
    return digest(result)


def plain_loader(n=8):
    return TensorLoader(*pictures(n), 4)


class Fatal(nn.Module):
    """Ends its process in the training pass of a number, if at all."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def forward(self, x):
        self.left -= self.training and torch.is_grad_enabled()
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def launched(rank, folder, fatal_pass=-1):
    """What torchrun starts: the digest, and the epochs at which runs begin or go on."""
    where = None if folder is None else Checkpoints(folder, max_overhead=float("inf"))
    begins = []
    net = nn.Sequential(Fatal(fatal_pass), *paths_net(0.3))
    found = call(
        net, shuffled_share(), checkpoint_dir=where, restarts=["free", "only:conv"],
        callbacks=[lambda event: begins.append(event.data.get("epoch")) if event.kind == "start"
                   else None],
    )  # fmt: skip
    return digest(found), begins


if __name__ == "__main__":
    # rank 1 of the first attempt kills itself in the middle of the second run
    torch.set_num_threads(1)
    target, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    number, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # a store of each attempt's own: keys of ranks that were killed are not in the way
    store = dist.FileStore(str(target / f"store-{attempt}"), n_ranks)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=number, world_size=n_ranks, timeout=limit)
    fatal = 29 if number == 1 and attempt == 0 else -1
    answer = launched(number, target / "checkpoints", fatal)
    (target / f"{attempt}-{number}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()
