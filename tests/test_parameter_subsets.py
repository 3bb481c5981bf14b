"""Evidence of some of the weights: the last layer, names, modules, and frozen backbones."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import margeq
from margeq.curvature import exact
from margeq.curvature.factors import FactorSums
from margeq.curvature.final_layer import last_layer
from margeq.distributed import accumulate as accumulate_on_ranks
from margeq.errors import ConfigError, ConvergenceWarning, DataError
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net
from tests.ranks import on_ranks


def mlp():
    torch.manual_seed(2)
    return net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


LIKELIHOODS = [Categorical(1.4), Gaussian(0.6), Gaussian([0.4, 1.0, 2.0], noise="per-output")]


def dense_evidence_of(model, batch, likelihood, prior, names):
    """All other weights are constants: rows and columns of the dense curvature are left out."""
    matrix = exact.ggn(model, [batch], likelihood) * likelihood.curvature_scale
    weights = named_weights(model)
    kept = torch.cat([torch.full((w.numel(),), n in names) for n, w in weights.items()])
    matrix = matrix[kept][:, kept]
    outputs = model(batch[0]).detach()
    if isinstance(likelihood, Gaussian):
        density = torch.distributions.Normal(outputs, likelihood.sigma_noise)
    else:
        density = torch.distributions.Categorical(logits=outputs)
    total = density.log_prob(batch[1]).sum() / likelihood.temperature
    precisions = []
    for name in names:
        precision = prior.log_precision_of(name).exp()
        total = total - 0.5 * precision * weights[name].detach().square().sum()
        precisions.append(precision.expand(weights[name].numel()))
    half = torch.cat(precisions).rsqrt()
    ratio = half[:, None] * matrix * half
    return float(total - 0.5 * torch.logdet(torch.eye(len(ratio), dtype=F64) + ratio))


SELECTIONS = {
    "last": ("last_layer", ["4.weight", "4.bias"]),
    "name": (["2.weight"], ["2.weight"]),
    "module": (["2"], ["2.weight", "2.bias"]),
    "both": (["0.bias", "4"], ["0.bias", "4.weight", "4.bias"]),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=["c", "g", "per-output"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_evidence_is_that_of_the_dense_curvature_of_the_subset(selection, likelihood):
    parameters, names = SELECTIONS[selection]
    model = mlp()
    batch = data_for(model, likelihood, 14, 4)
    state = accumulate(model, [batch], likelihood, curvature="full", parameters=parameters)
    assert list(state.square_norms) == names
    prior = GaussianPrior(model, prior_precision=0.7, parameters=names)
    assert float(log_marginal_likelihood(state, prior, likelihood)) == pytest.approx(
        dense_evidence_of(model, batch, likelihood, prior, names), rel=1e-10
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS[1:], ids=["g", "per-output"])
def test_kronecker_evidence_of_a_linear_last_layer_is_exact(likelihood):
    # inputs of mean zero decouple the bias from the weight
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    batch = data_for(model, likelihood, 14, 4)
    state = accumulate(model, [batch], likelihood, parameters="last_layer")
    prior = GaussianPrior(model, prior_precision=0.7, parameters=["2"])
    assert float(log_marginal_likelihood(state, prior, likelihood)) == pytest.approx(
        dense_evidence_of(model, batch, likelihood, prior, ["2.weight"]), rel=1e-10
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=["c", "g", "per-output"])
def test_a_frozen_backbone_is_a_selection(likelihood):
    model = mlp()
    batch = data_for(model, likelihood, 14, 4)
    chosen = accumulate(model, [batch], likelihood, parameters="last_layer")
    prior = GaussianPrior(model, prior_precision=0.7, parameters=["4"])
    expected = float(log_marginal_likelihood(chosen, prior, likelihood))
    for parameter in [*model[0].parameters(), *model[2].parameters()]:
        parameter.requires_grad_(False)
    for parameters in ("all", "last_layer"):
        frozen = accumulate(model, [batch], likelihood, parameters=parameters)
        value = log_marginal_likelihood(
            frozen, GaussianPrior(model, prior_precision=0.7), likelihood
        )
        assert float(value) == expected


def test_nothing_is_recorded_below_the_last_layer(monkeypatch):
    seen = []
    plain = FactorSums.add_gradients

    def watched(self, uses, grads):
        seen.append([use.prefix for use in uses])
        plain(self, uses, grads)

    monkeypatch.setattr(FactorSums, "add_gradients", watched)
    model = mlp()
    backward = []
    model[2].register_full_backward_hook(lambda *_: backward.append(1))
    accumulate(model, [data_for(model, Categorical(), 9, 4)], parameters="last_layer")
    assert seen == [["4"], ["4"]]
    assert not backward


# --- which layer is the last one


class HeadFirst(nn.Module):
    """Declares its layers against the order in which it calls them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.head, self.norm, self.body = nn.Linear(5, 3), nn.LayerNorm(5), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.body(x).tanh())).log_softmax(1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return torch.cat([self.first(h), self.second(h)], 1)


def test_the_last_layer_is_the_one_called_last():
    x = torch.randn(6, 4)
    model = HeadFirst()
    model.scale.requires_grad_(False)
    assert last_layer(model, x) == ("head.weight", "head.bias")
    assert last_layer(nn.Linear(4, 2, bias=False), x) == ("weight",)
    model.head.bias.requires_grad_(False)
    assert last_layer(model, x) == ("head.weight",)
    model.head.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"no trainable weight \(head.weight, head.bias"):
        last_layer(model, x)
    with pytest.raises(ConfigError, match=r"'first.weight' past the last layer, 'second'"):
        last_layer(TwoHeads(), x)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_last_layers_of_different_networks_compare():
    flavours = [
        accumulate(model, [data_for(model, Categorical(), 9, 4)], parameters="last_layer").flavour
        for model in (mlp(), net(nn.Linear(4, 3)))
    ]
    assert flavours[0] == flavours[1]
    assert flavours[0].weights == "last_layer"


def test_names_of_the_last_layer_are_the_last_layer_in_training_too():
    model = mlp()
    x, y = data_for(model, Categorical(), 9, 4)
    named = fit(model, [(x, y)], parameters=last_layer(model, x), n_epochs=12)
    assert named.flavour.weights == "last_layer"
    assert fit(mlp(), [(x, y)], parameters="last_layer", n_epochs=12).flavour == named.flavour


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_what_no_last_layer_can_be_found_in_says_why():
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    with pytest.raises(DataError, match="returned a tuple for 6 data"):
        last_layer(nn.Sequential(Pair(4, 2)), x)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight
    with pytest.raises(ConfigError, match=r"last layer \(Linear\) .* tied to another layer"):
        last_layer(tied, x)
    for parameters in ("all", "last_layer"):
        with pytest.raises(DataError, match=r"cannot process batch 0 with inputs \(6, 4\)"):
            fit(nn.Linear(5, 2), [(x, y)], parameters=parameters)


# --- names that mean nothing


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["4.wieght"], "did you mean '4.weight'"),
        (["4.weight", "5"], "below, '5'"),
        ([], "empty"),
        ((), "empty"),
        ("4", r"such as \['4'\]"),
        (["0"], "frozen"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_what_was_meant(parameters, message):
    model = mlp()
    model[0].requires_grad_(False)
    batch = data_for(model, Categorical(), 9, 4)
    with pytest.raises(ConfigError, match=message):
        accumulate(model, [batch], parameters=parameters)
    with pytest.raises(ConfigError, match=message):
        fit(model, [batch], parameters=parameters)
    with pytest.raises(ConfigError, match=message):
        GaussianPrior(model, parameters=parameters)


def test_without_data_the_last_layer_is_asked_for_by_name():
    with pytest.raises(ConfigError, match=r"margeq\.last_layer\(model, inputs\)"):
        GaussianPrior(mlp(), parameters="last_layer")
    prior = GaussianPrior(mlp(), parameters=margeq.last_layer(mlp(), torch.ones(2, 4, dtype=F64)))
    assert set(prior.groups) == {"4.weight", "4.bias"}


# --- training and what follows


def fit(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return margeq.optimize_marglik(
            model, batches, **{"n_epochs": 30, "seed": 0, "progress": "none", **options}
        )


@pytest.mark.parametrize("likelihood", ["classification", "regression", "regression-per-output"])
def test_training_learns_precisions_of_the_last_layer_alone(likelihood):
    model = mlp()
    plain = Categorical() if likelihood == "classification" else Gaussian()
    batch = data_for(model, plain, 40, 4)
    before = model[0].weight.detach().clone()
    result = fit(model, [batch], likelihood=likelihood, parameters="last_layer")
    assert set(result.prior.groups) == {"4.weight", "4.bias"}
    assert not torch.equal(before, model[0].weight)  # trained, without prior
    assert result.flavour.weights == "last_layer"
    state = accumulate(
        model, [batch], result.likelihood, parameters="last_layer", hessian_root="adaptive"
    )
    assert float(log_marginal_likelihood(state, result.prior, result.likelihood)) == pytest.approx(
        result.log_marginal_likelihood, rel=1e-9
    )


def test_the_last_layer_is_handed_over(laplace_torch):
    model = mlp()
    batch = data_for(model, Gaussian(), 40, 4)
    result = fit(model, [batch], likelihood="regression", parameters="last_layer")
    posterior = result.to_laplace([batch])
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(
        result.log_marginal_likelihood, rel=1e-9
    )
    mean, variance = posterior(batch[0])
    assert mean.shape == (40, 3)
    features = model[:4](batch[0]).detach()
    state = accumulate(model, [batch], result.likelihood, parameters="last_layer")
    precision = {
        n: k.to_dense() * result.likelihood.curvature_scale
        + result.prior.log_precision_of(n).exp() * torch.eye(k.numel, dtype=F64)
        for n, k in state.kron.items()
    }
    inverse = torch.linalg.inv(precision["4.weight"]).reshape(3, 5, 3, 5)
    expected = torch.einsum("ni,oipj,nj->nop", features, inverse, features)
    expected = expected + torch.linalg.inv(precision["4.bias"])
    assert torch.allclose(variance, expected, rtol=1e-8)


def on_rank(rank):
    model = mlp()
    x, y = data_for(model, Categorical(), 9, 4)
    batches = [(x, y)] if rank else []
    state = accumulate_on_ranks(model, batches, parameters="last_layer")
    return list(state.square_norms), state.flavour.weights


def test_a_rank_without_data_takes_the_last_layer_of_others():
    for answer in on_ranks(2, on_rank):
        assert answer == (["4.weight", "4.bias"], "last_layer")
