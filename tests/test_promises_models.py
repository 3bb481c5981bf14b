"""Models: the curvature of whatever users build is that of its Jacobians, or its name is said."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import margeq
from margeq.errors import ConfigError, MissingRuleError
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net
from tests.ranks import on_ranks
from tests.snapshots import unchanged

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


# -- M1–M8: against Jacobians ----------------------------------------------------------------------


def frozen():
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    return model, (4,)


def partly_frozen():
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, (4,)


def shared():
    same = nn.Linear(4, 4)
    return net(same, nn.Tanh(), same, nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), (4,)


def shared_convolution():
    same = nn.Conv2d(2, 2, 3, padding=1)
    return net(same, nn.Tanh(), same, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4)


def tied():
    model = net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model, (4,)


def batch_norm():
    model = net(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
        nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    for _ in range(5):  # statistics of its own
        model(1.0 + 2.0 * torch.randn(16, 2, 4, 4, dtype=F64))
    return model, (2, 4, 4)


def dropout():
    return net(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3), nn.Dropout(0.9)), (4,)


def plain_layer_norm():
    norm = nn.LayerNorm(6, elementwise_affine=False)
    return net(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)), (4,)


def frozen_layer_norm():
    model = net(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight.normal_()
    model[1].requires_grad_(False)
    return model, (4,)


class Scaled(nn.Module):
    """A tensor of its own, past all layers."""

    def __init__(self):
        super().__init__()
        self.scale, self.net = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.scale * self.net(x)


def frozen_bare_parameter():
    model = net(Scaled())
    model[0].scale.requires_grad_(False)
    with torch.no_grad():
        model[0].scale.normal_()
    return model, (4,)


MODELS = {
    "M1 frozen": frozen,
    "M2 partly frozen": partly_frozen,
    "M3 shared": shared,
    "M3 shared convolution": shared_convolution,
    "M4 tied": tied,
    "M5 BatchNorm": batch_norm,
    "M6 Dropout": dropout,
    "M7 LayerNorm without weights": plain_layer_norm,
    "M7 LayerNorm frozen": frozen_layer_norm,
    "M8 bare parameter frozen": frozen_bare_parameter,
}


def dense_ggn(model, x, likelihood):
    """``sum_n J^T Lambda J`` by torch.func, which shares no code with the package."""
    model = copy.deepcopy(model).eval()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def outputs(weights, row):
        return torch.func.functional_call(model, (weights, fixed), (row[None],))[0]

    total = 0.0
    for row in x:
        jacobians = torch.func.jacrev(outputs)(weights, row)
        jacobian = torch.cat([j.flatten(1) for j in jacobians.values()], 1)
        scores = outputs(weights, row)
        hessian = torch.eye(len(scores), dtype=F64)
        if isinstance(likelihood, Categorical):
            p = scores.softmax(0)
            hessian = torch.diag(p) - torch.outer(p, p)
        total = total + jacobian.mT @ hessian @ jacobian
    return total


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.7)], ids=["softmax", "squares"])
@pytest.mark.parametrize("name", MODELS)
def test_curvature_is_that_of_the_jacobians(name, likelihood):
    """At most 300 parameters, 7 data in uneven batches, float64, relative 1e-10."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    x, y = data_for(model, likelihood, 7, *shape)
    model.train()
    weights = named_weights(model)
    assert sum(w.numel() for w in weights.values()) <= 300
    dense = dense_ggn(model, x, likelihood)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    with unchanged(model):
        full = accumulate(model, batches, likelihood, curvature="full").curvature
        moments = accumulate(model, batches, likelihood, curvature="diag").curvature.blocks
    assert list(full.sizes) == list(weights)
    assert (full.matrix - dense).norm() <= 1e-10 * dense.norm()
    for (block_name, block), part in zip(
        moments.items(), dense.diagonal().split(list(full.sizes.values())), strict=True
    ):
        assert block_name in weights
        assert (block.to_dense().diagonal() - part).norm() <= 1e-10 * part.norm().clamp_min(1e-30)


@pytest.mark.parametrize("name", [n for n in MODELS if "shared" not in n and "tied" not in n])
def test_kronecker_factors_of_one_datum_are_the_blocks_of_the_jacobians(name):
    """One datum and maps of vectors: the Kronecker form is exact; 1e-10."""
    model, shape = MODELS[name]()
    if len(shape) > 1:
        pytest.skip("shared positions are an approximation, see test_exactness.py")
    batch = data_for(model, Categorical(), 1, *shape)
    dense, start = dense_ggn(model, batch[0], Categorical()), 0
    for weight, kron in accumulate(model, [batch]).kron.items():
        end = start + named_weights(model)[weight].numel()
        block = dense[start:end, start:end]
        assert (kron.to_dense() - block).norm() <= 1e-10 * block.norm().clamp_min(1e-30)
        start = end


@pytest.mark.parametrize("name", MODELS)
def test_each_of_these_models_trains(name):
    model, shape = MODELS[name]()
    batch = data_for(model, Categorical(), 12, *shape)
    fixed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    model.train()
    result = fit(model, [batch])
    assert math.isfinite(result.log_marginal_likelihood)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in fixed.items())
    assert all(module.training for module in model.modules())


def fit(model, batches, **kwargs):
    return margeq.optimize_marglik(
        model, batches,
        **{
            "n_epochs": 4, "n_epochs_burnin": 1, "marglik_frequency": 1, "seed": 0,
            "progress": "none", **kwargs,
        },
    )  # fmt: skip


class Derived(nn.Linear):
    """A forward of its own, for which the rule of its parent is wrong."""

    def forward(self, x):
        return super().forward(x.square())


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: net(nn.Linear(4, 6), nn.GRU(6, 6)), r"'1\.weight_ih_l0' of 1 \(GRU\)"),
        (lambda: net(Derived(4, 3)), r"'0\.weight' of 0 \(Derived\)"),
        (lambda: Derived(4, 3).double(), r"'weight' of the model itself \(Derived\)"),
    ],
)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
def test_weights_without_a_rule_are_named_with_the_ways_out(build, name, curvature):
    model = build()
    x, y = torch.randn(6, 4, dtype=F64), torch.arange(6) % 3
    for call in (fit, accumulate):
        with unchanged(model), pytest.raises(MissingRuleError, match=name) as caught:
            call(model, [(x, y)], curvature=curvature)
        for remedy in ("freeze it", "exclude", "replace", "register a rule"):
            assert remedy in str(caught.value)


# -- M9: lazy modules ------------------------------------------------------------------------------


def test_lazy_modules_are_refused_until_they_have_sizes():
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3))
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    for call in (fit, accumulate):
        with pytest.raises(ConfigError, match=r"'0\.weight' .*lazy module.*call the model once"):
            call(model, [(x, y)])
    model(x)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    plain.load_state_dict(model.state_dict())
    expected = fit(plain, [(x, y)]).log_marginal_likelihood
    assert fit(model, [(x, y)]).log_marginal_likelihood == expected


# -- M10: compiled models --------------------------------------------------------------------------


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_part(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


def compiled_part_in_place(model):
    model[2].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "change", [compiled_whole, compiled_in_place, compiled_part, compiled_part_in_place]
)
def test_compiled_models_have_the_evidence_of_what_was_compiled(change):
    """Hooks are not called by code that was compiled without them; curvature runs uncompiled."""
    x, y = torch.randn(30, 4), torch.arange(30) % 3

    def built():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    expected = fit(built(), [(x, y)])
    model = change(built())
    model(x).sum().backward()  # compiled before the first hook
    result = fit(model, [(x, y)])
    assert result.log_marginal_likelihood == pytest.approx(
        expected.log_marginal_likelihood, rel=1e-6
    )
    for found, wanted in zip(result.history.updates, expected.history.updates, strict=True):
        assert found.occam == pytest.approx(wanted.occam, rel=1e-5)
    assert torch.allclose(model(x), expected.model(x), atol=1e-5)


# -- M11: wrapped models ---------------------------------------------------------------------------


def wrapped_run(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin, x = copy.deepcopy(model), torch.randn(12, 4, dtype=F64)
    batch = (x, torch.arange(12) % 3)
    wrapper = nn.parallel.DistributedDataParallel(twin)
    states = [accumulate(m, [batch]) for m in (model, wrapper)]
    prior = GaussianPrior(model)
    values = [float(log_marginal_likelihood(s, prior, Categorical())) for s in states]
    return values, [list(s.kron) for s in states]


def test_a_wrapped_model_has_the_evidence_of_what_is_inside():
    """One process, DistributedDataParallel over gloo; several ranks are in test_distributed.py."""
    ((values, names),) = on_ranks(1, wrapped_run)
    assert values[0] == values[1]
    assert names[0] == names[1] == ["0.weight", "0.bias", "2.weight", "2.bias"]


# -- M12: hooks of the user ------------------------------------------------------------------------


def watched(counts):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    add = {
        "forward": lambda m, f: m.register_forward_hook(f),
        "forward pre": lambda m, f: m.register_forward_pre_hook(f),
        "backward": lambda m, f: m.register_full_backward_hook(f),
        "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
    }
    for kind, register in add.items():
        for number, module in enumerate(model):
            key = (kind, number)
            counts[key] = 0

            def count(*_, key=key):
                counts[key] += 1

            register(module, count)
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # on data
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
def test_hooks_of_the_user_survive_and_fire(curvature):
    counts, x, y = {}, torch.randn(20, 4), torch.arange(20) % 3
    expected = fit(copy.deepcopy(unwatched()), [(x, y)], curvature=curvature)
    model = watched(counts)
    hooks = [(list(m._forward_hooks), list(m._backward_hooks)) for m in model]
    result = fit(model, [(x, y)], curvature=curvature)
    # four epochs of one batch, and four passes of the evidence at least
    assert all(n >= (4 if "backward" in kind else 8) for (kind, _), n in counts.items()), counts
    assert [(list(m._forward_hooks), list(m._backward_hooks)) for m in model] == hooks
    assert result.log_marginal_likelihood == expected.log_marginal_likelihood
    before = dict(counts)
    model(x).sum().backward()
    assert all(counts[key] == before[key] + 1 for key in counts)


def unwatched():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_a_hook_that_raises_leaves_everything_as_it_was():
    model = unwatched()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the hook of a user")

    model[0].register_forward_hook(fail)
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    with unchanged(model), pytest.raises(RuntimeError, match="the hook of a user"):
        fit(model, [(x, y)])


# -- M13: copies -----------------------------------------------------------------------------------


def test_model_and_result_can_be_copied_and_go_on():
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    model = unwatched()
    keys = list(model.state_dict())
    result = fit(model, [(x, y)])
    assert result.model is model
    assert list(model.state_dict()) == keys
    fresh = unwatched()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    twin = copy.deepcopy(result)
    assert twin.model is not model
    assert torch.equal(twin.model(x), model(x))
    assert twin.log_marginal_likelihood == result.log_marginal_likelihood
    assert twin.to_dict() == result.to_dict()
    assert twin.log_bayes_factor(result) == 0.0
    before = copy.deepcopy(model.state_dict())
    again = fit(twin.model, [(x, y)])  # the copy trains on its own
    assert math.isfinite(again.log_marginal_likelihood)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.is_leaf and p.requires_grad for p in twin.model.parameters())


# -- M14: devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["parameter", "buffer"])
def test_a_model_on_two_devices_is_refused_with_both_names(part):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    if part == "parameter":
        model[2].to("meta")
        message = r"2 devices \('0\.weight' on cpu, '2\.weight' on meta\).*model\.to"
    else:
        model[1].to("meta")
        message = r"2 devices \('0\.weight' on cpu, '1\.running_mean' on meta\)"
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    for call in (fit, accumulate):
        with pytest.raises(ConfigError, match=message):
            call(model, [(x, y)])


def test_a_model_without_values_is_refused():
    model = nn.Sequential(nn.Linear(4, 3)).to("meta")
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    for call in (fit, accumulate):
        with pytest.raises(ConfigError, match=r"'0\.weight' on meta.*to_empty"):
            call(model, [(x, y)])
