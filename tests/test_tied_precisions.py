"""One precision for the factors of a product: what it ties, its evidence, its fixed point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import margeq
from margeq.errors import ConfigError
from margeq.groups import P4
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    evidence,
    hyper_gradient,
    log_marginal_likelihood,
)
from margeq.layers import (
    FactoredLinear2d,
    MergeGroup,
    ResidualPathways,
    SeparableGroupConv2d,
    SparseFactoredLinear2d,
)
from margeq.likelihoods import Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from margeq.training.function_scale import function_scale
from margeq.training.solvers import Lbfgs, MacKay
from margeq.training.starts import apply_start, draw_path, resolve_starts
from tests.oracles import F64, net

U, V, PRODUCT = "0.weight_u", "0.weight_v", "0.weight_u*weight_v"
SOLVERS = pytest.mark.parametrize("solver", [MacKay(), Lbfgs()], ids=["mackay", "lbfgs"])


def small_network():
    return net(FactoredLinear2d(2, 3, (2, 2), (2, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def problem(structure="tied", model=None, shape=(2, 2, 2)):
    """A network with its function-scale prior, its spectrum and a likelihood."""
    model = small_network() if model is None else model
    x = torch.randn(30, *shape, dtype=F64)
    y = model(x).detach() + 0.3 * torch.randn(30, 2, dtype=F64)
    prior, likelihood = GaussianPrior(model, structure), Gaussian(0.4)
    scale = function_scale(model, named_weights(model), x)
    prior.set_function_scale(scale.precision)
    prior.assign(prior.log_center)
    return model, prior, likelihood, decompose(accumulate(model, [(x, y)], likelihood)), (x, y)


# --- what is tied


def product_of(model, **options):
    prior = GaussianPrior(model, "tied", **options)
    groups: dict[str, list[str]] = {}
    for tensor, group in prior.groups.items():
        groups.setdefault(group, []).append(tensor)
    return {group: tensors for group, tensors in groups.items() if len(tensors) > 1}


def test_factors_of_one_layer():
    assert product_of(small_network()) == {PRODUCT: [U, V]}
    assert product_of(FactoredLinear2d(1, 1, 2, 2)) == {
        "weight_u*weight_v": ["weight_u", "weight_v"]
    }
    assert product_of(SparseFactoredLinear2d(1, 1, (2, 2), (2, 2), group=None)) == {
        "weight_u*weight_v": ["weight_u", "weight_v"]
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gc", {"0.elements.weight*plane.weight": ["elements.weight", "plane.weight"]}),
        ("depthwise", {"0.plane.weight*elements.weight": ["plane.weight", "elements.weight"]}),
        (
            "dg",
            {
                "0.plane.weight*elements.weight*channels.weight": [
                    "plane.weight", "elements.weight", "channels.weight",
                ]
            },
        ),
        ("g", {"0.pairs.weight*weight_w": ["pairs.weight", "pairs.weight_w"]}),
    ],
)  # fmt: skip
def test_factors_in_layers_of_a_container(kind, expected):
    model = nn.Sequential(SeparableGroupConv2d(2, 3, 3, kind, group=P4))
    found = {group: sorted(tensors) for group, tensors in product_of(model).items()}
    assert found == {g: sorted(f"0.{name}" for name in names) for g, names in expected.items()}


def test_only_what_has_a_prior_is_tied():
    model = small_network()
    assert product_of(model, parameters=["0.weight_u", "3"]) == {}
    model[0].weight_v.requires_grad_(False)
    assert product_of(model) == {}


def gc(channels=2):
    return SeparableGroupConv2d(channels, 3, 3, "gc", group=P4)


def test_modules_that_are_appended_to_a_layer_are_no_factors():
    layer = gc()
    layer.append(nn.ReLU())
    layer.append(nn.Conv3d(3, 3, 1))
    name = "elements.weight*plane.weight"
    assert product_of(layer) == {name: ["elements.weight", "plane.weight"]}


def test_a_factor_that_is_no_parameter_is_named_with_its_layer():
    model = nn.Sequential(nn.Identity(), gc())
    weight_norm(model[1].plane)
    with pytest.raises(ConfigError, match=r"1 \(Separable.*'plane.weight'.*use 'layerwise'"):
        GaussianPrior(model, "tied")
    model[1].plane = nn.Identity()
    with pytest.raises(ConfigError, match=r"1 \(Separable.*'plane.weight'.*use 'layerwise'"):
        GaussianPrior(model, "tied")


def sharing():
    model = nn.Sequential(gc(3), gc(3))
    model[1].elements = model[0].elements
    return model


def test_a_factor_of_two_products_is_refused():
    match = r"'0.elements.weight'.*'0.elements.weight\*plane.weight' and of '1.elements"
    with pytest.raises(ConfigError, match=match):
        GaussianPrior(sharing(), "tied")


def test_one_product_in_two_layers_is_one_product():
    model = sharing()
    model[1].plane = model[0].plane
    assert product_of(model) == {
        "0.elements.weight*plane.weight": ["0.elements.weight", "0.plane.weight"]
    }


def test_a_shared_factor_with_one_product_left_is_tied_to_it():
    model = sharing()
    model[1].plane.weight.requires_grad_(False)
    prior = GaussianPrior(model, "tied")
    assert prior.groups["0.elements.weight"] == prior.groups["0.plane.weight"]
    assert prior.groups["1.plane.bias"] == "1.plane.bias"
    model[0].plane.weight.requires_grad_(False)
    assert product_of(model) == {}
    assert GaussianPrior(model, "tied").groups["0.elements.weight"] == "0.elements.weight"


def test_the_structure_is_named_in_the_error():
    with pytest.raises(ConfigError, match="'tied'"):
        GaussianPrior(small_network(), "factorwise")


# --- precisions relative to function scale


def test_factors_differ_by_their_function_scales():
    """fan-in 4 for U and 2 for V; everything else is as layer by layer."""
    _, tied, *_ = problem()
    _, own, *_ = problem("layerwise")
    logs = {name: float(tied.log_precision_of(name)) for name in tied.groups}
    assert logs == pytest.approx({n: float(own.log_precision_of(n)) for n in own.groups})
    assert logs[U] - logs[V] == pytest.approx(math.log(4 / 2))
    assert tied.log_offset[U] == pytest.approx(-tied.log_offset[V])
    assert {tied.log_offset[n] for n in tied.groups if n not in (U, V)} == {0.0}
    tied.assign({PRODUCT: tied.log_prior_precision[PRODUCT] + 3.0})
    for name in (U, V):
        assert float(tied.log_precision_of(name)) == pytest.approx(logs[name] + 3.0)


@pytest.mark.parametrize("structure", ["layerwise", "scalar", "pathwise", {"0": "first"}])
def test_other_structures_have_no_offsets(structure):
    _, prior, *_ = problem(structure)
    assert set(prior.log_offset.values()) == {0.0}


def test_a_given_precision_is_the_geometric_mean_of_the_factors():
    model, _, _, _, (x, _) = problem()
    prior = GaussianPrior(model, "tied", {PRODUCT: 5.0})
    weights = named_weights(model)
    (start,) = resolve_starts(model, "current")
    scale = function_scale(model, weights, x)
    apply_start(model, weights, prior, scale, start, function_scale_prior=False, seed=0)
    mean = 0.5 * (prior.log_precision_of(U) + prior.log_precision_of(V))
    assert float(mean) == pytest.approx(math.log(5.0))
    assert float(prior.log_precision_of(U) - prior.log_precision_of(V)) == pytest.approx(
        math.log(2.0)
    )


def test_a_start_near_zero_has_the_function_variance_of_separate_precisions():
    """One factor is relaxed: tied factors share what it is relaxed by."""
    paths = {"conv": nn.Conv2d(1, 1, 3, padding=1), "fc": FactoredLinear2d(1, 1, (4, 4), (4, 4))}
    model = nn.Sequential(ResidualPathways(paths), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    weights, x = named_weights(model), torch.randn(2, 1, 4, 4)
    scale = function_scale(model, weights, x)
    factors = ("0.paths.fc.weight_u", "0.paths.fc.weight_v")
    totals = []
    for structure in ("tied", "layerwise"):
        prior = GaussianPrior(model, structure)
        start = resolve_starts(model, "symmetric")[0]
        apply_start(model, weights, prior, scale, start, function_scale_prior=True, seed=0)
        totals.append(sum(float(prior.log_precision_of(name)) for name in factors))
        draw_path(weights, factors, prior, scale, [factors[1]], seed=0)
        totals.append(sum(float(prior.log_precision_of(name)) for name in factors))
    assert totals == pytest.approx([totals[0]] * 4)


# --- evidence and its maximum


def test_evidence_is_that_of_separate_precisions_of_the_same_values():
    model, tied, likelihood, spectrum, _ = problem()
    tied.assign({PRODUCT: 0.7})
    separate = GaussianPrior(
        model, prior_precision={n: float(tied.log_precision_of(n).exp()) for n in tied.groups}
    )
    ours, theirs = (evidence(spectrum, prior, likelihood) for prior in (tied, separate))
    assert float(ours.total) == pytest.approx(float(theirs.total), rel=1e-13)
    ours, theirs = (effective_parameters(spectrum, p, likelihood) for p in (tied, separate))
    for name, gamma in ours.items():
        assert float(gamma) == pytest.approx(float(theirs[name]), rel=1e-12)


@SOLVERS
def test_the_fixed_point_is_stationary(solver):
    """By central differences, and its condition by hand."""
    _, prior, likelihood, spectrum, _ = problem()
    solver.converge(spectrum, prior, likelihood)
    assert not prior.at_bounds()
    for group, value in list(prior.log_prior_precision.items()):
        rise = 0.0
        for step in (1e-4, -1e-4):
            prior.assign({group: value + step})
            rise += float(log_marginal_likelihood(spectrum, prior, likelihood)) / (2 * step)
        prior.assign({group: value})
        assert abs(rise) < 1e-4, group
    gammas = effective_parameters(spectrum, prior, likelihood)
    norms = spectrum.square_norms
    scaled = sum(float(prior.log_precision_of(n).exp() * norms[n]) for n in (U, V))
    assert float(gammas[U] + gammas[V]) == pytest.approx(scaled, rel=1e-4)


def test_gradient_of_the_common_precision_is_the_sum_over_its_factors():
    model, tied, likelihood, spectrum, _ = problem()
    tied.assign({PRODUCT: 1.3})
    separate = GaussianPrior(
        model, prior_precision={n: float(tied.log_precision_of(n).exp()) for n in tied.groups}
    )
    _, ours = hyper_gradient(spectrum, tied, likelihood)
    _, theirs = hyper_gradient(spectrum, separate, likelihood)
    assert float(ours[PRODUCT]) == pytest.approx(float(theirs[U] + theirs[V]), rel=1e-10)


def rescaled(model, batch, likelihood, c):
    """Spectrum of the same function: ``U, bU -> c U, c bU`` and ``V -> V / c``."""
    with torch.no_grad():
        for tensor in (model[0].weight_u, model[0].bias_u):
            tensor.mul_(c)
        model[0].weight_v.div_(c)
        spectrum = decompose(accumulate(model, [batch], likelihood))
        for tensor in (model[0].weight_u, model[0].bias_u):
            tensor.div_(c)
        model[0].weight_v.mul_(c)
    return spectrum


def best(model, batch, likelihood, structure, c):
    """The evidence, its precisions converged at fixed noise, of factors scaled by c."""
    spectrum = rescaled(model, batch, likelihood, c)
    prior = GaussianPrior(model, structure)
    prior.set_function_scale(function_scale(model, named_weights(model), batch[0]).precision)
    prior.assign(prior.log_center)
    for _ in range(300):
        gammas = effective_parameters(spectrum, prior, likelihood)
        for group in prior.log_prior_precision:
            members = prior.members(group)
            gamma = sum(float(gammas[n]) for n in members)
            norm = sum(
                math.exp(prior.log_offset[n]) * float(spectrum.square_norms[n]) for n in members
            )
            prior.assign({group: math.log(gamma / norm)})
    return float(log_marginal_likelihood(spectrum, prior, likelihood))


def test_scaling_one_factor_by_the_inverse_of_the_other():
    """Flat for precisions of their own; tied, the evidence has one maximum, at balanced factors."""
    model, _, likelihood, _, batch = problem()
    scales = (0.05, 0.4, 1.0, 2.5, 20.0)
    own = [best(model, batch, likelihood, "layerwise", c) for c in scales]
    assert own == pytest.approx([own[0]] * 5, rel=1e-7)
    tied = [best(model, batch, likelihood, "tied", c) for c in scales]
    assert all(one <= other + 1e-9 for one, other in zip(tied, own, strict=True))
    top = tied.index(max(tied))
    assert 0 < top < 4
    assert tied[:top] == sorted(tied[:top])
    assert tied[top:] == sorted(tied[top:], reverse=True)
    assert max(tied) - min(tied) > 5.0
    assert max(tied) > own[0] - 1.0


# --- training


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["mackay", "lbfgs", "adam"])
def test_training_ends_at_a_stationary_point(solver):
    x = torch.randn(60, 2, 3, 3, dtype=F64)
    paths = {"conv": nn.Conv2d(2, 2, 3, padding=1), "fc": FactoredLinear2d(2, 2, (3, 3), (3, 3))}
    model = nn.Sequential(ResidualPathways(paths), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1))
    y = x.flatten(1)[:, :1].tanh() + 0.1 * torch.randn(60, 1, dtype=F64)
    result = margeq.optimize_marglik(
        model.double(), [(x, y)], likelihood="regression", prior="tied", hyper_solver=solver,
        n_epochs=30, marglik_frequency=5, optimizer_kwargs={"lr": 0.02}, restarts="free",
    )  # fmt: skip
    product = "0.paths.fc.weight_u*weight_v"
    assert product in result.prior.log_prior_precision
    assert math.isfinite(result.log_marginal_likelihood)
    value, grads = hyper_gradient(result.spectrum, result.prior, result.likelihood)
    assert value == pytest.approx(result.log_marginal_likelihood)
    for group, gradient in grads.items():
        if group not in result.prior.at_bounds():
            assert abs(float(gradient)) < 1e-2, group
    offsets = [result.prior.log_offset[f"0.paths.fc.{name}"] for name in ("weight_u", "weight_v")]
    assert sum(offsets) == pytest.approx(0.0, abs=1e-12)
    assert offsets[0] - offsets[1] == pytest.approx(math.log(9 / (2 / 4)))  # mean of two paths


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_separable_group_convolution_trains():
    x = torch.randn(20, 1, 4, 4, 4)
    model = nn.Sequential(
        SeparableGroupConv2d(1, 2, 3, "gc", group=P4), nn.ReLU(), MergeGroup(), nn.Flatten(),
        nn.Linear(32, 2),
    )  # fmt: skip
    y = x.mean((1, 2, 3, 4)).gt(0).long()
    result = margeq.optimize_marglik(
        model, [(x, y)], likelihood="classification", prior="tied", n_epochs=10,
        marglik_frequency=5, restarts="current",
    )  # fmt: skip
    tensors = [n for n, g in result.prior.groups.items() if g == "0.elements.weight*plane.weight"]
    assert len(tensors) == 2
    assert math.isfinite(result.log_marginal_likelihood)
