"""The training loss under DistributedDataParallel, for loops of one's own.

DistributedDataParallel averages gradients over ranks, so that means over the ranks' own batches
count a datum of a small batch more than one of a large batch. With

    loss on rank r = size * (sum over its batch) / (number of data on all ranks)

the averaged gradient is that of the mean over all data of the step, however they are shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from margeq.comm import Comm, current_comm

__all__ = ["mean_over_ranks"]


def mean_over_ranks(total: Tensor, n_data: int, comm: Comm | None = None) -> Tensor:
    """A loss whose gradient, averaged over ranks, is that of the mean over the data of all ranks.

    A penalty of the weights that all ranks compute alike is added to it as it is.

    Args:
        total: sum of the losses of this rank's data, a scalar.
        n_data: how many data these are; not all ranks may have none.
        comm: the ranks; default: all of torch.distributed, if it is initialised.

    Returns:
        A scalar, differentiable in ``total``.

    Example:
        >>> float(mean_over_ranks(torch.tensor(6.0), 4))
        1.5
    """
    comm = current_comm() if comm is None else comm
    (n_global,) = comm.sum([torch.tensor([n_data], dtype=torch.int64, device=total.device)])
    return total * (comm.size / int(n_global))
