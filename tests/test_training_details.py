"""Details of training that a wrong line could change without any other test noticing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

import margeq
from margeq.effective_dim import _verdict
from margeq.layers import FactoredLinear2d, ResidualPathways
from margeq.parameters import named_weights
from margeq.training.function_scale import function_scale
from margeq.training.proximal import ProximalSteps
from margeq.training.starts import draw_path

FAST = {"n_epochs_burnin": 1, "marglik_frequency": 1, "seed": 0, "progress": "none"}

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def data(n=60):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def test_the_best_update_is_kept_although_the_evidence_falls_later():
    model, states = mlp(), []

    def record(event):
        if event.kind == "update":
            states.append({k: v.clone() for k, v in model.state_dict().items()})

    result = margeq.optimize_marglik(
        model,
        [data()],
        n_epochs=30,
        optimizer_kwargs={"lr": 0.02},
        scheduler_cls=LambdaLR,
        scheduler_kwargs={"lr_lambda": lambda step: 100.0 if step >= 25 else 1.0},
        callbacks=[record],
        **FAST,
    )
    values = [u.log_marginal_likelihood for u in result.history.updates]
    best = max(range(30), key=values.__getitem__)
    assert values[-1] < values[best] - 1.0
    assert result.log_marginal_likelihood >= values[best]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in states[best].items())


@pytest.mark.parametrize(
    ("by_share", "verdicts"),
    [
        ({"a": 0.95, "b": 0.05}, ["mixed", "mixed"]),
        ({"a": 0.995, "b": 0.005}, ["selected", "off"]),
        ({"a": 0.99, "b": 0.01}, ["mixed", "mixed"]),
        ({"a": 0.985, "b": 0.01, "c": 0.005}, ["mixed", "mixed", "off"]),
        ({"a": 0.9, **{f"b{n}": 0.1 / 11 for n in range(11)}}, ["selected"] + ["off"] * 11),
        ({"a": 0.89, **{f"b{n}": 0.11 / 12 for n in range(12)}}, ["mixed"] + ["off"] * 12),
    ],
)
def test_a_path_is_selected_only_if_every_other_one_is_off(by_share, verdicts):
    assert [_verdict(path, [], by_share) for path in by_share] == verdicts


def two_paths(channels=2, size=4):
    paths = {
        "conv": nn.Conv2d(channels, 16, 3, padding=1),
        "fc": FactoredLinear2d(channels, 16, (size, size), (size, size)),
    }
    return nn.Sequential(
        ResidualPathways(paths), nn.ReLU(), nn.Flatten(), nn.Linear(16 * size**2, 2)
    )


def test_a_probe_has_a_hundredth_of_the_function_variance():
    """At least 4,096 draws per tensor: each variance within 10 % of its expectation."""
    model = two_paths(channels=16, size=16)
    weights, prior = named_weights(model), margeq.GaussianPrior(model)
    scale = function_scale(model, weights, torch.randn(2, 16, 16, 16))
    names = [name for name in weights if name.startswith("0.paths.fc.")]
    outputs = scale.path_outputs["0"]["fc"]
    assert set(outputs) < set(names)
    draw_path(weights, names, prior, scale, outputs, seed=0)
    for name in names:
        expected = scale.precision[name] * (100.0 if name in outputs else 1.0)
        assert float(prior.log_precision_of(name).exp()) == pytest.approx(expected)
        if not scale.is_bias[name]:
            assert weights[name].numel() >= 4096
            assert 1 / float(weights[name].detach().var()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("optimizer_cls", "options"), [(SGD, {"momentum": 0.9}), (Adam, {})])
def test_forgotten_weights_start_anew_and_others_go_on(optimizer_cls, options):
    def take_step(steps, weights):
        steps.optimizer.zero_grad()
        sum((weight - 1.0).square().sum() for weight in weights.values()).backward()
        steps.step(dict.fromkeys(weights, 2.0))

    def built(weights):
        return ProximalSteps(optimizer_cls(weights.values(), lr=0.1, **options), weights, 5)

    weights = {name: nn.Parameter(torch.zeros(2)) for name in ("kept", "anew")}
    steps = built(weights)
    for _ in range(3):
        take_step(steps, weights)
    steps.forget({"anew"})
    assert set(steps.optimizer.state) == {weights["kept"]}
    with torch.no_grad():
        weights["anew"].zero_()
    twin = {"anew": nn.Parameter(torch.zeros(2))}
    fresh = built(twin)
    for _ in range(2):
        take_step(steps, weights)
        take_step(fresh, twin)
    assert torch.equal(weights["anew"], twin["anew"])
    assert not torch.equal(weights["kept"], twin["anew"])


def test_a_probed_path_brings_no_optimizer_state_along(monkeypatch):
    class OffThenProbe:
        def __init__(self, n_updates):
            self.time = 0

        def decide(self, by_share, active):
            self.time += 1
            key = [("0", "fc")]
            return (key if self.time == 1 else []), (key if self.time == 2 else [])

    monkeypatch.setattr("margeq.training.run.PathSwitch", OffThenProbe)
    model, optimizers, known = two_paths(), [], {}

    def scheduler(optimizer):
        optimizers.append(optimizer)
        return LambdaLR(optimizer, lambda step: 1.0)

    def record(event):
        if event.kind == "switch":
            state = optimizers[0].state
            names = {name for name, p in model.named_parameters() if p in state}
            known[event.data["to"]] = names

    margeq.optimize_marglik(
        model,
        [(torch.randn(20, 2, 4, 4), torch.arange(20) % 2)],
        n_epochs=3,
        scheduler_cls=scheduler,
        callbacks=[record],
        restarts="free",
        **FAST,
    )
    everything = {name for name, _ in model.named_parameters()}
    assert known["off"] == everything
    assert known["probe"] == {name for name in everything if ".fc." not in name}


class Recorded(Dataset):
    """Writes down in which order it is read."""

    def __init__(self):
        self.x, self.y = data()
        self.order = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.order:
            self.order[-1].append(index)
        return self.x[index], self.y[index]


def test_every_restart_reads_the_data_in_the_same_order():
    dataset = Recorded()

    def record(event):
        if event.kind == "start":
            dataset.order.append([])

    margeq.optimize_marglik(
        mlp(),
        DataLoader(dataset, 20, shuffle=True, generator=torch.Generator().manual_seed(3)),
        marglik_loader=[data()],
        n_epochs=3,
        restarts=["symmetric", "free", "current"],
        callbacks=[record],
        **FAST,
    )
    first, second, third = dataset.order
    assert first == second == third
    assert len(first) == 180
    assert first[:60] != first[60:120]


def test_gradients_of_the_caller_are_put_back_after_a_failure():
    model = mlp()
    for parameter in model[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def fail(event):
        if event.kind == "epoch":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        margeq.optimize_marglik(model, [data()], n_epochs=2, callbacks=[fail], **FAST)
    after = [p.grad for p in model.parameters()]
    assert after[2:] == before[2:] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True))
