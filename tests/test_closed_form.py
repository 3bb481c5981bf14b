"""Lengthscale steps at fixed filters, and the roots that are differentiated; float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from margeq.closed_form import closed_form_gradient, factor_cotangent, fixed_filters, moved
from margeq.curvature.options import KfacOptions
from margeq.curvature.roots import GaussianRoot, SketchedRoot, SoftmaxRoot
from margeq.laplace import log_marginal_likelihood
from margeq.likelihoods import Categorical, Gaussian
from tests.network_problems import conv, factored, network, problem
from tests.oracles import F64, worst_difference
from tests.random_networks import Twice

GRID = {"anchors": "grid", "lengthscale": 0.8}

CASES = {
    "shared": {},
    "per-filter": {"per_filter": True},
    "penalty": {"lengthscale_spread": 0.4},
    "per-filter-penalty": {"per_filter": True, "lengthscale_spread": 0.4},
    "exponential": {"basis": "exponential"},
}


def grid_network(**options):
    """Bases in front of and behind weights; their lengthscales have left their initial values."""
    options = {**GRID, **options}
    model = network(
        conv(channels=(2, 4), groups=2, **options),
        nn.Tanh(),
        nn.MaxPool2d(2),
        conv(channels=(4, 3), **options),
        factored(3, **options),
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("log_lengthscale"):
                tensor += 0.2 * torch.rand_like(tensor)
    return model


def grid_problem(name="shared", likelihood=None, options=None):
    return problem(
        grid_network(**CASES[name]), 9, 2, 6, 6, likelihood=likelihood or Categorical(0.7),
        options=options or KfacOptions(),
    )  # fmt: skip


def gradient(candidate, p, state):
    kron = state.kron[candidate.weight]
    cotangent = factor_cotangent(candidate, kron, p.prior, p.likelihood)
    return closed_form_gradient(candidate, kron, cotangent, p.prior)


def lml(state, p):
    return float(log_marginal_likelihood(state, p.prior, p.likelihood))


OPTIONS = {
    "expand": KfacOptions(),
    "reduce": KfacOptions(kfac_approx="reduce"),
    "positions": KfacOptions(position_fraction=0.5),
    "adaptive": KfacOptions(hessian_root="adaptive", captured_trace=0.9),
}


@pytest.mark.parametrize(
    ("name", "likelihood", "options"),
    [
        *((name, Categorical(0.7), "expand") for name in CASES),
        ("per-filter", Gaussian(0.6, 1.3), "expand"),
        *(("per-filter", Categorical(), options) for options in OPTIONS),
    ],
)
def test_gradient_is_the_central_difference_at_fixed_filters(name, likelihood, options):
    """Of the moved state's evidence, and of a full pass with the moved weights."""
    p = grid_problem(name, likelihood, OPTIONS[options])
    candidates, state, outputs = fixed_filters(p.model, p.hyper), p.state(), p.model(p.x)
    assert [c.weight for c in candidates] == ["0.weight", "3.weight", "4.weight_u", "4.weight_v"]
    for c in candidates:
        logs, weight = c.basis.log_lengthscale, c.tensor.detach().clone()
        found, before, values = gradient(c, p, state), logs.detach().clone(), []
        for step in (1e-5, -1e-5):
            after = before.clone()
            after[-1] += step
            new = moved(c, state, after)
            again = p.state()
            torch.testing.assert_close(p.model(p.x), outputs, rtol=1e-10, atol=1e-11)
            assert worst_difference(new, again) <= 1e-8
            assert float(new.square_norms[c.weight]) == pytest.approx(
                float(again.square_norms[c.weight]), rel=1e-12
            )
            assert new.log_hyperprior == pytest.approx(again.log_hyperprior, rel=1e-12)
            values.append((lml(new, p), p.value()))
            with torch.no_grad():
                c.tensor.copy_(weight)
                logs.copy_(before)
        for plus, minus in zip(*values, strict=True):
            assert float(found[-1]) == pytest.approx((plus - minus) / 2e-5, rel=1e-6, abs=1e-7)


def test_large_steps_leave_function_and_fit_as_they_are():
    p = grid_problem("per-filter-penalty")
    state, outputs = p.state(), p.model(p.x)
    for c in fixed_filters(p.model, p.hyper):
        filters = p.model[0].filters()
        state = moved(c, state, c.basis.log_lengthscale.detach() + 0.5)
        torch.testing.assert_close(p.state().fit, state.fit)
        torch.testing.assert_close(p.model[0].filters(), filters)
    torch.testing.assert_close(p.model(p.x), outputs, rtol=1e-9, atol=1e-10)
    assert worst_difference(state, p.state()) <= 1e-7
    assert lml(state, p) == pytest.approx(p.value(), rel=1e-9)


def tied(kind):
    model = network(conv(channels=(2, 2), **GRID), nn.Tanh(), conv(channels=(2, 2), **GRID))
    if kind == "weight":
        model[2].weight = model[0].weight
    elif kind == "basis":
        model[2].basis = model[0].basis
    elif kind == "lengthscale":
        model[2].basis.log_lengthscale = model[0].basis.log_lengthscale
    return model


@pytest.mark.parametrize(
    ("model", "parameters", "weights"),
    [
        (lambda: tied("nothing"), "all", ["0.weight", "2.weight"]),
        (lambda: tied("nothing"), ["0"], ["0.weight"]),
        (lambda: tied("weight"), "all", []),
        (lambda: tied("basis"), "all", []),
        (lambda: tied("lengthscale"), "all", []),
        (lambda: network(Twice(conv(channels=(2, 2), **GRID))), "all", ["0.inner.weight"]),
        (lambda: network(conv(anchors=8)), "all", []),
        (lambda: network(conv(anchors="grid", basis="identity")), "all", []),
        (lambda: network(conv(anchors="grid", lengthscale=300.0)), "all", []),
        (lambda: network(nn.Flatten()), "all", []),
    ],
)
def test_offered_only_where_the_filters_of_one_weight_can_be_held(model, parameters, weights):
    built = model()
    p = problem(built, 3, 2, 6, 6, splits=())
    assert [c.weight for c in fixed_filters(built, p.hyper, parameters)] == weights


def test_a_frozen_weight_or_lengthscale_is_left_alone():
    model = tied("nothing")
    model[0].weight.requires_grad_(False)
    model[2].basis.log_lengthscale.requires_grad_(False)
    assert fixed_filters(model, problem(model, 3, 2, 6, 6, splits=()).hyper) == []


def test_a_module_that_is_called_twice_moves_once():
    p = problem(network(Twice(conv(channels=(2, 2), **GRID)), nn.Tanh()), 9, 2, 6, 6)
    (c,) = fixed_filters(p.model, p.hyper)
    state = moved(c, p.state(), c.basis.log_lengthscale.detach() + 0.3)
    assert worst_difference(state, p.state()) <= 1e-9
    assert lml(state, p) == pytest.approx(p.value(), rel=1e-10)


# --- the roots that are differentiated


def gram(root, n_data):
    everyone = torch.arange(n_data)
    columns = [root.columns(everyone, torch.full((n_data,), v)) for v in range(root.n_columns)]
    stacked = torch.stack(columns, -1)
    return stacked @ stacked.mT


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_gradient_of_the_softmax_root_is_that_of_the_hessian(n_classes, scale):
    logits = (scale * torch.randn(5, n_classes, dtype=F64)).requires_grad_(True)
    weight = torch.randn(5, n_classes, n_classes, dtype=F64)
    weight = weight + weight.mT
    found = torch.autograd.grad((weight * gram(SoftmaxRoot(logits), 5)).sum(), logits)[0]
    expected = torch.autograd.grad((weight * Categorical().hessian(logits)).sum(), logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_logits_are_finite_in_value_and_gradient(dtype):
    rows = [
        [1e4, -1e4, 0.0, 0.0],
        [-1e4, -1e4, -1e4, 1e4],
        [1e4, 1e4, 1e4, -1e4],
        [0.0, 0.0, 0.0, 0.0],
        [800.0, 40.0, 41.0, -700.0],
        [1e-300, -1e4, -745.0, 1e4],
    ]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    root = SoftmaxRoot(logits)
    found = gram(root, len(rows))
    torch.testing.assert_close(
        found, Categorical().hessian(logits.double()).to(dtype), rtol=0.0, atol=1e-7
    )
    for v in range(3):
        column = root.columns(torch.arange(len(rows)), torch.full((len(rows),), v))
        for row in torch.autograd.grad(
            column, logits, torch.randn_like(column), retain_graph=True
        ) + torch.autograd.grad(root.square_norms().sum(), logits, retain_graph=True):
            assert torch.isfinite(row).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), logits)[0]).all()


def test_small_probabilities_keep_their_relative_accuracy():
    logits = torch.tensor([[0.0, -300.0, -301.0, -310.0]], dtype=F64)
    norms = SoftmaxRoot(logits).square_norms()[0]
    q = torch.tensor([1.0, math.exp(-1), math.exp(-10)], dtype=F64)
    p_rest = q * math.exp(-300)
    # first column: L_11^2 = q_1, and p_i^2 / q_1 below it
    expected = p_rest.sum() + p_rest.square().sum() / p_rest.sum()
    assert float(norms[0]) == pytest.approx(float(expected), rel=1e-10)


N_SAMPLES = 40_000


@pytest.mark.parametrize("n_columns", [1, 3])
@pytest.mark.parametrize("kind", [SoftmaxRoot, GaussianRoot])
def test_sketched_root_is_unbiased(kind, n_columns):
    """40,000 samples, 5 standard errors of each entry."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]], dtype=F64).expand(N_SAMPLES, -1)
    root = SketchedRoot(kind(logits), torch.arange(N_SAMPLES), n_columns)
    assert root.n_columns == n_columns
    found = gram(root, N_SAMPLES)
    error = found.std(0) / N_SAMPLES**0.5
    expected = gram(kind(logits[:1]), 1)[0]
    assert ((found.mean(0) - expected).abs() <= 5.0 * error + 1e-12).all()
    norms = root.square_norms().sum(1)
    torch.testing.assert_close(norms, found.diagonal(dim1=1, dim2=2).sum(1))


def test_the_derivative_of_the_sketch_is_unbiased():
    """The signs do not depend on the outputs; 40,000 samples, 5 standard errors."""
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=F64).repeat(N_SAMPLES, 1).requires_grad_(True)
    weight = torch.tensor([[1.0, 0.5, -0.2], [0.5, -1.0, 0.3], [-0.2, 0.3, 2.0]], dtype=F64)
    sketch = gram(SketchedRoot(SoftmaxRoot(logits), torch.arange(N_SAMPLES), 1), N_SAMPLES)
    found = torch.autograd.grad((sketch * weight).sum(), logits)[0]
    hessian = Categorical().hessian(logits[:1])
    expected = torch.autograd.grad((hessian * weight).sum(), logits)[0][0]
    error = found.std(0) / N_SAMPLES**0.5
    assert ((found.mean(0) - expected).abs() <= 5.0 * error).all()
