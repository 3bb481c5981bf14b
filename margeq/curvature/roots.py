"""Roots S of the output Hessian, ``Lambda_n = S_n S_n^T``, column by column.

Gaussian roots carry no noise: ``1 / (sigma^2 T)`` enters once, in the objective.
"""

from __future__ import annotations

from math import log2
from typing import Protocol

import torch
from torch import Tensor

from margeq.comm import Comm
from margeq.curvature.sampling import normals, uniforms

__all__ = [
    "GaussianRoot",
    "MonteCarloGaussianRoot",
    "MonteCarloSoftmaxRoot",
    "Root",
    "ScaledRoot",
    "SketchedRoot",
    "SoftmaxRoot",
    "TraceHistogram",
    "drawn_outputs",
]

_MC_STREAM = 1
_SIGN_STREAM = 0


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

    All in logarithms: exact for the most confident predictions, and differentiable in the logits.

    Args:
        logits: ``[n, C]``.
    """

    def __init__(self, logits: Tensor) -> None:
        self._dtype = logits.dtype
        log_p = torch.log_softmax(logits.double(), -1)
        self._log_p, self._order = log_p.sort(dim=-1, descending=True, stable=True)
        self.n_columns = logits.shape[-1] - 1
        log_tails = self._log_p.flip(-1).logcumsumexp(-1).flip(-1)  # of the sum of p from j on
        self._log_rest = log_tails[:, 1:]
        self._log_diagonal = 0.5 * (self._log_p[:, :-1] + self._log_rest - log_tails[:, :-1])

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, C - 1]``."""
        log_squares = (2.0 * self._log_p).flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]
        below = (log_squares - 2.0 * self._log_rest).exp()
        return (2.0 * self._log_diagonal).exp() * (1.0 + below)

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, C]``."""
        pivot = which[:, None]
        log_p, order = self._log_p[data], self._order[data]
        log_diagonal = self._log_diagonal[data, which][:, None]
        classes = torch.arange(log_p.shape[1], device=log_p.device)
        # above the pivot p / q may overflow, so that nothing may be computed there
        offset = torch.where(classes > pivot, log_p - self._log_rest[data, which][:, None], 0.0)
        below = torch.where(classes > pivot, -(offset + log_diagonal).exp(), 0.0)
        column = torch.where(classes == pivot, log_diagonal.exp(), below)
        return torch.zeros_like(column).scatter(1, order, column).to(self._dtype)


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


class ScaledRoot:
    """Root ``diag(s) S`` of outputs that are measured in other units, from another root ``S``.

    Args:
        root: any.
        scales: ``s``, one per output.
    """

    def __init__(self, root: Root, scales: Tensor) -> None:
        self._root, self._scales = root, scales
        self.n_columns = root.n_columns

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, v]``."""
        norms = self._root.square_norms()
        everyone = torch.arange(len(norms), device=norms.device)
        columns = [self.columns(everyone, everyone * 0 + v) for v in range(self.n_columns)]
        return torch.stack([column.double().square().sum(-1) for column in columns], -1)

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, K]``."""
        columns = self._root.columns(data, which)
        return columns * self._scales.to(columns)


class SketchedRoot:
    """Unbiased root ``S z / sqrt(M)`` with random signs ``z``, from another root ``S``.

    Unlike drawn labels, the signs do not depend on the outputs, so the derivative of the sketch
    is an unbiased estimate of the derivative of ``S S^T``.

    Args:
        root: an exact one.
        keys: one 64-bit key per datum.
        n_samples: ``M``, number of columns.
    """

    def __init__(self, root: Root, keys: Tensor, n_samples: int) -> None:
        self._root = root
        draws = uniforms(keys, _SIGN_STREAM, root.n_columns * n_samples)
        signs = torch.where(draws < 0.5, -1.0, 1.0).to(draws.dtype) / n_samples**0.5
        self._signs = signs.reshape(len(keys), n_samples, root.n_columns)
        self.n_columns = n_samples

    def square_norms(self) -> Tensor:
        """Squared norm of each column, ``[n, M]``."""
        everyone = torch.arange(len(self._signs), device=self._signs.device)
        columns = [self.columns(everyone, everyone * 0 + v) for v in range(self.n_columns)]
        return torch.stack([column.double().square().sum(-1) for column in columns], -1)

    def columns(self, data: Tensor, which: Tensor) -> Tensor:
        """Column ``which[m]`` of datum ``data[m]``, ``[m, K]``."""
        signs = self._signs[data, which]
        total = None
        for v in range(self._root.n_columns):
            column = self._root.columns(data, torch.full_like(data, v))
            column = column * signs[:, v, None].to(column.dtype)
            total = column if total is None else total + column
        assert total is not None
        return total


def drawn_outputs(keys: Tensor, n_outputs: int, n_samples: int) -> Tensor:
    """Outputs that a datum stands for, ``[n, M]``, each one as likely, drawn by sample content.

    Times ``(K / M)^1/2`` their unit vectors are an unbiased root of the identity, whose columns
    belong to one output each.

    Returns:
        Numbers of outputs.
    """
    draws = uniforms(keys, _MC_STREAM, n_samples) * n_outputs
    return draws.long().clamp_max(n_outputs - 1)


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

    @property
    def total(self) -> float:
        """The trace of the output Hessian over all data."""
        return float(self._trace.sum())

    def reduced(self, comm: Comm) -> TraceHistogram:
        """The distribution over the data of all ranks."""
        everyone = TraceHistogram()
        (everyone._trace,) = comm.sum([self._trace])
        return everyone

    def share_above(self, threshold: float) -> float:
        """Share of the trace above an edge that :meth:`threshold` gave for these or other data."""
        if self.total <= 0 or threshold <= 0:
            return 1.0
        lowest_bin = round(log2(threshold) * self._PER_OCTAVE) - self._LOWEST
        kept = self._trace.flip(0).cumsum(0)
        return float(kept[self._BINS - 1 - lowest_bin] / kept[-1])

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
