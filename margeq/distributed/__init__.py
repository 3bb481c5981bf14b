"""Several processes: torchrun, Slurm, or whatever starts them.

Each rank brings its own share of the data. Sums over the data become sums over all ranks before
they are decomposed, so that all ranks have the evidence of all data, whatever their number:

    torch.distributed.init_process_group()
    share = margeq.distributed.shard(dataset, batch_size=64, shuffle=True)
    result = margeq.optimize_marglik(model, share, seed=0)              # the same on all ranks

With a training loop of one's own:

    share = margeq.distributed.shard(dataset, batch_size=256)
    state = margeq.distributed.accumulate(model, share)
    value = margeq.log_marginal_likelihood(state, prior, likelihood)    # the same on all ranks
"""

from margeq.comm import (
    Comm,
    NullComm,
    TorchComm,
    current_comm,
    require_equal,
    together,
)
from margeq.distributed.accumulation import accumulate
from margeq.distributed.eigen import decompose, shared_out
from margeq.distributed.ordered import accumulate_in_order
from margeq.distributed.shards import shard, share_bounds
from margeq.distributed.training import mean_over_ranks
from margeq.reduction import reduce_state

__all__ = [
    "Comm",
    "NullComm",
    "TorchComm",
    "accumulate",
    "accumulate_in_order",
    "current_comm",
    "decompose",
    "mean_over_ranks",
    "reduce_state",
    "require_equal",
    "shard",
    "share_bounds",
    "shared_out",
    "together",
]
