"""``optimize_marglik`` with hyperparameters inside the network: the evidence alone moves them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import margeq
from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit
from margeq.curvature import LinearIO, register_kfac_rule
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.layers import ResidualPathways, SparseFactoredLinear2d
from margeq.training.proximal import build_optimizer
from tests.network_problems import conv, fit, images, loader, network, smooth_net
from tests.oracles import F64, Lambda, net

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

METHODS = ["exact", "sketched", "closed-form", "auto"]

# --- the training loss never moves them


@pytest.mark.parametrize("method", METHODS)
def test_the_training_loss_never_reaches_a_hyperparameter(method, monkeypatch):
    model, seen, groups = smooth_net(), [], []
    logs = model[0].basis.log_lengthscale

    def look(module, args, output):
        if module.training and output.requires_grad:  # not the looks at scales before training
            seen.append((logs.requires_grad, logs.grad))

    def build(cls, params, options):
        groups.extend(params)
        return build_optimizer(cls, params, options)

    model[0].register_forward_hook(look)
    monkeypatch.setattr("margeq.training.run.build_optimizer", build)
    before = logs.detach().clone()
    fit(model, network_gradient=method)
    assert len(seen) == 24
    assert all(entry == (False, None) for entry in seen)
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()} - {id(logs)}
    assert not torch.equal(logs, before)
    assert logs.requires_grad
    assert logs.grad is None


@pytest.mark.parametrize("kwargs", [{"hyper_solver": "fixed"}, {"n_epochs": 2}])
def test_without_evidence_steps_it_stays_bit_equal(kwargs):
    model = smooth_net()
    before = copy.deepcopy(model.state_dict())
    result = fit(model, **kwargs)
    assert torch.equal(model[0].basis.log_lengthscale, before["0.basis.log_lengthscale"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(
        result.hyperparameters["0.basis.log_lengthscale"], before["0.basis.log_lengthscale"]
    )


@pytest.mark.parametrize("method", [*METHODS, Revisit(sketched=True, share=0.4)])
def test_the_evidence_moves_it_where_the_data_are_smooth(method):
    longer = {"n_epochs": 40, "n_hypersteps": 5}
    fixed = smooth_net()
    fixed[0].basis.log_lengthscale.requires_grad_(False)
    start = fit(fixed, **longer).log_marginal_likelihood
    model = smooth_net()
    result = fit(model, network_gradient=method, **longer)
    assert model[0].lengthscale.item() > 0.6
    assert result.log_marginal_likelihood > start
    path = [u.hyperparameters["0.basis.log_lengthscale"][0] for u in result.history.updates]
    assert path[0] == pytest.approx(math.log(0.5))
    assert len(path) == len(result.history.updates)
    assert len(set(path)) == len(path)


# --- what is kept, recorded, and put back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"per_filter": True}], ids=["shared", "per-filter"])
def test_state_hyperparameters_and_evidence_of_the_best_update_agree(method, options):
    model = smooth_net(**options)
    result = fit(
        model, network_gradient=method, lr_hyp=0.8, hessian_root="exact",
        optimizer_kwargs={"lr": 0.1},
    )  # fmt: skip
    assert_reproduced(result)
    kept = result.hyperparameters["0.basis.log_lengthscale"]
    assert torch.equal(kept, model[0].basis.log_lengthscale)
    best = max(result.history.updates, key=lambda u: u.log_marginal_likelihood)
    assert best.hyperparameters == {"0.basis.log_lengthscale": kept.tolist()}


def assert_reproduced(result, batches=None):
    state = accumulate_with(result.model, batches or loader(), result.likelihood, KfacOptions())
    value = float(margeq.log_marginal_likelihood(state, result.prior, result.likelihood))
    assert value == pytest.approx(result.log_marginal_likelihood, rel=1e-8)


def test_the_best_update_is_kept_although_a_later_one_is_worse():
    model, updates = smooth_net(), []
    logs, eta = model[0].basis.log_lengthscale, torch.tensor([0.1], dtype=F64)
    model.insert(1, Lambda(lambda x: x * eta.exp()))

    def ruin(event):
        if event.kind == "update":
            updates.append((logs.detach().clone(), eta.detach().clone()))
            if len(updates) == 3:
                for tensor in (logs, eta, model[0].weight):
                    tensor.data.add_(3.0)

    result = fit(
        model, network_gradient="exact", hessian_root="exact", callbacks=[ruin],
        hyperparameters=[eta],
    )  # fmt: skip
    assert result.history.updates[-1].log_marginal_likelihood < result.log_marginal_likelihood
    assert (logs, eta) == updates[2] != updates[3]
    assert torch.equal(result.hyperparameters["hyperparameters[0]"], eta)
    assert_reproduced(result)


class Amplified(nn.Linear):
    """Reads the data times a tensor that belongs to no module."""

    gain = torch.tensor(0.0, dtype=F64)

    def forward(self, x):
        return super().forward(x * self.gain.exp())


@register_kfac_rule(Amplified)
def _amplified(layer, x, grad_y):
    inputs, grads = (x * layer.gain.exp())[:, None, None], grad_y[:, :, None, None]
    return {
        "weight": LinearIO(inputs, grads),
        "bias": LinearIO(torch.ones_like(inputs[..., :1]), grads, is_bias=True),
    }


def test_tensors_of_the_user_inside_a_rule_are_not_hidden_by_the_cache():
    model = net(nn.Sequential(Amplified(4, 6), nn.Tanh(), nn.Linear(6, 4)))[0]
    x = torch.randn(60, 4, dtype=F64)
    batches = [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())]
    Amplified.gain = torch.tensor(0.0, dtype=F64)
    options = {"hyperparameters": [Amplified.gain], "network_gradient": "exact"}
    result = fit(model, batches, **options, hessian_root="exact")
    assert abs(float(Amplified.gain)) > 0.05
    assert_reproduced(result, batches)


def test_every_restart_begins_from_the_original_value():
    outside = torch.tensor(0.2, dtype=F64)
    model = network(
        ResidualPathways(
            {
                "conv": conv(anchors="grid"),
                "fc": SparseFactoredLinear2d(2, 3, (6, 6), (6, 6), anchors="grid"),
            }
        ),
        Lambda(lambda x: torch.tanh(x * outside.exp())),
    )
    x = torch.randn(40, 2, 6, 6, dtype=F64)
    batches = [(x, images(40)[1])]
    result = fit(model, batches, hyperparameters=[outside], n_epochs=10)
    assert len(result.restarts) == 4
    names = set(result.hyperparameters)
    assert "hyperparameters[0]" in names
    for restart in result.restarts:
        assert restart.error == ""
        first, last = restart.history.updates[0], restart.history.updates[-1]
        assert first.hyperparameters.keys() == names
        assert first.hyperparameters == result.restarts[0].history.updates[0].hyperparameters
        assert first.hyperparameters["hyperparameters[0]"] == [0.2]
        assert last.hyperparameters["hyperparameters[0]"] != [0.2]
    assert float(outside) == float(result.hyperparameters["hyperparameters[0]"])
    assert not outside.requires_grad
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_switched_path_and_its_lengthscale_survive(monkeypatch):
    """Off after the first update, on again after the second; the steps see the present paths."""
    decisions = iter([([("0", "fc")], []), ([], [("0", "fc")]), ([], []), ([], []), ([], [])])
    monkeypatch.setattr("margeq.training.switching.PathSwitch.decide", lambda *_: next(decisions))
    torch.manual_seed(0)
    paths = {
        "conv": conv(anchors="grid"),
        "fc": SparseFactoredLinear2d(2, 3, (6, 6), (6, 6)),
    }
    model = network(ResidualPathways(paths), nn.Tanh())
    batches = [(torch.randn(40, 2, 6, 6, dtype=F64), images(40)[1])]
    result = fit(model, batches, restarts="free", n_epochs=10, network_gradient="exact")
    assert [s["to"] for s in result.history.switches] == ["off", "probe"]


@pytest.mark.parametrize("stage", ["start", "update", "end"])
def test_after_a_failure_everything_is_as_before(stage):
    eta = torch.tensor([0.1, -0.1], dtype=F64, requires_grad=True)
    eta.grad = torch.ones_like(eta)
    model = smooth_net(learn_anchors=True)
    model.insert(1, Lambda(lambda x: x * eta.sum().exp()))
    model[0].basis.log_lengthscale.grad = torch.full((1,), 2.0, dtype=F64)
    model.train()
    model[2].eval()
    before, old = copy.deepcopy(model.state_dict()), eta.detach().clone()
    updates = []

    def stop(event):
        updates.append(event.kind)
        if event.kind == stage and (stage != "update" or updates.count("update") == 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, hyperparameters=[eta], callbacks=[stop])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(eta, old)
    assert eta.requires_grad
    assert torch.equal(eta.grad, torch.ones_like(eta))
    assert model[0].basis.log_lengthscale.grad.item() == 2.0
    assert model[0].basis.log_lengthscale.requires_grad
    assert [m.training for m in model][:4] == [True, True, False, True]


def test_single_precision_and_json():
    x, y = images(dtype=torch.float32)
    for method in METHODS:
        model = smooth_net(per_filter=True).float()
        result = fit(model, [(x, y)], network_gradient=method)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain["hyperparameters"]["0.basis.log_lengthscale"] == pytest.approx(
            model[0].basis.log_lengthscale.tolist()
        )


class Iterable(IterableDataset):
    def __iter__(self):
        return iter(zip(*images(30), strict=True))


@pytest.mark.parametrize("kind", ["one-batch", "shuffled", "without-length"])
def test_the_sketch_takes_any_loader(kind):
    """Of fewer than ten batches it visits one in each update."""
    batches = {
        "one-batch": loader(30, 30),
        "shuffled": DataLoader(TensorDataset(*images(30)), 10, shuffle=True),
        "without-length": DataLoader(Iterable(), 10),
    }[kind]
    result = fit(smooth_net(), batches, network_gradient="sketched")
    path = [u.hyperparameters["0.basis.log_lengthscale"][0] for u in result.history.updates]
    assert len(set(path)) == len(path)


def test_a_parameter_of_the_user_is_no_weight_meanwhile_and_has_to_be_frozen_afterwards():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.zeros(1, dtype=F64))

        def forward(self, x):
            return x * self.parameter.exp()

    model = smooth_net()
    model.insert(1, Gain())
    result = fit(
        model, hyperparameters=[model[1].parameter], network_gradient="exact", hessian_root="exact"
    )
    assert set(result.hyperparameters) == {"0.basis.log_lengthscale", "1.parameter"}
    assert model[1].parameter.requires_grad
    assert "1.parameter" not in {row.name for row in result.effective_dimension().tensors}
    with pytest.raises(ConfigError, match=r"different weights: \['1\.parameter'\]"):
        assert_reproduced(result)
    model[1].parameter.requires_grad_(False)
    assert_reproduced(result)
