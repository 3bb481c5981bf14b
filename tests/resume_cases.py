"""Small trainings that use every part of the state, and one number for all that they end in."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from hashlib import sha256
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.checkpoint import Checkpoints
from margeq.data import TensorLoader, random_shift_flip
from margeq.groups import P4
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    GroupGate,
    GroupSampler,
    Lift,
    LiftingConv2d,
    MonteCarloLiftingConv2d,
    PlanarSubset,
    ResidualPathways,
    SamplePool,
    SparseConv2d,
)

ALWAYS = float("inf")


def pictures(n=40, channels=1, size=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, channels, size, size, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def shuffled(n=40, batch=16):
    """Their order comes from torch's global random state."""
    return DataLoader(TensorDataset(*pictures(n)), batch, shuffle=True)


def paths():
    """Three restarts, paths that are switched off and probed, norms held on them, dropout."""
    named = {
        "conv": nn.Conv2d(1, 3, 3, padding=1),
        "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4)),
    }
    model = nn.Sequential(
        ResidualPathways(named), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(48, 2),
    )  # fmt: skip
    options = {
        "restarts": ["symmetric", "free", "only:conv"],
        "optimizer_kwargs": {"lr": 0.01},
        "scheduler_cls": CosineAnnealingLR,
        "scheduler_kwargs": {"T_max": 60},
    }
    return model, shuffled(24, 12), options | {"n_epochs": 10, "n_epochs_burnin": 1}


class Scaled(nn.Module):
    """Multiplies by a tensor that is not its own."""

    def __init__(self, log_scale):
        super().__init__()
        self.outside = [log_scale]

    def forward(self, x):
        return x * self.outside[0].exp()


def lengthscales():
    """Hyperparameters inside the network: in closed form, and by the sketch from outside.

    Their initial values decide the function scale of both restarts.
    """
    log_scale = 0.1 * torch.randn(())
    lengthscale = 0.8 + 0.4 * float(torch.rand(()))
    model = nn.Sequential(
        SparseConv2d(1, 3, 5, padding=2, lengthscale=lengthscale), Scaled(log_scale),
        nn.Tanh(), nn.Flatten(), nn.Linear(48, 2),
    )  # fmt: skip
    options = {"hyperparameters": [log_scale], "lr_hyp": 0.05, "restarts": ["current"] * 2}
    return model, shuffled(), options


def noise():
    """Regression, momentum, Adam on the hyperparameters, tied factors, a generator."""
    x, _ = pictures()
    targets = x.mean((2, 3)) + 0.1 * torch.randn(len(x), 1, generator=torch.Generator())
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, targets), 16, shuffle=True, generator=generator)
    model = nn.Sequential(FactoredLinear2d(1, 2, (4, 4), (2, 2)), nn.Flatten(), nn.Linear(8, 1))
    return model, loader, {
        "likelihood": "regression",
        "prior": "tied",
        "hyper_solver": "adam",
        "n_hypersteps": 3,
        "optimizer_cls": SGD,
        "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        "scheduler_cls": LambdaLR,
        "scheduler_kwargs": {"lr_lambda": lambda step: 1.0 / (1.0 + 0.01 * step)},
    }  # fmt: skip


def groups():
    """Held norms, buffers, and input factors with a symmetry, summed in a random order."""
    model = nn.Sequential(
        LiftingConv2d(1, 2, 3, group=P4, padding=1), nn.Tanh(),
        GroupConv2d(2, 2, 3, group=P4, padding=1), nn.Flatten(1, 2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip
    return model, shuffled(24, 8), {"n_epochs": 5}


def augmented():
    """Our own loader, its augmentation, and the dense curvature."""
    x, y = pictures()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    train = TensorLoader(x, y, 16, shuffle=True, augment=partial(random_shift_flip, max_shift=1))
    evidence = TensorLoader(x, y, 16, shuffle=True, seed=7)
    return model, train, {"marglik_loader": evidence, "curvature": "full", "hyper_solver": "lbfgs"}


def samples():
    """Gates from both ends, and elements of a group that every batch draws anew."""
    first = GroupSampler(PlanarSubset(True, False, width=0.7), 4)
    model = nn.Sequential(
        MonteCarloLiftingConv2d(1, 2, 3, outputs=first, padding=1, hidden=3), nn.Tanh(),
        SamplePool(first, "mean"), Lift(P4), GroupGate(P4, 0.6), nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip
    return model, shuffled(24, 8), {"n_epochs": 4, "restarts": ["current", "current@whole"]}


CASES = {case.__name__: case for case in (paths, lengthscales, noise, groups, augmented, samples)}


def train(case, directory=None, *, built=0, callbacks=(), overhead=ALWAYS, gap=600.0, **overrides):
    """One call of a case, whose model is built from a seed."""
    torch.manual_seed(built)
    model, loader, options = CASES[case]()
    where = None
    if directory is not None:
        where = Checkpoints(directory, max_overhead=overhead, longest_gap=gap)
    given = {
        "n_epochs": 8, "n_epochs_burnin": 2, "marglik_frequency": 1, "seed": 0,
        "progress": "none", "checkpoint_dir": where, "callbacks": callbacks,
        **options, **overrides,
    }  # fmt: skip
    with warnings.catch_warnings(), patch("margeq.training.switching.NEGLIGIBLE_SHARE", 0.4):
        warnings.simplefilter("ignore", margeq.errors.ConvergenceWarning)
        return margeq.optimize_marglik(model, loader, **given)


def digest(result) -> str:
    """SHA-256 of weights, precisions, noise, hyperparameters and histories, without times."""
    plain = result.to_dict()
    for restart in plain["restarts"]:
        for update in restart["history"]["updates"]:
            del update["seconds"]
    found = sha256(json.dumps(plain).encode())
    tensors = {**result.model.state_dict(), **result.prior.log_prior_precision}
    for name, value in {**tensors, **result.hyperparameters}.items():
        found.update(name.encode() + value.detach().double().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(digest(train(sys.argv[1], sys.argv[2], built=int(sys.argv[3]))))
