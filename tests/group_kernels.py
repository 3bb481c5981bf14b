"""Linear maps between feature maps on a group, and the exact evidence of a sum of such paths.

Maps have one channel, ``[n, h, y, x]``, and live on a torus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from torch import nn

from margeq.groups.action import act
from margeq.groups.planar import stencil
from tests.oracles import F64

SIZE = 3  # of the filters


@dataclass(frozen=True)
class Tying:
    """Which weights of a convolution are the same number if it commutes with a subgroup K.

        w[k h, k g, k t] = w[h, g, t]  for all k in K

    All filters follow from those of one representative r of each coset:
    ``w[k r, g, t] = v[r, k^-1 g, k^-1 t]``.
    """

    coset: torch.Tensor  # [h]
    source: torch.Tensor  # [h, (g, t)]: which weight of the representative

    @classmethod
    def of(cls, group, subgroup):
        cosets = group.cosets(subgroup)
        coset, leader = torch.empty(2, group.order, dtype=torch.long)
        coset[cosets] = torch.arange(len(cosets))[:, None]
        leader[cosets] = torch.tensor(group.elements_of(subgroup))
        pixels = stencil(group, SIZE, SIZE)
        source = group.relative[:, :, None] * pixels.shape[1] + pixels[:, None, :]
        return cls(coset, source[leader].flatten(1))

    @property
    def shape(self):
        """Of the free weights: cosets x (g, t)."""
        return int(self.coset.max()) + 1, self.source.shape[1]

    def filters(self, weights):
        """``[h, g, 3, 3]`` from the free weights."""
        return weights[self.coset].gather(1, self.source).unflatten(1, (-1, SIZE, SIZE))

    def design(self, maps):
        """``d convolve / d free weights`` ``[(n, h, x), (coset, g, t)]``."""
        patches = nn.functional.unfold(_wrap(maps), SIZE)  # [n, (g, t), x]
        aligned = patches[:, self.source.argsort(1)]  # [n, h, (g, t), x]
        one_hot = nn.functional.one_hot(self.coset).to(maps)
        rows = torch.einsum("hc,nhix->nhxci", one_hot, aligned)
        return rows.flatten(3).flatten(0, 2) / math.sqrt(self.shape[1])


def convolve(maps, filters):
    """Cross-correlation on the torus, over sqrt(fan-in)."""
    return nn.functional.conv2d(_wrap(maps), filters) / math.sqrt(filters[0].numel())


def connect(maps, weights):
    """Any linear map of an image's features, over sqrt(fan-in)."""
    return (maps.flatten(1) @ weights.mT / math.sqrt(len(weights))).view_as(maps)


def _wrap(maps):
    return nn.functional.pad(maps, (SIZE // 2,) * 4, mode="circular")


def moved(group, element, maps):
    """``(L_u f)(g, x) = f(u^-1 g, u^-1 x)``."""
    return act(maps[:, None], group, element, "map")[:, 0]


def kernels(group, subgroups, maps):
    """Name -> covariance of all outputs for weights of variance 1; ``FC`` and each subgroup."""
    inputs = maps.flatten(1)
    gram = inputs @ inputs.mT / inputs.shape[1]
    designs = {name: Tying.of(group, k).design(maps) for name, k in subgroups.items()}
    dense = torch.kron(gram, torch.eye(inputs.shape[1], dtype=F64))
    return {"FC": dense, **{name: design @ design.mT for name, design in designs.items()}}


class Evidence:
    """``log N(y | 0, sum_p a_p K_p + s I)`` as a function of the log variances ``(a_1 .. s)``."""

    def __init__(self, kernels, outputs):
        self.outputs = outputs.flatten()
        self.kernels = torch.stack([*kernels, torch.eye(len(self.outputs), dtype=F64)])

    def __call__(self, log_variances):
        """The log evidence, its gradient, and the effective parameters of each path.

        ``gamma_p = P_p - tr(S_pp) / a_p = a_p tr(K_p K^-1)``, S the posterior covariance.
        """
        variances, flat = log_variances.exp(), self.kernels.flatten(1)
        root = torch.linalg.cholesky((variances @ flat).view_as(self.kernels[0]))
        inverse = torch.cholesky_inverse(root)
        weighted = inverse @ self.outputs
        gamma = variances * (flat @ inverse.flatten())
        fit = variances * (flat @ torch.outer(weighted, weighted).flatten())
        log_det = 2.0 * root.diagonal().log().sum() + len(root) * math.log(2.0 * math.pi)
        return -0.5 * (self.outputs @ weighted + log_det), 0.5 * (fit - gamma), gamma[:-1]

    def maximum(self):
        """Log variances, from a start that shares the outputs' variance out evenly."""
        n_terms = len(self.kernels)
        start = (self.outputs.var() / n_terms).log().expand(n_terms)

        def loss(x):
            value, gradient, _ = self(torch.from_numpy(x))
            return -value.item(), -gradient.numpy()

        bounds = [(-12.0, 4.0)] * n_terms
        found = minimize(loss, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
        return torch.from_numpy(found.x)
