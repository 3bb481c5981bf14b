"""Starts: function scale, the symmetric limit, each path alone; switching and probing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import margeq
from margeq.batches import Batch
from margeq.curvature.capture import eval_mode
from margeq.function_share import function_variances, shares
from margeq.layers import FactoredLinear2d, Linear2d, PolyphaseSubsample, ResidualPathways
from margeq.models import digit_network
from margeq.parameters import named_weights
from margeq.training.function_scale import function_scale
from margeq.training.starts import Start, apply_start, resolve_starts
from margeq.training.switching import PathSwitch


def scale_of(model, x):
    return function_scale(model, named_weights(model), x).precision


def test_fan_in_over_gain_squared():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2),
    )  # fmt: skip
    precision = scale_of(model, torch.randn(2, 3, 4, 4))
    assert precision == {
        "0.weight": 27 / 2, "0.bias": 1.0, "4.weight": 16.0, "4.bias": 1.0,
        "6.weight": 5.0, "6.bias": 1.0,
    }  # fmt: skip


def test_first_factors_and_functional_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = FactoredLinear2d(3, 4, (4, 4), (2, 2)), nn.Linear(16, 2)

        def forward(self, x):
            return self.out(torch.relu_(self.fc(x)).flatten(1))

    precision = scale_of(Net(), torch.randn(2, 3, 4, 4))
    assert precision["fc.weight_u"] == 16.0
    assert precision["fc.weight_v"] == 3 / 2
    assert precision["out.weight"] == 16.0


def test_the_mean_over_paths_enters_the_scale():
    paths = {"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))}
    model = nn.Sequential(ResidualPathways(paths, "mean"), nn.ReLU(), nn.Linear(4, 2))
    precision = scale_of(model, torch.randn(2, 4))
    assert precision["0.paths.a.weight"] == 4 / 2 / 4
    assert precision["0.paths.a.bias"] == 1 / 4
    assert precision["0.paths.b.0.weight"] == 4.0
    assert precision["0.paths.b.1.weight"] == 6 / 2 / 4


def started(model, x, start, seed=0):
    weights = named_weights(model)
    prior = margeq.GaussianPrior(model)
    scale = function_scale(model, weights, x)
    apply_start(model, weights, prior, scale, start, function_scale_prior=True, seed=seed)
    return prior


def path_variances(model, x):
    return function_variances(model, [Batch(0, x, torch.zeros(len(x)))])


def wide_network(reduction):
    paths = {
        "conv": nn.Conv2d(16, 64, 3, padding=1, padding_mode="circular"),
        "fc": FactoredLinear2d(16, 64, (8, 8), (8, 8)),
        "dense": Linear2d(16, 64, (8, 8), (8, 8)),
    }
    return nn.Sequential(
        ResidualPathways(paths, reduction), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 2)
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_paths_start_with_equal_variance_or_a_hundredth_of_it(reduction):
    """White inputs, 200 data, 4,096 outputs: each variance within 15 % of its expectation 2."""
    x = torch.randn(200, 16, 8, 8)
    model = wide_network(reduction)
    started(model, x, Start("free"))
    for variance in path_variances(model, x)["0"].values():
        assert variance / 4096 == pytest.approx(2.0, rel=0.15)
    started(model, x, Start("symmetric", near_symmetric=True))
    variances = path_variances(model, x)["0"]
    assert variances["conv"] / 4096 == pytest.approx(2.0, rel=0.15)
    assert variances["fc"] / 4096 == pytest.approx(0.02, rel=0.15)
    assert variances["dense"] / 4096 == pytest.approx(0.02, rel=0.15)


def test_only_starts_switch_the_others_off_and_leave_no_prior_cost():
    model = wide_network("sum")
    started(model, torch.randn(2, 16, 8, 8), Start("only:fc", only="fc"))
    assert model[0].active == ("fc",)
    assert float(model[0].paths["conv"].weight.detach().abs().sum()) == 0.0


def test_starts_do_not_depend_on_which_paths_are_off():
    x = torch.randn(2, 16, 8, 8)
    model = wide_network("sum")
    for only in ("fc", "conv", "dense"):  # each from the state that the one before left behind
        started(model, x, Start(f"only:{only}", only=only))
        assert model[0].active == (only,)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_trained_model_can_be_trained_again_as_if_it_were_new():
    x = torch.randn(40, 1, 4, 4)
    y = (x.mean((1, 2, 3)) > 0).long()

    def network():
        paths = {
            "conv": nn.Conv2d(1, 3, 3, padding=1),
            "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4)),
        }
        head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        return nn.Sequential(ResidualPathways(paths, "sum"), *head)

    def evidence(model, restarts):
        result = margeq.optimize_marglik(
            model, [(x, y)], n_epochs=4, n_epochs_burnin=2, marglik_frequency=2, seed=0,
            restarts=restarts,
        )  # fmt: skip
        return result.log_marginal_likelihood

    used = network()
    evidence(used, "only:conv")
    assert evidence(used, "symmetric") == evidence(network(), "symmetric")


def test_a_path_draws_the_same_weights_in_every_model_that_has_it():
    x = torch.randn(2, 1, 16, 16)
    both, alone = digit_network(3), digit_network(3, paths=("conv",))
    started(both, x, Start("only:conv", only="conv"))
    started(alone, x, Start("free"))
    with eval_mode(both), eval_mode(alone):
        assert torch.equal(both(x), alone(x))


def test_automatic_starts():
    assert [s.name for s in resolve_starts(nn.Linear(2, 2), "auto")] == ["current"]
    single = ResidualPathways({"conv": nn.Linear(2, 2)})
    assert [s.name for s in resolve_starts(single, "auto")] == ["symmetric"]


def test_polyphase_counts_for_the_span():
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), PolyphaseSubsample())
    layer = ResidualPathways({"conv": conv, "fc": FactoredLinear2d(2, 3, (4, 4), (2, 2))})
    assert layer.less_constrained() == ("fc",)


@pytest.mark.parametrize(
    ("size", "relaxed"),
    [((4, 4), ("fc",)), ((2, 2), ("fc",)), ((2, 4), ("fc",)), ((1, 1), ())],
)
def test_small_maps_count_only_the_taps_that_differ(size, relaxed):
    # nine taps on a map of four pixels are four maps, on one of a single pixel one
    half = tuple(max(1, extent // 2) for extent in size)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    pool = PolyphaseSubsample() if min(size) > 1 else nn.Identity()
    paths = {"conv": nn.Sequential(conv, pool), "fc": FactoredLinear2d(2, 3, size, half)}
    model = nn.Sequential(ResidualPathways(paths))
    scale = function_scale(model, named_weights(model), torch.randn(2, 2, *size))
    assert model[0].less_constrained(scale.shapes) == relaxed


def test_shares_sum_to_one_and_an_off_path_has_none():
    model = wide_network("sum")
    model[0].switch_off("dense")
    found = shares(path_variances(model, torch.randn(8, 16, 8, 8)))["0"]
    assert math.fsum(found.values()) == pytest.approx(1.0)
    assert found["dense"] == 0.0


def decisions(shares_over_time, n_updates):
    switch, active, log = PathSwitch(n_updates), ("conv", "fc"), []
    for share in shares_over_time:
        fc = share if "fc" in active else 0.0
        off, probe = switch.decide({"l": {"conv": 1 - fc, "fc": fc}}, {"l": active})
        active = ("conv",) if off else ("conv", "fc") if probe else active
        log.append("off" if off else "probe" if probe else "")
    return log


def test_paths_go_off_after_two_low_shares_and_are_probed_at_growing_intervals():
    log = decisions([0.5, 0.0, 0.5] + [0.0] * 57, 60)
    events = [(n, what) for n, what in enumerate(log, 1) if what]
    assert events == [
        (5, "off"),
        (9, "probe"),
        (11, "off"),
        (19, "probe"),
        (21, "off"),
        (37, "probe"),
        (39, "off"),
    ]


def test_no_probe_in_the_last_third():
    assert "probe" not in decisions([0.0] * 8, 8)[6:]


def test_the_largest_path_of_a_layer_is_never_switched_off():
    switch = PathSwitch(10)
    for _ in range(5):
        off, _ = switch.decide({"l": {"conv": 0.0, "fc": 0.0}}, {"l": ("conv", "fc")})
        assert ("l", "conv") not in off
