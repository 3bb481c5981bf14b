"""Scale-invariant weights before normalisation layers: detected, held, and harmless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.groups import P4
from margeq.layers import FactoredLinear2d, GroupConv2d, LiftingConv2d, ResidualPathways
from margeq.parameters import named_weights
from margeq.paths import all_paths_on
from margeq.training import run
from margeq.training.function_scale import function_scale
from margeq.training.normalisation import scale_invariant_units


def units_of(model, x):
    weights = named_weights(model)
    with all_paths_on(model):
        scale = function_scale(model, weights, x)
    return scale_invariant_units(model, weights, scale, x)


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


def path_network():
    paths = ResidualPathways({"conv": conv(), "fc": FactoredLinear2d(1, 4, (6, 6), (6, 6))})
    return nn.Sequential(paths, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten())


def test_paths_that_are_off_have_no_part_in_it():
    """The bias of one path alone is shifted away, so its weight is invariant by itself."""
    model = path_network()
    model[0].switch_off("fc")
    assert units_of(model, torch.randn(16, 1, 6, 6)) == [("0.paths.conv.weight",)]


def test_of_three_paths_two_that_are_on_are_held_together():
    layer = ResidualPathways({name: conv() for name in "abc"})
    layer.switch_off("b")
    model = nn.Sequential(layer, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten())
    on = tuple(f"0.paths.{path}.{name}" for path in "ac" for name in ("weight", "bias"))
    assert units_of(model, torch.randn(16, 1, 6, 6)) == [on]


@pytest.mark.parametrize("change", [torch.zeros_like, lambda w: 1e-4 * w, lambda w: 1e4 * w])
def test_units_do_not_depend_on_the_present_weights(change):
    """Without its bias, a weight alone seems invariant; without its weights, a path as well."""
    x = torch.randn(16, 1, 6, 6)
    model, norm = path_network(), nn.GroupNorm(1, 4, affine=False)
    normed = nn.Sequential(conv(), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    found = units_of(model, x), units_of(normed, x)
    with torch.no_grad():
        normed[0].bias.copy_(change(normed[0].bias))
        for weight in model[0].paths["fc"].parameters():
            weight.copy_(change(weight))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert (units_of(model, x), units_of(normed, x)) == found
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_test_leaves_buffers_flags_and_random_state_alone():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False), nn.Dropout(), nn.Flatten())
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    units_of(model, torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(random, torch.get_rng_state())


# labels of noise: the evidence is no more than that of guessing
@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
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


# --- sums of paths of which some are off


class GroupNetwork(nn.Module):
    def __init__(self, names):
        super().__init__()
        paths = {name: GroupConv2d(2, 2, 3, group=P4, padding=1) for name in names}
        self.lift, self.res = LiftingConv2d(1, 2, 3, group=P4), ResidualPathways(paths, "sum")
        self.bn, self.head = nn.BatchNorm3d(2), nn.Linear(2, 3)

    def forward(self, x):
        maps = self.bn(self.res(self.lift(x).tanh()))
        return self.head(maps.relu().mean((2, 3, 4)))


def group_problem(names):
    torch.manual_seed(0)
    x, y = torch.randn(30, 1, 6, 6, dtype=torch.float64), torch.arange(30) % 3
    return GroupNetwork(names).double(), x, y


def fit(model, x, y, start, n_epochs=3, callbacks=()):
    return margeq.optimize_marglik(
        model, [(x, y)], n_epochs=n_epochs, n_epochs_burnin=0, marglik_frequency=1,
        restarts=start, seed=0, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_path_alone_before_a_norm_is_the_model_with_this_path_only():
    alone = fit(*group_problem("a"), "free")
    assert alone.diagnostics.held_norms == (("res.paths.a.weight",),)
    for names in ("ab", "abcd"):
        one_on = fit(*group_problem(names), "only:a")
        assert one_on.log_marginal_likelihood == alone.log_marginal_likelihood
        assert one_on.diagnostics.held_norms == alone.diagnostics.held_norms
        for name, tensor in alone.model.named_parameters():
            assert torch.equal(tensor, one_on.model.get_parameter(name))


class Schedule:
    """Path b goes off after the second update and is probed after the fourth."""

    def __init__(self, n_updates):
        self.time = 0

    def decide(self, by_share, active):
        self.time += 1
        return [("res", "b")] * (self.time == 2), [("res", "b")] * (self.time == 4)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_norms_follow_the_paths_that_are_switched(monkeypatch):
    monkeypatch.setattr(run, "PathSwitch", Schedule)
    seen = []

    def look(event):
        if event.kind in ("epoch", "switch"):
            seen.append((event.kind, _square_norms(model)))

    model, x, y = group_problem("ab")
    fit(model, x, y, "free", n_epochs=6, callbacks=[look])
    scale = function_scale(model, named_weights(model), x).precision
    weight, bias = (p.numel() / scale[f"res.paths.a.{n}"] for n, p in _of_path(model, "a"))
    kinds = [kind for kind, _ in seen]
    assert kinds == ["epoch", "epoch", "switch", "epoch", "epoch", "switch", "epoch", "epoch"]
    for number, (_, norms) in enumerate(seen):
        if number in (2, 3, 4):  # the bias of a alone is shifted away
            assert norms["a.weight"] == pytest.approx(weight, rel=1e-12)
        else:
            assert sum(norms.values()) == pytest.approx(2 * (weight + bias), rel=1e-12)


def _of_path(model, path):
    return list(model.res.paths[path].named_parameters())


def _square_norms(model):
    named = [(f"{path}.{n}", p) for path in "ab" for n, p in _of_path(model, path)]
    return {name: float(p.detach().square().sum()) for name, p in named}
