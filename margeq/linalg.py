"""Guarded eigenvalues and log-space sums: everything the evidence needs from linear algebra."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from margeq.errors import NonFiniteError, NotPSDError, NumericalWarning

__all__ = [
    "accumulation_dtype",
    "gram",
    "is_finite",
    "log1p_ratio",
    "log_det_one_plus",
    "project",
    "psd_block_eigenvalues",
    "psd_eigenvalues",
    "psd_eigh",
    "whitened",
]

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
_JITTER_LADDER = (1e-10, 1e-8, 1e-6)
_Decomposition = TypeVar("_Decomposition")


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Widest float of the device: factors of many batches are summed in it."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite; much cheaper than ``isfinite(values).all()``."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    # a NaN or an infinity always spoils the sum; a sum can also overflow without one
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def psd_eigenvalues(matrices: Tensor, name: str, resolution: float = 0.0) -> tuple[Tensor, int]:
    """Eigenvalues of positive semi-definite matrices, never negative, never silently repaired.

    Eigenvalues below ``resolution`` times the largest one are rounding noise of the dtype that
    the factor was computed in and are set to zero.

    Args:
        matrices: symmetric matrices ``[..., d, d]``.
        name: what the matrices belong to, for messages.
        resolution: relative size of the noise floor, e.g. the machine epsilon of the model.

    Returns:
        Eigenvalues ``[..., d]``, ascending before clamping, and the number of eigenvalues that
        were clearly negative and had to be clamped.

    Raises:
        NonFiniteError: if an entry is NaN or infinite.
        NotPSDError: if no jitter of the ladder makes the decomposition succeed.
    """
    return _clamped(_guarded(torch.linalg.eigvalsh, matrices, name), name, resolution)


def psd_block_eigenvalues(
    blocks: Iterable[tuple[Tensor, int]], name: str, resolution: float = 0.0
) -> tuple[Tensor, int]:
    """As :func:`psd_eigenvalues`, of a matrix that is block-diagonal in some basis.

    Args:
        blocks: symmetric or Hermitian matrices ``[..., d, d]``, and how often each one appears.
        name: what the matrices belong to, for messages.
        resolution: size of the noise floor relative to the largest eigenvalue of all blocks.

    Returns:
        Eigenvalues ``[..., sum of d]`` of one block after the other, and the clamped count.

    Raises:
        NonFiniteError: if an entry is NaN or infinite.
        NotPSDError: if no jitter of the ladder makes a decomposition succeed.
    """
    values = [
        _guarded(torch.linalg.eigvalsh, matrices, name).repeat_interleave(times, dim=-1)
        for matrices, times in blocks
    ]
    return _clamped(torch.cat(values, dim=-1), name, resolution)


def psd_eigh(matrices: Tensor, name: str, resolution: float = 0.0) -> tuple[Tensor, Tensor, int]:
    """As :func:`psd_eigenvalues`, with orthonormal eigenvectors in the columns of ``[..., d, d]``.

    Returns:
        Eigenvalues, eigenvectors and the number of eigenvalues that had to be clamped.

    Raises:
        NonFiniteError: if an entry is NaN or infinite.
        NotPSDError: if no jitter of the ladder makes the decomposition succeed.
    """
    values, vectors = _guarded(torch.linalg.eigh, matrices, name)
    kept, clamped = _clamped(values, name, resolution)
    return kept, vectors, clamped


def _guarded(
    decompose: Callable[[Tensor], _Decomposition], matrices: Tensor, name: str
) -> _Decomposition:
    """A decomposition of the symmetric part, with more and more jitter where it fails."""
    if not is_finite(matrices):
        count = int((~torch.isfinite(matrices)).sum())
        raise NonFiniteError(
            f"curvature factor of {name!r} has {count} non-finite entries "
            f"(shape {tuple(matrices.shape)}); lower the learning rate or check the data"
        )
    symmetric = 0.5 * (matrices + matrices.mH)
    try:
        return decompose(symmetric)
    except _LinAlgError:
        pass
    eye = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    mean_diagonal = symmetric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    for jitter in _JITTER_LADDER:
        warnings.warn(
            f"eigenvalues of the factor of {name!r} failed; adding {jitter:g} of its mean diagonal",
            NumericalWarning,
            stacklevel=3,
        )
        try:
            return decompose(symmetric + jitter * mean_diagonal * eye)
        except _LinAlgError:
            continue
    raise NotPSDError(
        f"the factor of {name!r} has no eigenvalue decomposition, even with jitter "
        f"{_JITTER_LADDER[-1]:g}; run the model in float64 or lower the learning rate"
    )


def _clamped(values: Tensor, name: str, resolution: float) -> tuple[Tensor, int]:
    largest = values.detach().amax(-1, keepdim=True).clamp_min(0.0)
    clamped = int((values.detach() < -1e3 * max(resolution, 1e-16) * largest).sum())
    if clamped:
        warnings.warn(
            f"{clamped} negative eigenvalues of the factor of {name!r} were set to zero",
            NumericalWarning,
            stacklevel=3,
        )
    keep = values.detach() > resolution * largest
    return torch.where(keep, values, torch.zeros_like(values)), clamped


def log1p_ratio(log_numerator: Tensor, log_denominator: Tensor) -> Tensor:
    """Elementwise ``log(1 + a/b)`` from ``log a`` and ``log b``; ``log a`` may be ``-inf``.

    Returns:
        Values that are finite, with finite gradients, for ratios from 1e-300 to 1e300.
    """
    # softplus gives 0 with gradient 0 at -inf; above the threshold it is linear to 1e-17
    return torch.nn.functional.softplus(log_numerator - log_denominator, threshold=40)


def log_det_one_plus(rows: Tensor) -> Tensor:
    """``log det(I + F^T F)`` for rows ``F [P, r]``, never negative, finite for entries to 1e30.

    Returns:
        A scalar, differentiable in the rows.
    """
    rows = rows if rows.shape[1] <= rows.shape[0] else rows.mT  # the same determinant
    products = rows.mT @ rows
    if _is_well_scaled(products):
        return 2.0 * _cholesky_one_plus(products).diagonal().log().sum()
    # singular values resolve the square of the range that products resolve
    values = torch.linalg.svdvals(rows)
    return log1p_ratio(2.0 * values[values > 0].log(), values.new_zeros(())).sum()


def whitened(rows: Tensor) -> Tensor:
    """``F (I + F^T F)^-1/2`` up to a rotation of its columns; its squares are never negative.

    Returns:
        ``[P, r]``; the sum of all squares is the trace of ``F^T F (I + F^T F)^-1``.
    """
    products = rows.mT @ rows if rows.shape[1] <= rows.shape[0] else None
    if products is not None and _is_well_scaled(products):
        lower = _cholesky_one_plus(products)
        return torch.linalg.solve_triangular(lower, rows.mT, upper=False).mT
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    return left * torch.sigmoid(2.0 * values.log()).sqrt()


def _is_well_scaled(products: Tensor) -> bool:
    """Whether the rounding noise of ``F^T F`` stays far below the identity."""
    trace = float(products.detach().diagonal().sum())
    return trace * torch.finfo(products.dtype).eps < 1e-8


def _cholesky_one_plus(products: Tensor) -> Tensor:
    eye = torch.eye(len(products), dtype=products.dtype, device=products.device)
    return torch.linalg.cholesky(products + eye)


def project(rows: Tensor, matrices: Tensor) -> Tensor:
    """``y[n,t,b,j] = sum_i M[b,j,i] r[n,t,b,i]``, in the memory order of the rows.

    A product along an axis that lies scattered in memory costs twenty times as much.

    Args:
        rows: ``[n, t, b, i]``.
        matrices: ``[b, j, i]``, or ``[1, j, i]`` for all blocks.

    Returns:
        ``[n, t, b, j]``.
    """
    n, t = rows.shape[:2]
    if t == 1 or rows.stride(1) != 1:
        if len(matrices) == 1:
            return rows @ matrices[0].mT
        by_block = rows.permute(2, 0, 1, 3).flatten(1, 2) @ matrices.mT
        return by_block.unflatten(1, (n, t)).permute(1, 2, 0, 3)
    if rows.stride(0) == t:
        columns = rows.permute(2, 3, 0, 1).flatten(2)
        # bmm, because matmul folds a single matrix into a product with transposed copies
        columns = torch.bmm(matrices.expand(len(columns), -1, -1), columns)
        return columns.unflatten(2, (n, t)).permute(2, 3, 0, 1)
    return (matrices @ rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gram(rows: Tensor) -> Tensor:
    """``G[b] = sum_(n,t) r[n,t,b] r[n,t,b]^T`` for rows ``[n, t, b, d]``.

    Chooses the product that needs no transposed copy of the rows.

    Returns:
        ``[b, d, d]``.
    """
    n, t, blocks, d = rows.shape
    if t > d and rows.stride(1) <= rows.stride(3) and rows.stride(0) > rows.stride(3):
        # one small product per datum: few features, many positions, positions innermost
        per_datum = rows.permute(0, 2, 3, 1)
        return (per_datum @ per_datum.mT).sum(0)
    if rows.stride(3) == 1 or t == 1:
        tall = rows.permute(2, 0, 1, 3).reshape(blocks, n * t, d)
        return tall.mT @ tall
    wide = rows.permute(2, 3, 0, 1).reshape(blocks, d, n * t)
    return wide @ wide.mT
