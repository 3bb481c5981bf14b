"""Eigenvalues of Kronecker factors, each factor on one rank only.

    cost of a factor [b, d, d] ~ b d^3,   the next costly one goes to the least busy rank

Evidence steps need eigenvalues only, a few numbers per factor, so that sharing them is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from margeq.comm import Comm, current_comm, together
from margeq.curvature.forms import BlockCurvature, BlockEigenvalues, without_zeros
from margeq.curvature.kron import BlockKron
from margeq.laplace import Spectrum
from margeq.laplace import decompose as decompose_alone
from margeq.state import CurvatureState

__all__ = ["decompose", "shared_out"]


def decompose(state: CurvatureState, comm: Comm | None = None) -> Spectrum:
    """As :func:`margeq.laplace.decompose`, with the work on Kronecker factors shared by all ranks.

    Other flavours have one block or cheap ones; each rank then decomposes on its own.

    Args:
        state: sums of all data, the same on all ranks.
        comm: the ranks; default: all of torch.distributed, if it is initialised.

    Returns:
        The same eigenvalues on all ranks, to the last bit those of one process.

    Raises:
        DistributedError: if another rank has failed or cannot be reached.
        NonFiniteError: if the curvature is NaN or infinite.
        NotPSDError: if a decomposition fails for good.
    """
    comm = current_comm() if comm is None else comm
    curvature = state.curvature
    blocks = curvature.blocks if isinstance(curvature, BlockCurvature) else {}
    krons = {name: block for name, block in blocks.items() if isinstance(block, BlockKron)}
    if comm.size == 1 or not krons:
        with together(comm):
            return decompose_alone(state)
    return Spectrum(
        _eigenvalues(krons, comm),
        state.square_norms,
        state.fit,
        state.n_data,
        state.flavour,
        state.checksum,
        state.log_hyperprior,
    )


def shared_out(costs: Sequence[float], size: int) -> list[int]:
    """Which rank does which job: the costliest first, each to the rank with least to do.

    Args:
        costs: of each job.
        size: number of ranks.

    Returns:
        One rank per job.

    Example:
        >>> shared_out([1.0, 5.0, 2.0, 4.0, 3.0], 2)
        [0, 0, 0, 1, 1]
    """
    load, owners = [0.0] * size, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        owners[job] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owners[job]] += costs[job]
    return owners


@dataclass(frozen=True)
class _Job:
    """Eigenvalues of one factor of one weight."""

    name: str
    kron: BlockKron
    of_inputs: bool

    @property
    def factor(self) -> Tensor:
        return self.kron.input_cov if self.of_inputs else self.kron.grad_cov

    @property
    def cost(self) -> float:
        blocks, size, _ = self.factor.shape
        return float(blocks * size**3)

    def run(self) -> tuple[Tensor, int]:
        find = self.kron.input_eigenvalues if self.of_inputs else self.kron.grad_eigenvalues
        return find(self.name)


def _eigenvalues(krons: Mapping[str, BlockKron], comm: Comm) -> BlockEigenvalues:
    jobs = [_Job(name, kron, side) for name, kron in krons.items() for side in (False, True)]
    owners = shared_out([job.cost for job in jobs], comm.size)
    # a sum in which only the owner's numbers are not zero keeps them to the last bit
    values = [job.factor.new_zeros(job.factor.shape[:2]) for job in jobs]
    clamped = torch.zeros((), dtype=torch.int64, device=values[0].device)
    with together(comm):
        for i, job in enumerate(jobs):
            if owners[i] == comm.rank:
                values[i], repaired = job.run()
                clamped += repaired
    *values, clamped = comm.sum([*values, clamped])
    pairs = zip(krons.items(), values[::2], values[1::2], strict=True)
    logs = {name: without_zeros(kron.joined_logs(grad, inp)) for (name, kron), grad, inp in pairs}
    return BlockEigenvalues(logs, int(clamped))
