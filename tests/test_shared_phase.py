"""Paths that are subsampled together: one phase per sample for all of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import margeq
from margeq.batches import Batch
from margeq.errors import ConfigError
from margeq.function_share import function_variances, shares
from margeq.layers import (
    FactoredLinear2d,
    PolyphaseSubsample,
    ResidualPathways,
    SparseConv2d,
)

F64 = torch.float64
EARLY = ("conv", "s_conv")


def candidates():
    torch.manual_seed(0)
    how = {"padding": 1, "padding_mode": "circular"}
    return {
        "conv": nn.Conv2d(2, 3, 3, **how).double(),
        "s_conv": SparseConv2d(2, 3, 3, **how).double(),
        "f_fc": FactoredLinear2d(2, 3, (6, 8), (3, 4)).double(),
    }


def layer(reduction="sum", paths=(*EARLY, "f_fc")):
    chosen = {name: path for name, path in candidates().items() if name in paths}
    return ResidualPathways(chosen, reduction, PolyphaseSubsample(), before=EARLY)


def own_phases(reduction="sum"):
    paths = candidates()
    pooled = {name: nn.Sequential(paths[name], PolyphaseSubsample()) for name in EARLY}
    return ResidualPathways(pooled, reduction)


def images(n_data=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_data, 2, 6, 8, generator=generator, dtype=F64)


def chosen_phase(total):
    """The phase ``(a, b)`` of each sample, by its largest energy."""
    phases = list(product((0, 1), (0, 1)))
    energies = torch.stack([total[..., a::2, b::2].square().flatten(1).sum(1) for a, b in phases])
    return [phases[number] for number in energies.argmax(0).tolist()]


def at_phases(y, phases):
    return torch.stack([one[..., a::2, b::2] for one, (a, b) in zip(y, phases, strict=True)])


@torch.no_grad()
def parts(paths, x):
    """What each path adds, by hand."""
    found = {name: paths[name](x) for name in paths}
    early = [name for name in paths if name in EARLY]
    phases = chosen_phase(sum(found[name] for name in early)) if early else []
    return found | {name: at_phases(found[name], phases) for name in early}


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 1.0 / 3.0)])
def test_one_phase_for_the_sum_of_the_early_paths(reduction, factor):
    pathways, x = layer(reduction), images()
    expected = factor * sum(parts(pathways.paths, x).values())
    torch.testing.assert_close(pathways(x), expected, rtol=1e-12, atol=1e-12)


# --- equivariance


def shift_errors(pathways, x, shift):
    """Of each sample: distance between the shifted input's output and the nearest shift of y."""
    with torch.no_grad():
        y, moved = pathways(x), pathways(x.roll(shift, (-2, -1)))
    shifts = [y.roll(s, (-2, -1)) for s in product(range(y.shape[-2]), range(y.shape[-1]))]
    return torch.stack([(moved - one).abs().flatten(1).amax(1) for one in shifts]).amin(0)


SHIFTS = [(1, 0), (0, 1), (3, 2), (5, 7)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_the_sum_commutes_with_circular_shifts(shift, reduction):
    errors = shift_errors(layer(reduction, EARLY), images(16), shift)
    assert float(errors.max()) < 1e-12


def test_paths_that_choose_apart_do_not():
    worst = [float(shift_errors(own_phases(), images(16), shift).max()) for shift in SHIFTS]
    assert max(worst) > 0.1


# --- paths on and off


def test_a_path_alone_is_the_path_with_its_own_subsampling():
    pathways, x = layer("mean"), images()
    for name in ("s_conv", "f_fc"):
        pathways.switch_off(name)
    expected = PolyphaseSubsample()(pathways.paths["conv"](x)) / 3.0
    torch.testing.assert_close(pathways(x), expected, rtol=1e-12, atol=1e-12)


def test_an_off_path_has_no_say_in_the_phase_and_costs_nothing():
    pathways, x, calls = layer(), images(), []
    pathways.paths["s_conv"].register_forward_hook(lambda *_: calls.append("s_conv"))
    both = chosen_phase(pathways.paths["conv"](x) + pathways.paths["s_conv"](x))
    alone = chosen_phase(pathways.paths["conv"](x))
    assert both != alone
    calls.clear()
    pathways.switch_off("s_conv")
    with torch.no_grad():
        expected = at_phases(pathways.paths["conv"](x), alone) + pathways.paths["f_fc"](x)
        torch.testing.assert_close(pathways(x), expected, rtol=1e-12, atol=1e-12)
        assert calls == []
        pathways.switch_on("s_conv")
        torch.testing.assert_close(pathways(x), sum(parts(pathways.paths, x).values()))


def test_without_an_early_path_nothing_is_subsampled():
    pathways, x, calls = layer(), images(), []
    pathways.subsample.register_forward_hook(lambda *_: calls.append(1))
    for name in EARLY:
        pathways.switch_off(name)
    assert torch.equal(pathways(x), pathways.paths["f_fc"](x))
    assert calls == []


def test_state_is_that_of_a_layer_without_subsampling():
    pathways = layer()
    pathways.switch_off("conv")
    plain = ResidualPathways(candidates(), "sum")
    plain.load_state_dict(pathways.state_dict())
    assert plain.active == ("s_conv", "f_fc")
    plain.switch_on("conv")
    pathways.load_state_dict(plain.state_dict())
    assert pathways.active == (*EARLY, "f_fc")


def test_the_most_constrained_path_does_not_depend_on_where_the_phase_is_chosen():
    paths = {name: path for name, path in candidates().items() if name != "s_conv"}
    shared = ResidualPathways(paths, "sum", PolyphaseSubsample(), before=("conv",))
    assert shared.less_constrained() == ("f_fc",)


# --- shares of the function


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("off", [(), ("s_conv",), EARLY])
def test_variances_are_those_of_what_the_paths_add(reduction, off):
    pathways, x = layer(reduction), images()
    for name in off:
        pathways.switch_off(name)
    model = nn.Sequential(pathways, nn.ReLU())
    halves = [Batch(0, x[:5], torch.zeros(5)), Batch(1, x[5:], torch.zeros(3))]
    found = function_variances(model, halves)["0"]
    added = parts({name: pathways.paths[name] for name in pathways.active}, x)
    for name in pathways.paths:
        variance = float(added[name].var(0, correction=0).sum()) if name in added else 0.0
        assert found[name] == pytest.approx(pathways.scale**2 * variance, rel=1e-10)
    assert sum(shares({"0": found})["0"].values()) == pytest.approx(1.0)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "pool", [PolyphaseSubsample(), nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=lambda p: type(p).__name__
)
def test_contributions_add_up_to_the_layer(pool):
    pathways, x = ResidualPathways(candidates(), "mean", pool, before=EARLY), images()
    outputs = {name: path(x) for name, path in pathways.named_paths()}
    added = pathways.contributions(outputs)
    assert list(added) == list(pathways.paths)
    total = sum(added.values()) * pathways.scale
    torch.testing.assert_close(total, pathways(x), rtol=1e-12, atol=1e-12)


def test_a_layer_called_twice_counts_both_calls():
    pathways = ResidualPathways({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, "sum").double()
    x = torch.randn(6, 2, dtype=F64)
    with torch.no_grad():
        first = pathways(x)
        outputs = torch.cat([pathways.paths["a"](x), pathways.paths["a"](first)])
    found = function_variances(nn.Sequential(pathways, pathways), [Batch(0, x, torch.zeros(6))])
    assert found["0"]["a"] == pytest.approx(float(outputs.var(0, correction=0).sum()), rel=1e-10)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_network_with_a_shared_phase_trains():
    x = images(24).float()
    y = (x.mean((1, 2, 3)) > 0).long()
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    result = margeq.optimize_marglik(
        nn.Sequential(layer().float(), *head), [(x, y)],
        n_epochs=3, n_epochs_burnin=1, marglik_frequency=1, restarts="symmetric", seed=0,
    )  # fmt: skip
    assert torch.isfinite(torch.tensor(result.log_marginal_likelihood))
    on = [share for share in result.history.updates[-1].function_share["0"].values() if share > 0]
    assert sum(on) == pytest.approx(1.0)


# --- what cannot work


def test_wrong_arguments_are_refused():
    paths, pool = candidates(), PolyphaseSubsample()
    for options in ({"subsample": pool}, {"before": ("conv",)}):
        with pytest.raises(ConfigError, match="give both"):
            ResidualPathways(paths, "sum", **options)
    with pytest.raises(ConfigError, match="no path 'gconv'; this layer has conv, s_conv, f_fc"):
        ResidualPathways(paths, "sum", pool, before=("gconv",))
    with pytest.raises(ConfigError, match=r"before='conv': use a tuple of path names, \('conv',\)"):
        ResidualPathways(paths, "sum", pool, before="conv")


def test_a_forgotten_early_path_is_named():
    pathways = ResidualPathways(candidates(), "sum", PolyphaseSubsample(), before=("conv",))
    message = r"path 's_conv' returns \(8, 3, 6, 8\), .* \(8, 3, 3, 4\).*before=\('conv',\)"
    with pytest.raises(ConfigError, match=message):
        pathways(images())
