"""Variances of linearised outputs, layer by layer, equal those from materialised Jacobians."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from margeq import predictive
from margeq.curvature.exact import _jacobian
from margeq.errors import ConfigError
from margeq.laplace import accumulate
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.posterior import Posterior
from margeq.priors import GaussianPrior
from margeq.testing.subject import Subject
from tests.layer_cases import LAYER_CASES
from tests.oracles import F64, Lambda, MeanPool, data_for, net, relative_error

TWO_LIKELIHOODS = [Categorical(temperature=1.5), Gaussian(0.6)]


def posterior_of(model, batch, likelihood=TWO_LIKELIHOODS[0], **options):
    names = list(named_weights(model))
    prior = GaussianPrior(
        model, prior_precision={name: 0.5 + 0.3 * k for k, name in enumerate(names)}
    )
    return Posterior.of(accumulate(model, [batch], likelihood, **options), prior, likelihood)


def dense_covariance(posterior):
    """``(kappa H + Delta)^-1`` by inversion, not from the eigenvalues that are under test."""
    blocks = []
    for name, block in posterior.blocks.items():
        precision = block.dense(block.values)
        eye = torch.eye(len(precision), dtype=F64)
        blocks.append(torch.linalg.inv(precision + posterior.prior_precisions[name] * eye))
    return torch.block_diag(*blocks)


def from_jacobians(model, posterior, x):
    """Outputs, covariance per datum and covariance of all data."""
    training = [module.training for module in model.modules()]
    model.eval()
    outputs = model(x).flatten(1)
    jacobian = _jacobian(outputs, list(named_weights(model).values())).to(F64)
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    covariance = dense_covariance(posterior)
    rows = jacobian.flatten(0, 1)
    together = rows @ covariance @ rows.mT
    each = torch.einsum("nkp,pq,nlq->nkl", jacobian, covariance, jacobian)
    return outputs.detach(), each, together


def require_equal(model, posterior, x, tolerance=1e-10):
    outputs, each, together = from_jacobians(model, posterior, x)
    for found, expected in (
        (posterior.functional_variance(model, x), each),
        (posterior.functional_covariance(model, x), together),
    ):
        assert found[0].dtype == found[1].dtype == x.dtype
        assert relative_error(found[0], outputs) <= tolerance
        assert relative_error(found[1].to(F64), expected) <= tolerance


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_every_layer_type(case):
    """Float64, the layer under a fixed non-linear head, 1e-10."""
    subject = Subject(case)
    model = subject.with_head()
    posterior = posterior_of(model, *subject.batches(len(subject.x)))
    require_equal(model, posterior, subject.x)


def shared_twice():
    layer = nn.Linear(4, 4)
    return net(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)), (4,)


def shared_convolution():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    return net(layer, nn.Tanh(), layer, nn.Tanh(), MeanPool(), nn.Linear(2, 3)), (2, 5, 5)


def normed():
    model = net(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 3),
    )  # fmt: skip
    model[1].running_var.uniform_(0.5, 2.0)
    return model, (2, 5, 5)


def sequence():
    encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
    return net(encoder, Lambda(lambda x: x.mean(1)), nn.Linear(6, 3)), (4, 6)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(torch.tanh(self.gain * x))


NETWORKS = {
    "tied": shared_twice,
    "tied convolution": shared_convolution,
    "norms": normed,
    "attention": sequence,
    "bare": lambda: (Bare().double(), (5,)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("likelihood", TWO_LIKELIHOODS, ids=["classification", "regression"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag"])
def test_networks_in_float64(name, likelihood, curvature):
    model, shape = NETWORKS[name]()
    batch = data_for(model.eval(), likelihood, 9, *shape)
    posterior = posterior_of(model, batch, likelihood, curvature=curvature)
    require_equal(model, posterior, torch.randn(5, *shape, dtype=F64))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_float32(name):
    """A relative error of 1e-6, of variances in float64 from Jacobians in float32."""
    model, shape = NETWORKS[name]()
    batch = data_for(model.eval(), Categorical(), 9, *shape)
    model.float()
    posterior = posterior_of(model, (batch[0].float(), batch[1]))
    require_equal(model, posterior, torch.randn(5, *shape), tolerance=1e-6)


def test_pieces_and_chunks_change_nothing(monkeypatch):
    model, shape = shared_convolution()
    posterior = posterior_of(model, data_for(model, Categorical(), 9, *shape))
    x = torch.randn(7, *shape, dtype=F64)
    whole = posterior.functional_variance(model, x), posterior.functional_covariance(model, x)
    per_datum = 3 * (2 * 2 * 25 + 3)
    for name, value in (("_CHUNK_NUMBERS", 1), ("_GRADIENT_NUMBERS", 3 * per_datum)):
        monkeypatch.setattr(predictive, name, value)
        parts = posterior.functional_variance(model, x), posterior.functional_covariance(model, x)
        for one, other in zip(whole, parts, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_pieces_bound_the_gradients(monkeypatch):
    """Batches of the model are no larger than the budget allows, after the first look."""
    model, seen = net(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 3)), []
    posterior = posterior_of(model, data_for(model, Categorical(), 9, 4))
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(predictive, "_GRADIENT_NUMBERS", 4 * 3 * 53)
    posterior.functional_variance(model, torch.randn(10, 4, dtype=F64))
    assert seen == [10, 4, 4, 2]


def test_a_weight_without_data_has_its_prior():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.on = nn.Conv2d(2, 3, 2), nn.Conv2d(2, 3, 2), False

        def forward(self, x):
            return (self.one(x) + (self.two(x) if self.on else 0.0)).flatten(1)

    model = Switch().double()
    x, y = torch.randn(9, 2, 2, 2, dtype=F64), torch.randint(3, (9,))
    posterior = posterior_of(model, (x, y))
    assert posterior.blocks["two.weight"].is_empty
    require_equal(model, posterior, x)
    model.on = True
    require_equal(model, posterior, x)


def test_samples_have_the_covariance():
    """20 000 samples: each entry within five standard errors."""
    model, shape = net(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2)), (1, 2, 2)
    posterior = posterior_of(model, data_for(model, Categorical(), 9, *shape))
    draws = posterior.sample(20_000, torch.Generator().manual_seed(0))
    found = torch.cat(list(draws.values()), 1).mT.cov()
    expected = dense_covariance(posterior)
    diagonal = expected.diagonal()
    errors = ((diagonal[:, None] * diagonal + expected.square()) / 20_000).sqrt()
    assert ((found - expected).abs() <= 5 * errors).all()


def test_nothing_of_the_model_is_changed():
    model, shape = normed()
    batch = data_for(model.eval(), Categorical(), 9, *shape)
    posterior = posterior_of(model, batch)
    model.train()
    model[3].eval()
    flags, state = [m.training for m in model.modules()], deepcopy(model.state_dict())
    posterior.functional_variance(model, batch[0])
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_works_under_no_grad_and_on_mappings():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.linear(a * b)

    model = Keyword().double()
    inputs = {"a": torch.randn(9, 4, dtype=F64), "b": torch.randn(9, 4, dtype=F64)}
    posterior = posterior_of(model, (inputs, torch.randint(3, (9,))))
    with torch.no_grad():
        _, variance = posterior.functional_variance(model, inputs)
    plain = net(nn.Linear(4, 3))
    plain[0].load_state_dict(model.linear.state_dict())
    same = Posterior(
        {f"0.{n.partition('.')[2]}": block for n, block in posterior.blocks.items()},
        {f"0.{n.partition('.')[2]}": delta for n, delta in posterior.prior_precisions.items()},
    )
    _, expected, _ = from_jacobians(plain, same, inputs["a"] * inputs["b"])
    torch.testing.assert_close(variance, expected)


def test_refusals():
    model = net(nn.Linear(4, 3))
    batch = data_for(model, Categorical(), 9, 4)
    posterior = posterior_of(model, batch)
    with pytest.raises(ConfigError, match=r"no trainable weights \['0\.bias', '0\.weight'\]"):
        posterior.functional_variance(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), batch[0])
    wider = net(nn.Linear(5, 3))
    with pytest.raises(ConfigError, match=r"'0\.weight' has 1 blocks of size 4"):
        posterior.functional_variance(wider, torch.randn(2, 5, dtype=F64))
    state = accumulate(model, [batch], curvature="full")
    with pytest.raises(ConfigError, match="FullCurvature has no block"):
        Posterior.of(state, GaussianPrior(model), Categorical())
    prior, state = GaussianPrior(model, parameters=["0.weight"]), accumulate(model, [batch])
    with pytest.raises(ConfigError, match=r"different weights: \['0\.bias'\]"):
        Posterior.of(state, prior, Categorical())


@pytest.mark.parametrize("likelihood", TWO_LIKELIHOODS, ids=["classification", "regression"])
def test_precision_is_scaled_curvature_and_prior(likelihood):
    model, shape = shared_convolution()
    batch = data_for(model, likelihood, 9, *shape)
    posterior = posterior_of(model, batch, likelihood)
    state = accumulate(model, [batch], likelihood)
    for name, block in posterior.blocks.items():
        expected = likelihood.curvature_scale * state.kron[name].to_dense()
        torch.testing.assert_close(block.dense(block.values), expected)
