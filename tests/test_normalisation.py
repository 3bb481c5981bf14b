"""Scale-invariant weights before normalisation layers: detected, held, and harmless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.layers import FactoredLinear2d, ResidualPathways
from margeq.parameters import named_weights
from margeq.training.function_scale import function_scale
from margeq.training.normalisation import scale_invariant_units


def units_of(model, x):
    weights = named_weights(model)
    return scale_invariant_units(model, weights, function_scale(model, weights, x), x)


def conv(padding_mode="circular"):
    return nn.Conv2d(1, 4, 3, padding=1, padding_mode=padding_mode)


def test_weights_before_train_mode_norms_are_found():
    x = torch.randn(16, 1, 6, 6)
    model = nn.Sequential(
        conv(),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.Linear(8, 3),
    )
    # a bias is shifted, not scaled away by LayerNorm, so the fifth layer scales only as a whole
    model[4].bias = None
    assert units_of(model, x) == [("0.weight",), ("4.weight",)]


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(1, 4, affine=False), nn.LayerNorm([4, 6, 6], elementwise_affine=False)]
)
def test_weight_and_bias_before_a_norm_over_channels_are_held_together(norm):
    model = nn.Sequential(conv(), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    assert units_of(model, torch.randn(16, 1, 6, 6)) == [("0.weight", "0.bias")]


def test_weights_before_frozen_statistics_are_free():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten())
    model[1].eval()
    assert units_of(model, torch.randn(16, 1, 6, 6)) == []


def test_plain_networks_and_unused_weights_are_not_flagged():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    assert units_of(model, torch.randn(8, 1, 6, 6)) == []


def test_a_path_sum_before_a_norm_is_held_as_a_whole():
    paths = ResidualPathways({"conv": conv(), "fc": FactoredLinear2d(1, 4, (6, 6), (6, 6))})
    model = nn.Sequential(paths, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten())
    units = units_of(model, torch.randn(16, 1, 6, 6))
    assert units[-1] == (
        "0.paths.conv.weight",
        "0.paths.conv.bias",
        "0.paths.fc.weight_v",
        "0.paths.fc.bias_v",
    )


def test_the_test_leaves_buffers_flags_and_random_state_alone():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False), nn.Dropout(), nn.Flatten())
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    units_of(model, torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(random, torch.get_rng_state())


def test_convolution_before_batchnorm_keeps_a_bounded_precision_and_its_verdict():
    """500 epochs; the same verdict and evidence when the convolution starts ten times larger."""
    plain, scaled = _train(1.0), _train(10.0)
    for result in (plain, scaled):
        precision = float(result.prior.prior_precision["0.paths.conv.0.weight"])
        assert 1e-3 < precision < 1e3
        assert "0.paths.conv.0.weight" not in result.diagnostics.at_bounds
    verdicts = [
        [r.verdict for r in result.effective_dimension().paths] for result in (plain, scaled)
    ]
    assert verdicts[0] == verdicts[1]
    assert plain.log_marginal_likelihood == pytest.approx(scaled.log_marginal_likelihood, rel=1e-6)


def _train(factor):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = (x.diff(dim=-1).abs().mean((1, 2, 3)) > 1.12).long()
    torch.manual_seed(0)
    paths = ResidualPathways(
        {
            "conv": nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)),
            "fc": FactoredLinear2d(1, 4, (6, 6), (6, 6)),
        },
        reduction="sum",
    )
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    model = nn.Sequential(paths, nn.ReLU(), *head).double()
    with torch.no_grad():
        model[0].paths["conv"][0].weight.mul_(factor)
    return margeq.optimize_marglik(
        model,
        [(x, y)],
        n_epochs=500,
        optimizer_kwargs={"lr": 0.02},
        restarts="current",
        seed=0,
    )
