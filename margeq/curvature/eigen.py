"""Exact second moments of the gradients of single data in a fixed orthogonal basis.

    d_j = sum_(n,v) (u_j^T g_nv)^2,   U = U_B (x) U_A per block

They are the diagonal of the exact GGN in the basis ``U``. For any orthogonal ``U``, and precisions
that are constant in each weight tensor, the inequalities of Fischer and Hadamard give

    log det(I + H / delta) <= sum_j log(1 + d_j / delta),

so the evidence is never above that of the full GGN. Eigenvectors of Kronecker factors make it tight
(EKFAC); the identity gives the diagonal of the GGN.

Reference:
    George et al. 2018 (EKFAC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from margeq.comm import ALONE, Comm
from margeq.curvature.addition import require_same, require_same_kind
from margeq.curvature.capture import Use
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.io import Layout, stored
from margeq.curvature.kron import BlockKron
from margeq.curvature.per_datum import Call, CallReader, chunks, gradient
from margeq.errors import ConfigError, NonFiniteError
from margeq.linalg import accumulation_dtype, is_finite, psd_eigh

__all__ = ["BlockEigen", "EigenBases", "EigenSums", "eigen_bases"]

EigenBases = Mapping[str, tuple[Tensor, Tensor]]
"""Weight name -> orthogonal ``U_B [b, o, o]`` and ``U_A [b, i, i]``, eigenvectors in columns."""


@dataclass(frozen=True)
class BlockEigen:
    """``H_b = U diag(d_b) U^T`` with ``U = U_B[b] (x) U_A[b]``; ``d`` a plain sum over data.

    Attributes:
        moments: ``d [b, o, i]``.
        basis: ``U_B [b, o, o]`` and ``U_A [b, i, i]``; ``None`` for the identity.
        layout: order in which the parameter stores the axes o, b, i.
    """

    moments: Tensor
    basis: tuple[Tensor, Tensor] | None = None
    layout: Layout = "obi"

    def __add__(self, other: BlockEigen) -> BlockEigen:
        """Sums of two disjoint sets of data, at the same weights and in the same basis.

        Returns:
            The block of all data.

        Raises:
            ConfigError: for blocks of other shapes, another layout or another basis.
        """
        require_same_kind(self, other)
        if self.is_empty or other.is_empty:
            require_same("number of weights", self.numel, other.numel)
            return self if other.is_empty else other
        require_same("shape of moments", self.moments.shape, other.moments.shape)
        require_same("layout", self.layout, other.layout)
        if not _same_basis(self.basis, other.basis):
            raise ConfigError(
                "sums over data cannot be added: their bases differ; pass the same bases=... to "
                "both passes, from margeq.laplace.eigen_bases"
            )
        return replace(self, moments=self.moments + other.moments)

    def tensors(self) -> dict[str, Tensor]:
        """The sums over data, by name."""
        return {"moments": self.moments}

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has reached the weight; all moments are then zero, in any shape."""
        return not bool(self.moments.any())

    @property
    def numel(self) -> int:
        """Number of parameters that the block covers."""
        return self.moments.numel()

    def log_eigenvalues(self, name: str = "weight") -> tuple[Tensor, int]:
        """Logarithms ``[b, o, i]``, ``-inf`` for zero; sums of squares are never clamped.

        Args:
            name: what the block belongs to, for messages.

        Returns:
            Logarithms and 0.

        Raises:
            NonFiniteError: if a moment is NaN or infinite.
        """
        if not is_finite(self.moments):
            raise NonFiniteError(
                f"second moments of the gradients of {name!r} are not finite; lower the learning "
                f"rate or check the data"
            )
        return self.moments.log(), 0

    def to_dense(self) -> Tensor:
        """``[P, P]``, row-major in the parameter's own layout."""
        blocks, out, inner = self.moments.shape
        dense = self.moments.new_zeros(out, blocks, inner, out, blocks, inner)
        for b in range(blocks):
            block = torch.diag(self.moments[b].flatten())
            if self.basis is not None:
                grads = self.basis[0].expand(blocks, -1, -1)
                u = torch.kron(grads[b], self.basis[1][b]).to(block.dtype)
                block = u @ block @ u.mT
            dense[:, b, :, :, b, :] = block.reshape(out, inner, out, inner)
        return stored(dense, self.layout).reshape(self.numel, self.numel)


def _same_basis(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(map(torch.equal, one, other))


def eigen_bases(
    krons: Mapping[str, BlockKron], comm: Comm = ALONE
) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvectors of Kronecker factors, of any root and any share of the positions.

    Args:
        krons: weight name -> its factors, the same on all ranks.
        comm: ranks that all take the vectors of the first one: those of equal eigenvalues are not
            unique, and moments in different bases do not add up.

    Returns:
        Bases of all weights that the network uses; the others need none.

    Raises:
        NonFiniteError: if a factor is NaN or infinite.
        NotPSDError: if a decomposition fails for good.
    """
    bases = {}
    for name, kron in krons.items():
        if kron.n_shared > 0:
            _, grad_vectors, _ = psd_eigh(kron.grad_cov, name, kron.resolution)
            _, input_vectors, _ = psd_eigh(kron.input_cov, name, kron.resolution)
            # the order in memory, which decides about the rounding of products, is always the same
            bases[name] = grad_vectors.contiguous(), input_vectors.contiguous()
    vectors = iter(comm.broadcast([side for basis in bases.values() for side in basis], 0))
    return {name: (next(vectors), next(vectors)) for name in bases}


class EigenSums:
    """Second moments of all weights, as plain sums over the columns that are added.

    Args:
        weights: the weights to integrate out.
        bases: orthogonal bases; the identity for weights that have none.

    Raises:
        ConfigError: for a basis of an unknown weight, or one that is not orthogonal.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], bases: EigenBases) -> None:
        unknown = set(bases) - set(weights)
        if unknown:
            raise ConfigError(f"bases: no weight is called {sorted(unknown)}")
        self._weights = weights
        self._bases = {name: _orthogonal(name, basis) for name, basis in bases.items()}
        self._calls = CallReader(self._rotated_inputs)
        self._moments: dict[str, Tensor] = {}

    def add_inputs(self, uses: Sequence[Use], inputs: Any, keys: Tensor) -> None:
        """Nothing to add: second moments need gradients."""

    def add_gradients(self, uses: Sequence[Use], grads: Sequence[Tensor | None]) -> None:
        """Add the squared gradients, in the basis, of one column of the root.

        Args:
            uses: recorded calls.
            grads: the gradient of each call's output, ``None`` where it does not matter.
        """
        for name, calls in self._calls.read(uses, grads).items():
            squares = _squares([self._rotated(name, call) for call in calls])
            if name in self._moments:
                self._moments[name].add_(squares)
            else:
                self._moments[name] = squares.to(accumulation_dtype(squares.device), copy=True)

    def take_gradients(self) -> dict[str, Tensor]:
        """The moments so far, by weight; those to come are summed anew, in the same layout."""
        taken = self._moments
        self._moments = {name: torch.zeros_like(moments) for name, moments in taken.items()}
        return taken

    def forget_gradients(self) -> None:
        """Begin anew."""
        self._moments = {}

    def finish(self, checksum: int) -> BlockCurvature:
        """The second moments of every weight."""
        return BlockCurvature({name: self._block(name) for name in self._weights})

    def _block(self, name: str) -> BlockEigen:
        moments = self._moments.get(name)
        if moments is None:
            # a weight that the network does not use, e.g. of an off path, or no data
            weight, basis = self._weights[name], self._bases.get(name)
            shape = (weight.numel(), 1, 1)
            if basis is not None:
                shape = (len(basis[1]), basis[0].shape[-1], basis[1].shape[-1])
            dtype = accumulation_dtype(weight.device)
            return BlockEigen(torch.zeros(shape, dtype=dtype, device=weight.device), basis)
        return BlockEigen(moments, self._bases.get(name), self._calls.layouts[name])

    def _rotated_inputs(self, name: str, inputs: Tensor) -> Tensor:
        if name not in self._bases:
            return inputs
        return _rotated(name, inputs, self._bases[name][1])

    def _rotated(self, name: str, call: Call) -> Call:
        if name not in self._bases:
            return call
        return replace(call, grads=_rotated(name, call.grads, self._bases[name][0]))


def _rotated(name: str, rows: Tensor, basis: Tensor) -> Tensor:
    if basis.shape[:2] != rows.shape[2:]:
        raise ConfigError(
            f"the basis of {name!r} has {basis.shape[0]} blocks of size {basis.shape[1]}, its "
            f"weight has {rows.shape[2]} of size {rows.shape[3]}; build bases from this model"
        )
    return torch.einsum("ntbi,bij->ntbj", rows, basis.to(rows))


def _squares(calls: Sequence[Call]) -> Tensor:
    """``sum_n g[n,b,o,i]^2``, ``[b, o, i]``."""
    if len(calls) == 1 and not calls[0].is_shared:
        # an outer product per datum: its square is the outer product of the squares
        call = calls[0]
        inputs = call.inputs.to(call.grads.dtype)
        return torch.einsum("nbo,nbi->boi", call.grads[:, 0].square(), inputs[:, 0].square())
    total = 0.0
    for data in chunks(calls):
        total = total + gradient(calls, data).square().sum(0)
    return torch.as_tensor(total)


def _orthogonal(name: str, basis: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The basis, orthogonal to the last digit: only then is the evidence a bound."""
    first, second = (_one_side(name, vectors) for vectors in basis)
    return first, second


def _one_side(name: str, vectors: Tensor) -> Tensor:
    if vectors.ndim != 3 or vectors.shape[1] != vectors.shape[2]:
        raise ConfigError(
            f"the basis of {name!r} has shape {tuple(vectors.shape)}; expected [b, d, d]"
        )
    wide = vectors.to(accumulation_dtype(vectors.device))
    eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    error = float((wide.mT @ wide - eye).abs().amax())
    if not error < torch.finfo(vectors.dtype).eps ** 0.5:
        raise ConfigError(
            f"the basis of {name!r} is not orthogonal (U^T U differs from I by {error:.2g}); "
            f"only an orthogonal basis gives a bound"
        )
    # what a narrower dtype has rounded off
    return wide if error < 1e-12 else torch.linalg.qr(wide).Q
