"""Affine weights of ``nn.BatchNorm1d/2d/3d``: curvature in evaluation mode, starts, training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import margeq
from margeq.accumulation import accumulate
from margeq.batches import Batch
from margeq.curvature.io import rule_for
from margeq.errors import MissingRuleError, UnsupportedLayerError
from margeq.function_share import function_variances
from margeq.layers import ResidualPathways, SparseConv2d
from margeq.parameters import named_weights
from margeq.testing import check_layer
from margeq.training.function_scale import function_scale
from margeq.training.starts import Start, apply_start, draw_path

F64 = torch.float64


def with_statistics(layer):
    """Running statistics and weights as after training."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 3.0, generator=generator)
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
    return layer


def network(norm=None, n_classes=3):
    torch.manual_seed(0)
    norm = with_statistics(nn.BatchNorm2d(4)) if norm is None else norm
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(100, n_classes)
    ).double()


def images(n_data=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n_data, 1, 5, 5, generator=generator, dtype=F64), torch.arange(n_data) % 3


# --- curvature


def test_factors_of_a_weight_are_second_moments_per_channel():
    """``A_c = sum xhat^2`` and ``G_c = sum g^2 / T`` from autograd's gradients of the outputs."""
    model, (x, y) = network().eval(), images()
    kron = accumulate(model, [(x, y)], "classification").kron["1.weight"]
    hidden = model[0](x).detach()
    norm = model[1]
    axes = (1, 4, 1, 1)
    xhat = (hidden - norm.running_mean.reshape(axes)) / torch.sqrt(
        norm.running_var.reshape(axes) + norm.eps
    )
    after = norm(hidden).detach().requires_grad_()
    outputs = model[2:](after)
    roots = outputs.softmax(1).detach()
    hessians = torch.diag_embed(roots) - roots[:, :, None] * roots[:, None]
    squares = torch.zeros(4, dtype=F64)
    gradients = [
        torch.autograd.grad(outputs[:, k].sum(), after, retain_graph=True)[0] for k in range(3)
    ]
    for k in range(3):
        for other in range(3):
            products = gradients[k] * gradients[other] * hessians[:, k, other].reshape(-1, 1, 1, 1)
            squares += products.sum((0, 2, 3))
    n_positions = 6 * 25
    expected = xhat.square().sum((0, 2, 3)) * squares / n_positions
    torch.testing.assert_close(kron.to_dense().diagonal(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(kron.to_dense(), torch.diag(kron.to_dense().diagonal()))


def test_inputs_at_sampled_positions_are_those_alone():
    layer, x = (
        with_statistics(nn.BatchNorm2d(4)).double().eval(),
        torch.randn(2, 4, 3, 2, dtype=F64),
    )
    rule = rule_for(nn.BatchNorm2d)
    positions = torch.tensor([[5, 0], [3, 1]])
    everywhere = rule.inputs(layer, x, lambda _: None)["weight"]
    sampled = rule.inputs(layer, x, lambda _: positions)["weight"]
    assert (everywhere.n_positions, sampled.n_positions) == (6, 6)
    expected = torch.stack([everywhere.rows[n, positions[n]] for n in range(2)])
    assert torch.equal(sampled.rows, expected)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
def test_evidence_does_not_depend_on_the_batches(curvature):
    model, (x, y) = network().eval(), images()

    def value(batches):
        state = accumulate(model, batches, "classification", curvature=curvature)
        prior, likelihood = margeq.GaussianPrior(model), margeq.Categorical()
        return float(margeq.log_marginal_likelihood(state, prior, likelihood))

    whole = value([(x, y)])
    assert value([(x[:1], y[:1]), (x[1:], y[1:])]) == pytest.approx(whole, rel=1e-9)


def test_gradients_of_hyperparameters_before_the_layer():
    """The normalised inputs, too, depend on what comes before."""

    def make():
        torch.manual_seed(0)
        norm = with_statistics(nn.BatchNorm2d(3))
        return nn.Sequential(SparseConv2d(2, 3, 3, padding=1), norm).eval()

    shared = ("0.weight", "1.weight")
    check_layer(margeq.testing.LayerCase("sparse-norm", make, (4, 2, 3, 3), shared=shared))


# --- what cannot work


class AlwaysTraining(nn.Sequential):
    """As written by people who want batch statistics at prediction time."""

    def train(self, mode=True):
        return super().train(True)


def test_batch_statistics_are_refused_with_the_ways_out():
    batches = [images()]
    without = network(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UnsupportedLayerError, match=r"BatchNorm2d\(4.*track_running_stats=True"):
        accumulate(without, batches, "classification")
    with pytest.raises(UnsupportedLayerError, match=r"BatchNorm2d\(4.*training mode.*\.eval\(\)"):
        accumulate(AlwaysTraining(*network()), batches, "classification")
    with pytest.raises(UnsupportedLayerError, match="no running statistics"):
        margeq.optimize_marglik(without, batches, n_epochs=1, n_epochs_burnin=0)


def test_a_subclass_has_no_rule():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(MissingRuleError, match=r"'1\.weight' of 1 \(Own\)"):
        accumulate(network(Own(4)), [images()], "classification")


# --- starts


def block():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4))


def two_paths(reduction):
    paths = {
        "conv": block(),
        "wide": nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4)),
    }
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(ResidualPathways(paths, reduction), *head)


def started(model, start, x):
    weights, prior = named_weights(model), margeq.GaussianPrior(model)
    scale = function_scale(model, weights, x)
    apply_start(model, weights, prior, scale, start, function_scale_prior=True, seed=0)
    return weights, prior, scale


@pytest.mark.parametrize(("reduction", "size"), [("sum", 1.0), ("mean", 2.0)])
def test_scale_weights_start_at_one_and_biases_at_zero(reduction, size):
    model, x = two_paths(reduction), torch.randn(4, 1, 6, 6)
    weights, _, scale = started(model, Start("free"), x)
    assert scale.precision["0.paths.conv.1.weight"] == pytest.approx(1 / size**2)
    assert scale.precision["0.paths.conv.1.bias"] == pytest.approx(1 / size**2)
    for path in ("conv", "wide"):
        norm = model[0].paths[path][1]
        assert torch.equal(norm.weight, torch.full((4,), size))
        assert torch.equal(norm.bias, torch.zeros(4))
        assert weights[f"0.paths.{path}.0.weight"].std() > 0.05


def test_less_constrained_paths_start_near_zero_and_come_back_so():
    model, x = two_paths("sum"), torch.randn(64, 1, 6, 6)
    weights, prior, scale = started(model, Start("symmetric", near_symmetric=True), x)
    wide = model[0].paths["wide"][1]
    torch.testing.assert_close(wide.weight, torch.full((4,), 0.1))
    assert torch.equal(model[0].paths["conv"][1].weight, torch.ones(4))
    model.train()(x)  # statistics of the data
    variances = function_variances(model, [Batch(0, x, torch.zeros(64))])["0"]
    assert variances["wide"] < 0.02 * variances["conv"]
    names = [name for name in weights if name.startswith("0.paths.wide.")]
    with torch.no_grad():
        for name in names:
            weights[name].zero_()
    draw_path(weights, names, prior, scale, scale.path_outputs["0"]["wide"], seed=1)
    torch.testing.assert_close(wide.weight, torch.full((4,), 0.1))


def test_starts_from_the_models_own_weights_keep_them():
    model = network().float()
    before = model[1].weight.clone()
    started(model, Start("current", draw=False), images()[0].float())
    assert torch.equal(model[1].weight, before)


# --- training


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("hyper_solver", ["fixed", "mackay"])
def test_a_small_network_with_batch_normalisation_trains(hyper_solver):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 1, 6, 6, generator=generator)
    y = (x[:, :, :3].mean((1, 2, 3)) > x[:, :, 3:].mean((1, 2, 3))).long()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )  # fmt: skip
    batches = [(x[:48], y[:48]), (x[48:], y[48:])]
    result = margeq.optimize_marglik(
        model, batches, n_epochs=30, n_epochs_burnin=5, marglik_frequency=5, seed=0,
        optimizer_kwargs={"lr": 0.02}, hyper_solver=hyper_solver,
    )  # fmt: skip
    assert math.isfinite(result.log_marginal_likelihood)
    assert set(result.prior.groups) >= {"1.weight", "1.bias"}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model[1].weight.detach(), torch.ones(4))
    with torch.no_grad():
        accuracy = float((model.eval()(x).argmax(1) == y).double().mean())
    assert accuracy > 0.9
