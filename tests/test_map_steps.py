"""The MAP step's fixed point is the MAP, in the optimizer's own metric, for any precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from margeq.errors import ConfigError, NumericalWarning
from margeq.likelihoods import Categorical
from margeq.training.proximal import ProximalSteps, build_optimizer

# The stated small model: softmax regression, 30 data, 4 features, 3 classes, full batch.
N_DATA = 30
OPTIMIZERS = [
    pytest.param(Adam, {"lr": 0.1}, id="adam"),
    pytest.param(AdamW, {"lr": 0.1}, id="adamw"),
    pytest.param(Adam, {"lr": 0.2, "amsgrad": True}, id="amsgrad"),
    pytest.param(SGD, {"lr": 4.0}, id="sgd"),
    pytest.param(SGD, {"lr": 0.4, "momentum": 0.9}, id="momentum"),
    pytest.param(SGD, {"lr": 0.4, "momentum": 0.9, "nesterov": True}, id="nesterov"),
    pytest.param(SGD, {"lr": 0.8, "momentum": 0.9, "dampening": 0.5}, id="dampening"),
]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_DATA, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(N_DATA, 3, generator=generator, dtype=torch.float64)
    y = (x @ teacher + 0.5 * noise).argmax(1)
    return nn.Linear(4, 3).double(), x, y


def gradients(model, x, y):
    """Gradient of the summed log-likelihood, flat."""
    model.zero_grad()
    (-N_DATA * Categorical().loss(model(x), y)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def steps_of(model, optimizer_cls, options):
    optimizer = build_optimizer(optimizer_cls, list(model.parameters()), options)
    return ProximalSteps(optimizer, dict(model.named_parameters()), N_DATA)


def take_step(steps, model, x, y, precision):
    steps.optimizer.zero_grad()
    Categorical().loss(model(x), y).backward()
    steps.step(dict.fromkeys(("weight", "bias"), precision))


@pytest.mark.parametrize("precision", [1e-1, 1.0, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize(("optimizer_cls", "options"), OPTIMIZERS)
def test_fixed_point_is_the_map(problem, optimizer_cls, options, precision):
    model, x, y = problem
    steps = steps_of(model, optimizer_cls, options)
    n_steps = 3000 if precision < 1.0 else 800  # weak priors leave flat directions
    scheduler = CosineAnnealingLR(steps.optimizer, n_steps)
    for _ in range(n_steps):
        take_step(steps, model, x, y, precision)
        scheduler.step()
    likelihood = gradients(model, x, y)
    joint = likelihood - precision * flat(model)
    assert joint.norm() <= 1e-5 * likelihood.norm()


@pytest.mark.parametrize("precision", [1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize(("optimizer_cls", "options"), OPTIMIZERS)
def test_one_step_from_the_optimum_stays_there(problem, optimizer_cls, options, precision):
    model, x, y = problem
    nn.utils.vector_to_parameters(lbfgs_optimum(model, x, y, precision), model.parameters())
    optimum = flat(model)
    steps = steps_of(model, optimizer_cls, options)
    take_step(steps, model, x, y, precision)
    moved = (flat(model) - optimum).norm() / optimum.norm()
    assert moved <= 1e-5


def lbfgs_optimum(model, x, y, precision):
    """L-BFGS from zero, polished by Newton steps: the last digits matter here."""

    def negative_joint(values):
        logits = x @ values[:12].reshape(3, 4).T + values[12:]
        return N_DATA * Categorical().loss(logits, y) + 0.5 * precision * values @ values

    def with_gradient(values):
        point = torch.from_numpy(values)
        return float(negative_joint(point)), torch.func.grad(negative_joint)(point).numpy().copy()

    options = {"maxiter": 20000, "maxfun": 40000, "gtol": 1e-10}
    found = minimize(with_gradient, np.zeros(15), jac=True, method="L-BFGS-B", options=options)
    point = torch.from_numpy(found.x)
    for _ in range(10):
        gradient = torch.func.grad(negative_joint)(point)
        point = point - torch.linalg.solve(torch.func.hessian(negative_joint)(point), gradient)
    return point


def test_decoupled_decay_would_fail_this_test(problem):
    model, x, y = problem
    optimizer = Adam(model.parameters(), lr=0.05)
    scheduler = CosineAnnealingLR(optimizer, 1200)
    for _ in range(1200):
        optimizer.zero_grad()
        Categorical().loss(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 - optimizer.param_groups[0]["lr"] * 10.0 / N_DATA)
        optimizer.step()
        scheduler.step()
    likelihood = gradients(model, x, y)
    assert (likelihood - 10.0 * flat(model)).norm() > 0.1 * likelihood.norm()


def test_unknown_preconditioner_falls_back_to_explicit_l2_with_a_warning(problem):
    model, x, y = problem
    with pytest.warns(NumericalWarning, match="RMSprop"):
        steps = steps_of(model, torch.optim.RMSprop, {"lr": 0.01})
    scheduler = CosineAnnealingLR(steps.optimizer, 1500)
    for _ in range(1500):
        take_step(steps, model, x, y, 1.0)
        scheduler.step()
    likelihood = gradients(model, x, y)
    assert (likelihood - flat(model)).norm() < 1e-2 * likelihood.norm()


@pytest.mark.parametrize(
    ("optimizer_cls", "options", "message"),
    [
        (Adam, {"weight_decay": 0.1}, "weight_decay=0.1"),
        (SGD, {"lr": 0.1, "maximize": True}, "maximize"),
        (Adam, {"learning_rate": 0.1}, "does not take"),
        (torch.optim.LBFGS, {}, "closure"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(problem, optimizer_cls, options, message):
    model, _, _ = problem
    before = dict(options)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(optimizer_cls, list(model.parameters()), options)
    assert options == before


def test_default_weight_decay_of_adamw_is_taken_out(problem):
    model, _, _ = problem
    optimizer = build_optimizer(AdamW, list(model.parameters()), None)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
