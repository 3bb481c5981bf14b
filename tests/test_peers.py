"""The oracles can be imported, and all three curvature back-ends run."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "AsdlGGN", "BackPackGGN"])
def test_laplace_torch_back_end_runs(laplace_torch, backend):
    curvature = importlib.import_module("laplace.curvature")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(10, 3), torch.randint(2, (10,)))
    posterior = laplace_torch.Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=getattr(curvature, backend),
    )
    posterior.fit(DataLoader(data, batch_size=5))
    assert torch.isfinite(posterior.log_marginal_likelihood())
