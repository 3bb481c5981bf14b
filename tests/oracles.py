"""Shared by the tests of the curvature core: small nets in float64 and their dense curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from margeq.curvature import exact
from margeq.laplace import CurvatureState, accumulate
from margeq.likelihoods import Categorical, Gaussian, Likelihood
from margeq.parameters import named_weights
from margeq.testing import block_mask

F64 = torch.float64


class Lambda(nn.Module):
    """A function as a module, for ``nn.Sequential``."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class MeanPool(nn.Module):
    """``[n, c, ...] -> [n, c]``."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def net(*modules: nn.Module) -> nn.Sequential:
    """The modules in float64 with random biases, so that no bias sits at its initial zero."""
    model = nn.Sequential(*modules).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.3)
    return model


def data_for(model: nn.Module, likelihood: Likelihood, *shape: int) -> tuple[Tensor, Tensor]:
    """Random inputs of ``shape`` and targets that fit the model's outputs."""
    x = torch.randn(shape, dtype=F64)
    outputs = model(x).detach()
    if isinstance(likelihood, Gaussian):
        return x, outputs + torch.randn_like(outputs)
    assert isinstance(likelihood, Categorical)
    return x, torch.randint(outputs.shape[1], (len(x),))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Difference over size, both in Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


def dense_blocks(model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: Likelihood):
    """Weight name -> its diagonal block of the dense GGN."""
    matrix = exact.ggn(model, [batch], likelihood)
    sizes = [weight.numel() for weight in named_weights(model).values()]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    names = named_weights(model)
    return {n: matrix[a:b, a:b] for n, a, b in zip(names, starts, ends, strict=True)}


def errors(
    model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: Likelihood, **options: object
) -> dict[str, float]:
    """Weight name -> relative error of its Kronecker curvature on its own blocks."""
    krons = accumulate(model, [batch], likelihood, **options).kron
    dense = dense_blocks(model, batch, likelihood)
    return {
        name: relative_error(kron.to_dense(), block_mask(kron) * dense[name])
        for name, kron in krons.items()
    }


def worst_difference(one: CurvatureState, other: CurvatureState) -> float:
    """Largest relative difference between the factors and fit terms of two states."""
    pairs = [(one.fit, other.fit)]
    for name, kron in one.kron.items():
        pairs.append((kron.grad_cov, other.kron[name].grad_cov))
        pairs.append((kron.input_cov, other.kron[name].input_cov))
        pairs.append((kron.n_shared, other.kron[name].n_shared))
    return max(relative_error(a, b) for a, b in pairs)
