"""A weight per irreducible representation is a group convolution in another basis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.errors import ConfigError
from margeq.groups import P2, P4, P4M, PM, Z2, D
from margeq.groups.planar import stencil
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import GroupConv2d, IrrepGroupConv2d
from margeq.likelihoods import Categorical
from margeq.priors import GaussianPrior
from tests.oracles import F64, MeanPool, data_for, net, relative_error

SOFTMAX = Categorical()
PIXEL_GROUPS = pytest.mark.parametrize("group", [Z2, P2, P4, PM, P4M, D(2)], ids=repr)
SIZES = {Z2: [1], P2: [1, 1], P4: [1, 1, 2], PM: [1, 1], P4M: [1, 1, 1, 1, 4], D(2): [1, 1, 1, 1]}


def full(group, **options):
    layer = GroupConv2d(2, 2, 3, group=group, **{"padding": 1, "stride": 1} | options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def state_of(layer, batch, **options):
    return accumulate(layer, [batch], SOFTMAX, **options)


@PIXEL_GROUPS
@pytest.mark.parametrize("options", [{}, {"groups": 2, "bias": False, "dilation": 2}])
def test_the_function_is_that_of_the_full_layer_there_and_back(group, options):
    conv = full(group, **options).eval()
    layer = IrrepGroupConv2d.from_full(conv)
    x = torch.randn(2, 2, group.order, 6, 6, dtype=F64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0.0, atol=1e-12)
    back = layer.as_full()
    torch.testing.assert_close(back.weight, conv.weight, rtol=0.0, atol=1e-14)
    assert (back.window, back.training, layer.training) == (conv.window, False, False)
    torch.testing.assert_close(back(x), conv(x), rtol=0.0, atol=1e-12)
    assert back.weight.data_ptr() != conv.weight.data_ptr()
    squares = sum(part.square().sum() for part in layer.parts.values())
    torch.testing.assert_close(squares, conv.weight.square().sum(), rtol=1e-12, atol=0.0)


@PIXEL_GROUPS
def test_parts_are_moved_among_themselves(group):
    layer = IrrepGroupConv2d(1, 1, 3, group=group).double()
    assert [part.shape[2] for part in layer.parts.values()] == SIZES[group]
    weight = torch.randn(group.order, 9, dtype=F64)
    pixels = stencil(group, 3, 3)
    parts = layer.project(weight.flatten())
    torch.testing.assert_close(
        parts["weight_0"][0], parts_of_trivial(weight, group), rtol=0.0, atol=1e-12
    )
    for k in range(group.order):
        moved = layer.project(weight[group.relative[k]][:, pixels[k]].flatten())
        for name, part in parts.items():
            torch.testing.assert_close(moved[name].norm(), part.norm(), rtol=1e-12, atol=0.0)


def parts_of_trivial(weight, group):
    """Sum over all elements of the filter at h, moved back by h, over the root of the order."""
    pixels = stencil(group, 3, 3)[group.inverse]
    return weight.gather(1, pixels).sum(0) / group.order**0.5


@pytest.mark.parametrize("approx", ["expand", "reduce", "expand/reduce", "reduce/expand"])
@pytest.mark.parametrize("group", [P2, P4, P4M], ids=repr)
def test_evidence_under_one_precision_is_that_of_the_full_layer(group, approx):
    conv = full(group)
    tail = (nn.Tanh(), MeanPool(), nn.Linear(2, 3))
    whole, split = net(conv, *tail), net(IrrepGroupConv2d.from_full(conv), *tail)
    with torch.no_grad():  # the biases that both have
        split[0].bias.copy_(whole[0].bias)
    batch = data_for(whole, SOFTMAX, 4, 2, group.order, 4, 4)
    values = [
        log_marginal_likelihood(
            state_of(model, batch, kfac_approx=approx),
            GaussianPrior(model, prior_precision=2.0),
            SOFTMAX,
        )
        for model in (whole, split)
    ]
    assert float((values[0] - values[1]).abs()) < 1e-10 * float(values[0].abs())


def test_there_is_no_input_covariance_between_parts():
    conv = full(P4M)
    layer = IrrepGroupConv2d.from_full(conv)
    tail = (nn.Tanh(), MeanPool(), nn.Linear(2, 3))
    x, y = data_for(net(conv, *tail), SOFTMAX, 3, 2, 8, 4, 4)
    cov = state_of(net(conv, *tail), (x, y)).kron["0.weight"].input_cov[0].view(2, 72, 2, 72)
    one_side = layer.project(cov.movedim(1, -1))
    for name, rows in one_side.items():
        for other, block in layer.project(rows.movedim(2, -1)).items():
            if other != name:
                assert float(block.abs().max()) < 1e-12 * float(cov.abs().max())
    own = state_of(net(layer, *tail), (x, y)).kron["0.weight_4"].input_cov[0]
    block = layer.project(one_side["weight_4"].movedim(2, -1))["weight_4"]  # [c, d, m, x, n, z]
    assert relative_error(own, block.permute(0, 2, 3, 1, 4, 5).reshape_as(own)) < 1e-12


def test_each_part_has_a_precision_of_its_own():
    model = net(IrrepGroupConv2d(2, 2, 3, group=P4, padding=1), MeanPool(), nn.Linear(2, 3))
    state = state_of(model, data_for(model, SOFTMAX, 4, 2, 4, 4, 4))
    prior = GaussianPrior(model)
    names = [f"0.weight_{r}" for r in range(3)]
    assert len({prior.groups[name] for name in names}) == 3
    values = {float(log_marginal_likelihood(state, prior, SOFTMAX))}
    for name in names:
        precision = GaussianPrior(model)
        precision.log_prior_precision[precision.groups[name]] += 1.0
        values.add(float(log_marginal_likelihood(state, precision, SOFTMAX)))
    assert len(values) == 4


def test_filters_have_unit_gain_at_first():
    layer = IrrepGroupConv2d(16, 64, 3, group=P4M)
    whole = GroupConv2d(16, 64, 3, group=P4M)
    assert {layer.fan_in(name) for name in layer.parts} == {whole.fan_in("weight")}
    assert float(layer.weight.detach().square().sum((1, 2, 3)).mean()) == pytest.approx(
        1.0, abs=0.05
    )
    assert layer.span_dimension == whole.span_dimension


def test_filters_follow_the_weights():
    layer, x = IrrepGroupConv2d(1, 1, 3, group=P4), torch.randn(1, 1, 4, 5, 5)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(layer(x), before, rtol=0.0, atol=0.0)
        layer.get_parameter("weight_2").add_(1.0)
        after = layer(x)
    assert float((after - before).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "conv",
    [
        GroupConv2d(1, 1, 3, group=P4, separability="pointwise"),
        GroupConv2d(1, 1, 3, group=P4, filters="bilinear"),
        GroupConv2d(1, 1, 3, group=P4, separability="gc"),
        nn.Conv2d(1, 1, 3),
    ],
    ids=["pointwise", "bilinear", "separable", "plain"],
)
def test_other_layers_are_refused(conv):
    with pytest.raises(ConfigError, match="separability='full' and filters='pixels'"):
        IrrepGroupConv2d.from_full(conv)


def test_groups_that_move_pixels_between_pixels_are_refused():
    with pytest.raises(ConfigError, match="D\\(3\\)"):
        IrrepGroupConv2d(1, 1, 3, group=D(3))
