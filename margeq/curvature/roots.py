"""Roots S of the output Hessian, ``Lambda_n = S_n S_n^T``, column by column.

Gaussian roots carry no noise: ``1 / (sigma^2 T)`` enters once, in the objective.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from margeq.curvature.sampling import normals, uniforms

__all__ = [
    "GaussianRoot",
    "MonteCarloGaussianRoot",
    "MonteCarloSoftmaxRoot",
    "Root",
    "SoftmaxRoot",
    "TraceHistogram",
]

_MC_STREAM = 1


class Root(Protocol):
    """Columns of the root of a batch; column ``v`` has one row per datum."""

    n_columns: int

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, v]``."""
        ...

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, K]``."""
        ...


class SoftmaxRoot:
    """Exact root of ``diag(p) - p p^T`` with C - 1 columns, largest classes first.

    A closed-form Cholesky factor: with classes in descending order of ``p`` and
    ``q_j = sum_(k>j) p_k``,

        L_jj = sqrt(p_j q_j / q_(j-1)),   L_ij = -(p_i / q_j) L_jj  for i > j.

    Stable for confident predictions because the tails are summed from the small end.

    Args:
        logits: ``[n, C]``.
    """

    def __init__(self, logits: Tensor) -> None:
        self._dtype = logits.dtype
        probabilities = torch.softmax(logits.detach().double(), -1)
        self._p, self._order = probabilities.sort(dim=-1, descending=True, stable=True)
        tails = self._p.flip(-1).cumsum(-1).flip(-1)  # tails[j] = sum of p from j on
        self._rest = torch.nn.functional.pad(tails[:, 1:], (0, 1))
        self._diagonal = (self._p * self._rest / tails.clamp_min(1e-300)).sqrt()
        self._below = -self._diagonal / self._rest.clamp_min(1e-300)
        self.n_columns = logits.shape[-1] - 1

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, C - 1]``."""
        squares = self._p.square().flip(-1).cumsum(-1).flip(-1)
        rest_squares = torch.nn.functional.pad(squares[:, 1:], (0, 1))
        relative = rest_squares / self._rest.square().clamp_min(1e-300)
        return (self._diagonal.square() * (1.0 + relative))[:, : self.n_columns]

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, C]``."""
        pivot = which[:, None]
        p, order = self._p[data], self._order[data]
        is_below = torch.arange(p.shape[1], device=p.device) > pivot
        column = torch.where(is_below, p * self._below[data, which][:, None], 0.0)
        column.scatter_(1, pivot, self._diagonal[data, which][:, None])
        return torch.empty_like(column).scatter_(1, order, column).to(self._dtype)


class MonteCarloSoftmaxRoot:
    """Unbiased root: ``(p - e_y) / sqrt(M)`` with labels ``y ~ p`` drawn by sample content.

    Args:
        logits: ``[n, C]``.
        keys: one 64-bit key per datum.
        n_samples: ``M``, number of columns.
    """

    def __init__(self, logits: Tensor, keys: Tensor, n_samples: int) -> None:
        self._dtype = logits.dtype
        self._p = torch.softmax(logits.detach().double(), -1)
        draws = uniforms(keys, _MC_STREAM, n_samples)
        labels = torch.searchsorted(self._p.cumsum(-1), draws)
        self._labels = labels.clamp_max(logits.shape[-1] - 1)
        self.n_columns = n_samples

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, M]``."""
        picked = self._p.gather(1, self._labels)
        return (self._p.square().sum(-1, keepdim=True) - 2 * picked + 1) / self.n_columns

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, C]``."""
        labels = self._labels[data, which]
        one_hot = torch.nn.functional.one_hot(labels, self._p.shape[-1])
        return ((self._p[data] - one_hot) / self.n_columns**0.5).to(self._dtype)


class GaussianRoot:
    """Exact root of the identity: the unit vectors ``e_k``.

    Args:
        outputs: ``[n, K]``.
    """

    def __init__(self, outputs: Tensor) -> None:
        self._like = outputs.detach()
        self.n_columns = outputs.shape[-1]

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, K]``."""
        return torch.ones_like(self._like, dtype=torch.float64)

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, K]``."""
        columns = self._like.new_zeros(len(data), self.n_columns)
        return columns.scatter_(1, which[:, None], 1.0)


class MonteCarloGaussianRoot:
    """Unbiased root of the identity: ``z / sqrt(M)`` with ``z ~ N(0, I)`` by sample content.

    Args:
        outputs: ``[n, K]``.
        keys: one 64-bit key per datum.
        n_samples: ``M``, number of columns.
    """

    def __init__(self, outputs: Tensor, keys: Tensor, n_samples: int) -> None:
        n_data, n_outputs = outputs.shape
        draws = normals(keys, _MC_STREAM, n_samples * n_outputs)
        self._columns = draws.reshape(n_data, n_samples, n_outputs) / n_samples**0.5
        self._dtype = outputs.dtype
        self.n_columns = n_samples

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, M]``."""
        return self._columns.square().sum(-1)

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, K]``."""
        return self._columns[data, which].to(self._dtype)


class TraceHistogram:
    """Data-set-wide distribution of squared column norms; additive, so any batch split is exact.

    Bins are 1/32 octave wide, so the threshold that keeps a share of the trace keeps at most the
    columns of one bin more than necessary.
    """

    _PER_OCTAVE = 32
    _LOWEST = -130 * _PER_OCTAVE
    _BINS = 160 * _PER_OCTAVE

    def __init__(self) -> None:
        self._trace = torch.zeros(self._BINS, dtype=torch.float64)

    def add(self, square_norms: Tensor) -> None:
        """Add the columns of one batch."""
        values = square_norms.detach().double().flatten().cpu()
        octaves = values.clamp_min(2.0**-140).log2() * self._PER_OCTAVE
        bins = (octaves.floor().long() - self._LOWEST).clamp(0, self._BINS - 1)
        self._trace.index_add_(0, bins, values)

    def threshold(self, share: float) -> tuple[float, float]:
        """Largest bin edge above which at least ``share`` of the trace lies, and that share."""
        kept = self._trace.flip(0).cumsum(0)
        if kept[-1] <= 0:
            return 0.0, 1.0
        kept = kept / kept[-1]
        reached = int((kept >= share).nonzero()[0])
        lowest_bin = self._BINS - 1 - reached
        if lowest_bin == 0:
            return 0.0, float(kept[reached])
        # norms exactly on the edge (every column of a Gaussian root) belong to the bin
        edge = 2.0 ** ((lowest_bin + self._LOWEST) / self._PER_OCTAVE) * (1.0 - 1e-9)
        return edge, float(kept[reached])
