"""Which values of ``kfac_approx`` say the same, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.laplace import accumulate
from tests.oracles import F64, net


def flavour(approx, curvature="kfac"):
    options = KfacOptions(kfac_approx=approx, curvature=curvature)
    return options.flavour("Categorical", "all", 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, "expand"),
        ({"": "reduce"}, "reduce"),
        ({"0": "expand"}, "expand"),
        ({"": "reduce", "0": "reduce"}, "reduce"),
        ({"": "expand", "0": "reduce"}, {"0": "reduce"}),
        ({"0": "reduce", "0.weight": "reduce"}, {"0": "reduce"}),
        ({"1": "reduce", "0": "reduce"}, {"0": "reduce", "1": "reduce"}),
    ],
)
def test_values_that_say_the_same_have_one_flavour(one, other):
    assert flavour(one) == flavour(other)
    options = [KfacOptions(kfac_approx=approx) for approx in (one, other)]
    for name in ("0.weight", "0.bias", "1.weight", "2"):
        assert options[0].reduces(name) == options[1].reduces(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"0": "reduce"}, "reduce"),
        ({"0": "reduce"}, "expand"),
        ({"0": "reduce", "0.1": "expand", "0.1.2": "reduce"}, {"0": "reduce"}),
        ({"0": "reduce", "0.1": "expand"}, {"0": "reduce"}),
        ({"": "reduce", "0": "expand"}, "reduce"),
        ({"1": "reduce"}, {"10": "reduce"}),
    ],
)
def test_values_that_differ_have_flavours_that_differ(one, other):
    assert flavour(one) != flavour(other)


def test_a_default_that_is_not_spelled_out_is_not_in_the_flavour():
    assert flavour({"": "expand", "0": "reduce"}).kfac_approx == "[('0', 'reduce')]"


def test_an_empty_mapping_is_the_default():
    model = net(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    batch = (torch.randn(5, 1, 3, 3, dtype=F64), torch.tensor([0, 1, 0, 1, 1]))
    empty, plain = accumulate(model, [batch], kfac_approx={}), accumulate(model, [batch])
    assert empty.flavour == plain.flavour
    for name, block in plain.kron.items():
        assert torch.equal(empty.kron[name].input_cov, block.input_cov)


@pytest.mark.parametrize("approx", [{}, {"": "expand"}, {"0": "expand"}])
def test_a_default_that_is_spelled_out_goes_with_flavours_without_factors(approx):
    assert flavour(approx, "diag") == flavour("expand", "diag")


@pytest.mark.parametrize("approx", [["reduce"], None, {"0": ["reduce"]}, {"": "both"}])
def test_what_is_no_approximation_is_refused(approx):
    with pytest.raises(ConfigError, match="kfac_approx="):
        KfacOptions(kfac_approx=approx)
