"""Every curvature back-end against the exact GGN, with the defects of the neighbours in sight."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from margeq.batches import read_batches
from margeq.curvature import exact
from margeq.data import load_digits
from margeq.errors import ConfigError, DataError
from margeq.layers import FactoredLinear2d, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.testing import crosscheck
from margeq.testing.exact_sample import exact_sample, sampled_entries
from tests.oracles import F64, data_for, dense_blocks, net

T = {"0.weight": 64, "2.weight": 16}
"""Convolution -> its number of output positions."""


@pytest.fixture(scope="module")
def trained():
    """A strided CNN on 256 digits, 25 epochs: 99 % accuracy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = load_digits()
        images, labels = images[:256, None], labels[:256]
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(),
            nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(96, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(25):
            for x, y in zip(images.split(64), labels.split(64), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        model.zero_grad()
    return model, list(zip(images.split(64), labels.split(64), strict=True))


@pytest.fixture(scope="module")
def table(trained, laplace_torch):
    torch.manual_seed(0)  # of ASDL's labels, which has no seed of its own
    return crosscheck(*trained)


def test_sizes_and_signs_of_the_defects(table):
    """BackPACK's T, ASDL's 1 / n, exact biases, and the order of expand and reduce."""
    expand, reduce, ekfac = (table[f"margeq {name}"] for name in ("expand", "reduce", "ekfac"))
    for name, positions in T.items():
        assert table["BackPACK"].ratios[name] == pytest.approx(positions, rel=0.2)
        assert reduce.ratios[name] < 0.4 < 0.55 < expand.ratios[name] < 1.2
    for name in ("0.bias", "2.bias", "5.bias"):
        assert expand.ratios[name] == pytest.approx(1.0, abs=1e-5)
        assert expand.errors[name] < 1e-5
    for name in ("0.bias", "2.bias"):
        assert 0.5 < table["curvlinops"].ratios[name] < 1.3
        assert table["curvlinops"].errors[name] > 0.05
    for name, ratio in table["ASDL mc-10"].ratios.items():
        assert 0.08 <= ratio / table["ASDL"].ratios[name] <= 0.12
    for name in ("5.weight", "5.bias"):
        assert 0.08 <= table["ASDL mc-10"].ratios[name] <= 0.12
    for name, ratio in ekfac.ratios.items():
        assert ratio == pytest.approx(1.0, abs=1e-5), name
    mc = table["margeq mc-10"]
    for name, ratio in mc.ratios.items():
        assert ratio / expand.ratios[name] == pytest.approx(1.0, abs=0.25)


def test_back_ends_that_agree(table):
    for one, other in (("curvlinops", "ASDL"), ("curvlinops reduce", "margeq reduce")):
        for name, ratio in table[one].ratios.items():
            assert ratio == pytest.approx(table[other].ratios[name], rel=1e-4)
    for name in ("0.weight", "2.weight", "5.weight", "5.bias"):
        own, other = table["margeq expand"], table["curvlinops"]
        assert own.ratios[name] == pytest.approx(other.ratios[name], rel=1e-4)
        assert own.errors[name] == pytest.approx(other.errors[name], rel=1e-3, abs=1e-5)
    for name in ("margeq by BackPACK", "margeq by ASDL"):
        for tensor, ratio in table[name].ratios.items():
            assert ratio == pytest.approx(table["margeq expand"].ratios[tensor], rel=1e-3)


def test_order_of_the_log_determinants(table):
    exact_value = table.log_determinant
    values = {row.backend: row.log_determinant for row in table.rows}
    # a diagonal in any orthogonal basis overestimates the determinant of a block (Hadamard)
    assert exact_value < values["margeq ekfac"]
    assert values["margeq reduce"] < values["margeq expand"] < values["BackPACK"]
    assert values["ASDL mc-10"] < 0.7 * values["ASDL"]


def test_table_reads(table):
    text = str(table)
    assert "exact GGN of 256 data" in text
    assert "up to 64 weights" in text
    assert len(text.splitlines()) == 3 + len(table.rows)
    for row in table.rows:
        assert row.backend in text
        assert f"{row.log_determinant:.2f}" in text
    with pytest.raises(ConfigError, match="no back-end is called 'other'"):
        table["other"]


def test_nothing_is_changed(trained, laplace_torch):
    model, batches = trained
    state, flags = deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = set(vars(model[0]))
    crosscheck(model, batches, max_data=8)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert set(vars(model[0])) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()])
def test_exact_sample_is_the_dense_ggn(likelihood):
    model = net(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    batch = data_for(model, likelihood, 5, 2, 3, 3)
    places = sampled_entries(named_weights(model), 7, seed=3)
    batches = read_batches([batch], torch.device("cpu"))
    found = exact_sample(model, batches, likelihood, places)
    for name, block in dense_blocks(model, batch, likelihood).items():
        chosen = places[name]
        assert len(chosen) == min(7, named_weights(model)[name].numel())
        torch.testing.assert_close(found[name].block, block[chosen][:, chosen])
        assert found[name].trace == pytest.approx(float(block.trace()))


def test_regression_and_margeq_layers_with_reasons(laplace_torch):
    """What the neighbours cannot do is listed, never left out and never truncated."""
    model = net(
        SparseConv2d(2, 3, 3, padding=1), nn.Tanh(),
        FactoredLinear2d(3, 2, (3, 3), (2, 2)), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3),
    )  # fmt: skip
    batch = data_for(model, Gaussian(), 12, 2, 3, 3)
    table = crosscheck(model, [batch], "regression")
    for name in ("margeq expand", "margeq reduce", "margeq ekfac", "margeq mc-10"):
        assert not table[name].reason
    for name in ("curvlinops", "BackPACK", "ASDL"):
        assert table[name].reason, name
        assert not table[name].ratios
        assert table[name].reason in str(table)
    for ratio in table["margeq ekfac"].ratios.values():
        assert ratio == pytest.approx(1.0, abs=1e-9)


def test_silent_truncation_is_called_by_its_name(laplace_torch):
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3))
    table = crosscheck(model, [data_for(model, Categorical(), 12, 4)])
    assert "silently leaves out 3.weight, 3.bias" in table["ASDL"].reason


def test_missing_library_is_listed(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    table = crosscheck(*trained, max_data=4)
    assert "pip install curvlinops-for-pytorch" in table["curvlinops"].reason
    assert not table["margeq expand"].reason


def test_largest_number_of_data_and_one_sample():
    model = net(nn.Linear(4, 3))
    x, y = data_for(model, Categorical(), 12, 4)
    whole = crosscheck(model, [(x[:5], y[:5]), (x[5:7], y[5:7])])
    cut = crosscheck(model, [(x[:5], y[:5]), (x[5:], y[5:])], max_data=7)
    assert cut.n_data == whole.n_data == 7
    assert cut.log_determinant == pytest.approx(whole.log_determinant)
    assert cut["margeq expand"] == whole["margeq expand"]
    matrix = exact.ggn(model, [(x[:7], y[:7])], Categorical())
    blocks = [matrix[:12, :12], matrix[12:, 12:]]
    expected = sum(float(torch.logdet(torch.eye(len(b), dtype=F64) + b)) for b in blocks)
    assert cut.log_determinant == pytest.approx(expected)


def test_refusals():
    model, batch = nn.Linear(2, 2), (torch.zeros(2, 2), torch.tensor([0, 1]))
    for option in ("max_data", "sample_size", "prior_precision"):
        with pytest.raises(ConfigError, match=f"{option}=0"):
            crosscheck(model, [batch], **{option: 0})
    with pytest.raises(DataError, match="0 samples"):
        crosscheck(model, [])
