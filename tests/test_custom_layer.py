"""A layer type written from CONTRIBUTING alone keeps the contract; wrong rules do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from margeq.curvature import LinearIO, register_kfac_rule
from margeq.errors import ConfigError
from margeq.testing import ContractError, LayerCase, check_layer

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def example():
    """The names that the code blocks of "Adding a layer type" define."""
    section = CONTRIBUTING.read_text().split("## Adding a layer type")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"__name__": "contributing"}
    exec("\n".join(blocks), names)
    return names


def test_the_example_of_contributing_keeps_the_contract(example):
    check_layer(example["case"])


def test_a_layer_can_be_checked_without_a_case(example):
    check_layer(example["CirculantLinear"](4), torch.zeros(3, 4), shared=("weight",))


def test_undeclared_sharing_breaks_the_contract(example):
    with pytest.raises(ContractError, match=r"single datum.*'weight'.*several positions"):
        check_layer(example["CirculantLinear"](4), torch.zeros(3, 4))


class Diagonal(nn.Module):
    """y[n,b] = scale[b] x[n,b] + bias[b]: as many blocks as features."""

    def __init__(self, size=4):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.scale * x + self.bias

    def induced_weight(self):
        return torch.diag(self.scale)


def diagonal_rule(layer, x, grad_y):
    inputs, grads = x[:, None, :, None], grad_y[:, :, None, :, None]
    ones = torch.ones_like(inputs)
    return {"scale": LinearIO(inputs, grads), "bias": LinearIO(ones, grads, is_bias=True)}


def reversed_inputs(layer, x, grad_y):
    return diagonal_rule(layer, x.flip(1), grad_y)


def summed_over_data(layer, x, grad_y):
    return diagonal_rule(layer, x.mean(0, keepdim=True).expand_as(x), grad_y)


def no_bias(layer, x, grad_y):
    return {"scale": diagonal_rule(layer, x, grad_y)["scale"]}


def without_columns(layer, x, grad_y):
    return diagonal_rule(layer, x, grad_y.sum(0, keepdim=True))


def positions_for_blocks(layer, x, grad_y):
    io = diagonal_rule(layer, x, grad_y)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    spread = LinearIO((eye * x[:, :, None])[:, :, None], io["scale"].output_grads.mT)
    return {**io, "scale": LinearIO(spread.inputs, grad_y[:, :, :, None, None])}


def unmarked_bias(layer, x, grad_y):
    io = positions_for_blocks(layer, torch.ones_like(x), grad_y)["scale"]
    return {**diagonal_rule(layer, x, grad_y), "bias": io}


def as_layer_type(rule):
    kind = type("Diagonal", (Diagonal,), {})
    register_kfac_rule(kind)(rule)
    return LayerCase("my layer", kind, (3, 4))


def test_a_rule_with_blocks_keeps_the_contract():
    check_layer(as_layer_type(diagonal_rule))


def test_without_a_rule_parameters_are_bare_and_exact():
    check_layer(LayerCase("my layer", type("Diagonal", (Diagonal,), {}), (3, 4)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (reversed_inputs, "'Per-sample gradients.*gradient of 'scale' at datum 0 differs by"),
        (summed_over_data, "'Per-sample gradients.*gradient of 'scale' at datum 0 differs by"),
        (without_columns, "'Per-sample gradients.*IndexError"),
        (no_bias, "'Per-sample gradients.*the rule says nothing about 'bias'"),
        (positions_for_blocks, "'The curvature of a single datum.*curvature of 'scale'"),
        (unmarked_bias, "'The curvature of a single datum.*curvature of 'bias'"),
    ],
)
def test_a_wrong_rule_breaks_the_contract(rule, message):
    with pytest.raises(
        ContractError, match=r"my layer \(Diagonal\) breaks the contract " + message
    ):
        check_layer(as_layer_type(rule))


class NotLinear(Diagonal):
    def forward(self, x):
        return super().forward(x.square())


class WrongTwin(Diagonal):
    def induced_weight(self):
        return 2 * super().induced_weight()


class Casts(Diagonal):
    def forward(self, x):
        return super().forward(x).double()


class LooksAtTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * (x - x.mean(0))


class ForgetsState(Diagonal):
    def __init__(self):
        super().__init__()
        self.gain = float(torch.rand(()))

    def forward(self, x):
        return self.gain * super().forward(x)

    def induced_weight(self):
        return self.gain * super().induced_weight()


def squared_rule(layer, x, grad_y):
    return diagonal_rule(layer, x.square(), grad_y)


def gain_rule(layer, x, grad_y):
    return diagonal_rule(layer, x, layer.gain * grad_y)


def centred_rule(layer, x, grad_y):
    return {"scale": diagonal_rule(layer, x - x.mean(0), grad_y)["scale"]}


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (NotLinear, squared_rule, "'The layer is linear"),
        (WrongTwin, diagonal_rule, r"'The layer is linear.*induced_weight\(\) @ x differs"),
        (Casts, diagonal_rule, "float32 input gives torch.float64 output"),
        (LooksAtTheBatch, centred_rule, "'Per-sample gradients"),
        (ForgetsState, gain_rule, "'State dict and deepcopy.*output after load_state_dict"),
    ],
)
def test_a_wrong_layer_breaks_the_contract(kind, rule, message):
    register_kfac_rule(kind)(rule)
    with pytest.raises(ContractError, match=message):
        check_layer(LayerCase("my layer", kind, (3, 4)))


def test_a_layer_that_is_not_linear_may_say_so():
    register_kfac_rule(NotLinear)(squared_rule)
    check_layer(LayerCase("my layer", NotLinear, (3, 4), linear=False))


def test_a_layer_without_a_name_of_its_own_is_named_once(example):
    with pytest.raises(ContractError, match=r"^CirculantLinear breaks the contract"):
        check_layer(example["CirculantLinear"](4), torch.zeros(3, 4))


def test_check_layer_needs_an_input_of_two_data():
    with pytest.raises(ConfigError, match="pass an input"):
        check_layer(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="at least 2 data"):
        check_layer(nn.Linear(2, 2), torch.zeros(1, 2))


class Warped(nn.Module):
    """y = (x * gain(eta)) W, with a declared hyperparameter."""

    hyperparameter_names = ("log_gain",)

    def __init__(self, rank=4):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(rank))
        self.log_gain = nn.Parameter(torch.zeros(rank))

    def warped(self, x):
        return x * self.log_gain.exp()

    def forward(self, x):
        return self.scale * self.warped(x)


class Cut(Warped):
    def warped(self, x):
        return x * self.log_gain.detach().exp()


def warped_rule(layer, x, grad_y):
    return {"scale": diagonal_rule(layer, layer.warped(x), grad_y)["scale"]}


def rule_that_cuts(layer, x, grad_y):
    return {"scale": diagonal_rule(layer, layer.warped(x).detach(), grad_y)["scale"]}


def test_a_layer_with_a_hyperparameter_keeps_the_contract():
    register_kfac_rule(Warped)(warped_rule)
    check_layer(LayerCase("my layer", Warped, (3, 4)))


@pytest.mark.parametrize("broken", ["layer", "rule"])
def test_a_detached_hyperparameter_breaks_the_contract(broken):
    kind = type("Broken", (Cut if broken == "layer" else Warped,), {})
    register_kfac_rule(kind)(warped_rule if broken == "layer" else rule_that_cuts)
    with pytest.raises(ContractError, match=r"'The evidence gradient of every .*'log_gain' along"):
        check_layer(LayerCase("my layer", kind, (3, 4)))
