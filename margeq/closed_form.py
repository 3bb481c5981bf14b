"""Lengthscale steps at fixed filters: as cheap as a step of a prior precision.

Where the basis of a sparsified layer is invertible, its weights can follow the lengthscale such
that the filters ``W = u Psi(l)``, and with them the function and its fit, stay as they are. With
``T = Psi(l') Psi(l)^-1`` the Kronecker factor on the basis' side and the weights become

    A(l') = T A(l) T^T,   u(l') = u(l) T^-1,

so that the evidence, and its gradient at ``T = I``, need no pass over the data:

    d log p(D) = < 2 G A + delta u^T u, dPsi Psi^-1 >,   G = d log p(D) / dA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from margeq.accumulation import CurvatureState
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.kron import BlockKron
from margeq.layers.basis import AnchorBasis
from margeq.likelihoods import Likelihood
from margeq.linalg import log1p_ratio
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior

__all__ = ["FixedFilters", "closed_form_gradient", "factor_cotangent", "fixed_filters", "moved"]

_LARGEST_CONDITION = 1e7


@dataclass(frozen=True)
class FixedFilters:
    """One weight whose filters can stay as they are while its lengthscale moves.

    Attributes:
        hyperparameter: name of the log lengthscale in the model.
        weight: name of the weight in the model.
        side: ``"input"`` or ``"output"``, where the basis stands.
        basis: with as many anchors as pixels.
        tensor: the weight.
    """

    hyperparameter: str
    weight: str
    side: str
    basis: AnchorBasis
    tensor: nn.Parameter

    @property
    def factor_name(self) -> str:
        """Which Kronecker factor the basis changes."""
        return "input_cov" if self.side == "input" else "grad_cov"

    def factor(self, kron: BlockKron) -> Tensor:
        """The Kronecker factor on the side of the basis."""
        return getattr(kron, self.factor_name)

    def by_filter(self) -> Tensor:
        """The weights ``[D, C, M]`` in the dtype that curvature is summed in."""
        u = self.tensor.detach() if self.side == "input" else self.tensor.detach().movedim(0, 2)
        return u.to(self._psi_now())

    def transfer(self, log_lengthscale: Tensor) -> Tensor:
        """``T = Psi(l') Psi(l)^-1``, ``[G, M, M]``."""
        return torch.linalg.solve(self._psi_now(), self.basis(log_lengthscale), left=False)

    def is_invertible_at(self, log_lengthscale: Tensor) -> bool:
        """Whether filters and weights determine each other, numerically too."""
        if self.basis.n_anchors != len(self.basis.pixels):
            return False
        psi = self.basis(log_lengthscale.detach())
        return bool((torch.linalg.cond(psi) < _LARGEST_CONDITION).all())

    def _psi_now(self) -> Tensor:
        assert self.basis.log_lengthscale is not None
        return self.basis(self.basis.log_lengthscale.detach())


def fixed_filters(
    model: nn.Module,
    hyperparameters: Mapping[str, Tensor],
    parameters: str | Sequence[str] = "all",
) -> list[FixedFilters]:
    """The weights whose lengthscale is among ``hyperparameters`` and whose basis is invertible.

    Args:
        model: any module tree.
        hyperparameters: by name.
        parameters: as in :func:`margeq.named_weights`; other weights have no curvature to move.

    Returns:
        One entry per weight; none for a weight or a lengthscale that several layers share, since
        the filters of all of them cannot be held at once.
    """
    names = {id(tensor): name for name, tensor in hyperparameters.items()}
    weights = named_weights(model, parameters)
    found: list[FixedFilters] = []
    for prefix, layer in model.named_modules():
        bases = layer.bases() if hasattr(layer, "bases") else {}  # pyright: ignore[reportCallIssue]
        for local, (side, basis) in bases.items():
            name = names.get(id(basis.log_lengthscale))
            weight = f"{prefix}.{local}" if prefix else local
            if name is not None:
                found.append(FixedFilters(name, weight, side, basis, getattr(layer, local)))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    users = Counter(candidate.hyperparameter for candidate in found)
    return [
        c
        for c in found
        if c.weight in weights
        and c.basis.log_lengthscale is not None
        and users[c.hyperparameter] == 1
        and owners[id(c.tensor)] == owners[id(c.basis.log_lengthscale)] == 1
        and c.is_invertible_at(c.basis.log_lengthscale)
    ]


def factor_cotangent(
    candidate: FixedFilters, kron: BlockKron, prior: GaussianPrior, likelihood: Likelihood
) -> Tensor:
    """Derivative of the evidence in the Kronecker factor on the side of the basis."""
    leaf = candidate.factor(kron).detach().requires_grad_(True)
    log_scale = likelihood.curvature_scale.log().to(leaf.device)
    with torch.enable_grad():
        logs, _ = replace(kron, **{candidate.factor_name: leaf}).log_eigenvalues(candidate.weight)
        log_precision = prior.log_precision_of(candidate.weight).detach()
        value = -0.5 * log1p_ratio(logs + log_scale, log_precision).sum()
        (cotangent,) = torch.autograd.grad(value, leaf)
    return cotangent


def closed_form_gradient(
    candidate: FixedFilters, kron: BlockKron, cotangent: Tensor, prior: GaussianPrior
) -> Tensor:
    """Gradient of the evidence in one log lengthscale while its filters stay as they are.

    Args:
        candidate: which weight.
        kron: its curvature.
        cotangent: from :func:`factor_cotangent`.
        prior: precisions.

    Returns:
        ``[G]``, in nats per log pixel.
    """
    precision = float(prior.log_precision_of(candidate.weight).exp())
    log_lengthscale = candidate.basis.log_lengthscale
    assert log_lengthscale is not None
    leaf = log_lengthscale.detach().double().requires_grad_(True)
    with torch.enable_grad():
        psi = candidate.basis(leaf)
        pull = 2.0 * _by_anchor(cotangent @ candidate.factor(kron), psi)
        u = candidate.by_filter()
        pull = pull + precision * _per_filter(torch.einsum("dcm,dck->dmk", u, u), len(psi))
        weight = torch.linalg.solve(psi.detach().mT, pull, left=False)
        value = (psi * weight).sum() + candidate.basis.log_hyperprior(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def moved(
    candidate: FixedFilters, state: CurvatureState, log_lengthscale: Tensor
) -> CurvatureState:
    """Move a lengthscale and its weights, in place, and the curvature sums with them.

    Returns:
        The sums at the new lengthscale; fit and function are as before.
    """
    transfer = candidate.transfer(log_lengthscale.detach().double())
    kron = state.kron[candidate.weight]
    blocks = len(candidate.factor(kron))
    factor = _sandwich(
        candidate.factor(kron), transfer.repeat_interleave(blocks // len(transfer), 0)
    )
    u = candidate.by_filter()
    u = u @ torch.linalg.inv(transfer).expand(len(u), -1, -1)
    logs = candidate.basis.log_lengthscale
    assert logs is not None
    penalty = float(candidate.basis.log_hyperprior().detach())
    with torch.no_grad():
        candidate.tensor.copy_(u if candidate.side == "input" else u.movedim(2, 0))
        logs.copy_(log_lengthscale)
    return replace(
        state,
        curvature=BlockCurvature(
            state.kron | {candidate.weight: replace(kron, **{candidate.factor_name: factor})}
        ),
        square_norms=state.square_norms | {candidate.weight: u.square().sum()},
        log_hyperprior=state.log_hyperprior
        + float(candidate.basis.log_hyperprior().detach())
        - penalty,
    )


def _by_anchor(product: Tensor, psi: Tensor) -> Tensor:
    """``[G, m, k]``: sum of ``[b, (q m), (q k)]`` over channels ``q`` and each filter's blocks."""
    blocks, size = product.shape[:2]
    anchors = psi.shape[1]
    split = product.reshape(blocks, size // anchors, anchors, size // anchors, anchors)
    return _per_filter(split.diagonal(dim1=1, dim2=3).sum(-1), len(psi))


def _per_filter(matrices: Tensor, n_filters: int) -> Tensor:
    """Sum ``[(g r), m, k]`` to one matrix per lengthscale, ``[G, m, k]``."""
    return matrices.reshape(n_filters, -1, *matrices.shape[1:]).sum(1)


def _sandwich(factor: Tensor, transfer: Tensor) -> Tensor:
    """``(I (x) T) A (I (x) T)^T`` in each block."""
    blocks, size = factor.shape[:2]
    anchors = transfer.shape[1]
    split = factor.reshape(blocks, size // anchors, anchors, size // anchors, anchors)
    product = torch.einsum("bmi,bqirj,bkj->bqmrk", transfer, split, transfer)
    return product.reshape(factor.shape)
