"""One pass over the data gives the same sums however the data are cut and ordered; float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from margeq.laplace import accumulate
from margeq.likelihoods import Categorical, Gaussian
from tests.oracles import data_for, net, relative_error, worst_difference

ROOTS = {
    "exact": {},
    "reduce": {"kfac_approx": "reduce"},
    "adaptive": {"hessian_root": "adaptive", "captured_trace": 0.8},
    "mc-1": {"hessian_root": "mc"},
    "mc-3": {"hessian_root": "mc", "mc_samples": 3},
    "positions": {"position_fraction": 0.4},
    "all-at-once": {"hessian_root": "mc", "position_fraction": 0.3, "seed": 5},
}


def small_cnn():
    conv = nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular")
    grouped = nn.Conv2d(3, 3, 3, stride=2, groups=3)
    return net(conv, nn.ReLU(), grouped, nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def image_data(likelihood, n_data=13):
    model = small_cnn()
    with torch.no_grad():
        model[-1].weight *= 8.0  # confident predictions, so that columns differ in size
    return model, *data_for(model, likelihood, n_data, 1, 6, 6)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["softmax", "squares"])
@pytest.mark.parametrize("options", ROOTS.values(), ids=ROOTS)
def test_factors_do_not_depend_on_the_batches(likelihood, options):
    model, x, y = image_data(likelihood)
    whole = accumulate(model, [(x, y)], likelihood, **options)
    order = torch.randperm(len(x))
    for permutation in (torch.arange(len(x)), order):
        for size in (1, 5, 12):
            index = permutation.split(size)
            batches = [(x[i], y[i]) for i in index]
            state = accumulate(model, batches, likelihood, **options)
            assert worst_difference(state, whole) <= 1e-12
            assert (state.n_data, state.checksum) == (whole.n_data, whole.checksum)
            assert state.captured_trace == pytest.approx(whole.captured_trace, rel=1e-12)


def test_monte_carlo_factors_do_depend_on_the_seed():
    model, x, y = image_data(Categorical())
    one, other = (accumulate(model, [(x, y)], hessian_root="mc", seed=s) for s in (0, 1))
    assert worst_difference(one, other) > 1e-2


@pytest.mark.parametrize("options", [ROOTS["adaptive"], ROOTS["all-at-once"]])
def test_factors_do_not_depend_on_the_workers(options):
    model, x, y = image_data(Categorical())
    states = [
        accumulate(
            model, DataLoader(TensorDataset(x, y), batch_size=4, num_workers=workers), **options
        )
        for workers in (0, 2)
    ]
    assert worst_difference(*states) <= 1e-12


def test_data_are_counted():
    model, x, y = image_data(Categorical())
    loader = DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True)
    state = accumulate(model, loader)
    assert state.n_data == 10
    assert worst_difference(state, accumulate(model, [(x[:10], y[:10])])) <= 1e-12
    assert float(state.kron["0.weight"].n_shared) == 10 * 36


def test_states_of_two_halves_add_up():
    model, x, y = image_data(Categorical())
    whole = accumulate(model, [(x, y)])
    halves = [accumulate(model, [(x[part], y[part])]) for part in (slice(6), slice(6, None))]
    for name, kron in whole.kron.items():
        total = halves[0].kron[name] + halves[1].kron[name]
        assert relative_error(total.to_dense(), kron.to_dense()) <= 1e-12
