"""Data made with a symmetry, and networks that choose between five of them by evidence.

Maps on p4m over a torus go through one random layer of the true kind, a rectifier and a fixed sum
of channels; noise of standard deviation 0.1 is added. The candidates are nested,
``d4 < c4 < c2 < z2 < fc``, so every start that contains the truth can fit: the evidence has to
prefer the smallest that can.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import margeq
from margeq.curvature.options import KfacOptions
from margeq.errors import ConvergenceWarning
from margeq.groups import P2, P4, P4M, Z2
from margeq.layers import GroupConv2d, Linear2d, ResidualPathways, SubgroupConv2d

SUBGROUPS = {"d4": P4M, "c4": P4, "c2": P2, "z2": Z2}
PATHS = (*SUBGROUPS, "fc")
SIZE, CHANNELS = 3, 2


def path(name: str) -> nn.Module:
    if name == "fc":
        shape = (P4M.order, SIZE, SIZE)
        return Linear2d(1, CHANNELS, shape, shape, bias=False)
    return SubgroupConv2d(
        1, CHANNELS, 3, group=P4M, subgroup=SUBGROUPS[name], padding=1, padding_mode="circular",
        bias=False,
    )  # fmt: skip


def network() -> nn.Module:
    choice = ResidualPathways({name: path(name) for name in PATHS}, "sum")
    read_out = GroupConv2d(CHANNELS, 1, 1, group=P4M, separability="pointwise")
    return nn.Sequential(choice, nn.ReLU(), read_out, nn.Flatten())


def data(truth: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100)
    x = torch.randn(n, 1, P4M.order, SIZE, SIZE, generator=generator)
    teacher = path(truth)
    for weight in teacher.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        hidden = teacher(x)
        signs = torch.tensor([1.0, -1.0])
        y = torch.einsum("o,nogyx->ngyx", signs, (hidden / hidden.std()).relu()).flatten(1)
    return x, y / y.std() + 0.1 * torch.randn(y.shape, generator=generator)


def learned(truth: str, n: int, restarts: list[str]) -> margeq.MargLikResult:
    x, y = data(truth, n)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return margeq.optimize_marglik(
            network(),
            batches,
            likelihood="regression",
            n_epochs=40,
            n_epochs_burnin=4,
            marglik_frequency=2,
            optimizer_kwargs={"lr": 0.02},
            scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
            scheduler_kwargs={"T_max": 40 * len(batches)},
            sigma_noise_init=0.5,
            curvature=KfacOptions("mc", mc_samples=2),
            restarts=restarts,
            seed=0,
            progress="none",
        )


def test_the_true_group_is_recognised_beside_its_neighbours():
    result = learned("c4", 96, ["only:d4", "only:c4", "only:c2"])
    assert result.selected == {"0": "c4"}


@pytest.mark.slow
@pytest.mark.parametrize("truth", PATHS)
def test_every_symmetry_is_recognised(truth):
    result = learned(truth, 192, ["symmetric", *(f"only:{name}" for name in PATHS)])
    assert result.selected == {"0": truth}
    assert result.effective_dimension().of("0", truth).function_share > 0.9
