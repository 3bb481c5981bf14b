"""Layers given by two representations alone: their maps, and their curvature."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from margeq.curvature.exact import ggn
from margeq.curvature.io import rule_for
from margeq.errors import ConfigError, DataError
from margeq.groups import P4M, C, Representation, S, regular, rotations, standard, trivial
from margeq.laplace import accumulate
from margeq.layers import EquivariantLinear, Linear2d, ResidualPathways
from margeq.layers.pathways import span_dimension
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.training.function_scale import function_scale
from tests.oracles import F64, Lambda, data_for, errors, net, relative_error

EXACT, INEXACT = 1e-10, 1e-2
SOFTMAX, SQUARES = Categorical(), Gaussian()

ITEMS, SHIFTS = standard(S(4)), regular(C(5))
SIGN = Representation(S(4), torch.linalg.det(S(4).matrices)[:, None, None])
PAIRS = ITEMS * ITEMS


def layer_of(rep_in, rep_out, *channels, **options):
    return net(EquivariantLinear(rep_in, rep_out, *channels, **options))[0]


# --- the map

CASES = {
    "items": (ITEMS, ITEMS),
    "pairs": (PAIRS, ITEMS + trivial(S(4))),
    "sign": (ITEMS * SIGN, ITEMS + ITEMS * SIGN),
    "shifts": (SHIFTS, SHIFTS),
    "plane": (regular(P4M), standard(P4M) + trivial(P4M)),
    "vectors": (rotations(3) * rotations(3), rotations(3) + trivial(rotations(3))),
}


@pytest.mark.parametrize(("rep_in", "rep_out"), CASES.values(), ids=CASES)
def test_the_layer_commutes_with_every_element(rep_in, rep_out):
    layer = layer_of(rep_in, rep_out, 2, 3)
    x = torch.randn(2, 2, rep_in.dim, dtype=F64)
    if isinstance(rep_in, Representation):
        pairs = zip(rep_in.matrices, rep_out.matrices, strict=True)
    else:
        generators = zip(rep_in.generators, rep_out.generators, strict=True)
        pairs = (tuple(map(torch.linalg.matrix_exp, pair)) for pair in generators)
    for g_in, g_out in pairs:
        torch.testing.assert_close(layer(x @ g_in.T), layer(x) @ g_out.T, rtol=0, atol=1e-10)


def test_on_items_it_is_the_deep_set_layer():
    layer = layer_of(ITEMS, ITEMS)
    x = torch.randn(7, 1, 4, dtype=F64)
    own, others = layer.weight[0, 0]
    scaled = own / 2 * x + others / 12**0.5 * (x.sum(-1, keepdim=True) - x)
    torch.testing.assert_close(layer(x), scaled + layer.bias.squeeze())


def test_on_shifts_it_is_a_circular_convolution():
    layer = layer_of(SHIFTS, SHIFTS, 2, 3, bias=False)
    x = torch.randn(4, 2, 5, dtype=F64)
    taps = layer.induced_weight().reshape(3, 5, 2, 5)[:, 0].contiguous()
    padded = nn.functional.pad(x, (0, 4), mode="circular")
    torch.testing.assert_close(layer(x), nn.functional.conv1d(padded, taps))


def test_inputs_may_be_flat_or_tensors():
    layer = layer_of(PAIRS, PAIRS, 2, 1)
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    assert torch.equal(layer(x), layer(x.flatten(1)))
    assert layer(x).shape == (3, 1, 16)


def test_the_bias_is_as_large_as_its_coefficient():
    layer = EquivariantLinear(ITEMS, PAIRS)
    assert layer.bias.shape == (1, 2)
    torch.testing.assert_close(layer.bias_basis.square().mean(1), torch.ones(2))
    torch.testing.assert_close(EquivariantLinear(ITEMS, ITEMS).bias_basis, torch.ones(1, 4))
    assert EquivariantLinear(rotations(3), rotations(3)).bias is None
    assert EquivariantLinear(ITEMS, ITEMS, bias=False).bias is None


def test_it_commutes_in_double_precision_after_single_precision():
    rep = rotations(3) * rotations(3)
    layer = EquivariantLinear(rep, rep)
    assert layer.basis.dtype == torch.float32
    turned = layer.half().double()
    turn = torch.linalg.matrix_exp(rep.generators[0])
    x = torch.randn(2, 1, 9, dtype=F64)
    torch.testing.assert_close(turned(x @ turn.T), turned(x) @ turn.T, rtol=0, atol=1e-12)


def test_a_meta_layer_gets_its_basis_on_the_real_device():
    with torch.device("meta"):
        layer = EquivariantLinear(ITEMS, ITEMS, 2, 3)
    assert layer.basis.is_meta
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(EquivariantLinear(ITEMS, ITEMS, 2, 3).state_dict())
    assert layer(torch.zeros(1, 2, 4)).shape == (1, 3, 4)
    assert float(layer.basis.square().sum()) == pytest.approx(2.0)


def test_only_weights_are_state():
    assert set(EquivariantLinear(ITEMS, ITEMS).state_dict()) == {"weight", "bias"}


# --- sizes


@pytest.mark.parametrize(("rep_in", "rep_out"), CASES.values(), ids=CASES)
def test_outputs_start_with_unit_variance(rep_in, rep_out):
    layer = EquivariantLinear(rep_in, rep_out, 3, 2000).double()
    x = torch.randn(50, 3, rep_in.dim, dtype=F64)
    assert float(layer(x).detach().square().mean()) == pytest.approx(1.0, rel=0.1)
    induced = EquivariantLinear(rep_in, rep_out, 3, 1).basis.square().sum() * 3 / rep_out.dim
    assert layer.fan_in("weight") == pytest.approx(float(induced))


def test_function_scale_uses_it():
    model = nn.Sequential(EquivariantLinear(PAIRS, ITEMS, 3, 2), nn.ReLU(), nn.Flatten())
    found = function_scale(model, named_weights(model), torch.randn(2, 3, 16)).precision
    assert found == {"0.weight": pytest.approx(3 * 5 / 4 / 2), "0.bias": 1.0}


def test_it_is_more_constrained_than_a_dense_map():
    paths = {"fc": Linear2d(2, 3, 4, 4), "sharing": EquivariantLinear(ITEMS, ITEMS, 2, 3)}
    assert span_dimension(paths["sharing"]) == 12
    assert ResidualPathways(paths).less_constrained() == ("fc",)


# --- what cannot work


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EquivariantLinear(SIGN, trivial(S(4))), "only the zero map"),
        (lambda: EquivariantLinear(rotations(3), trivial(rotations(3))), "only the zero map"),
        (lambda: EquivariantLinear(S(4), ITEMS), r"rep_in=S\(4\): use a Representation"),
        (lambda: EquivariantLinear(ITEMS, 4), "rep_out=4: use a Representation"),
        (lambda: EquivariantLinear(ITEMS, SHIFTS), r"two groups, S\(4\) and C\(5\)"),
        (lambda: EquivariantLinear(ITEMS, rotations(3)), "two Representation of one group"),
        (lambda: EquivariantLinear(ITEMS, ITEMS, 0, 1), "positive"),
        (lambda: EquivariantLinear(ITEMS, ITEMS, 1, 2.5), "positive"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_wrong_inputs_are_refused():
    with pytest.raises(DataError, match=r"EquivariantLinear maps inputs \[n, 2, 4\], got \(1, 4\)"):
        EquivariantLinear(ITEMS, ITEMS, 2, 3)(torch.zeros(1, 4))


# --- curvature

MIX = partial(EquivariantLinear, rotations(3), rotations(3))  # the identity times a channel matrix


def assert_exact(found):
    assert max(found.values()) <= EXACT, found


@pytest.mark.parametrize("likelihood", [SOFTMAX, SQUARES], ids=["softmax", "squares"])
@pytest.mark.parametrize(("rep_in", "rep_out"), CASES.values(), ids=CASES)
def test_dense_curvature_is_the_ggn(rep_in, rep_out, likelihood):
    model = net(
        EquivariantLinear(rep_in, rep_out, 2, 2), nn.Tanh(), EquivariantLinear(rep_out, rep_out, 2),
        nn.Flatten(), nn.Linear(rep_out.dim, 3),
    )  # fmt: skip
    batch = data_for(model, likelihood, 4, 2, rep_in.dim)
    found = accumulate(model, [batch], likelihood, curvature="full").curvature.matrix
    assert relative_error(found, ggn(model, [batch], likelihood)) <= EXACT


def test_biases_are_exact_for_several_data_and_invariant_vectors():
    model = net(EquivariantLinear(ITEMS, PAIRS, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    found = errors(model, data_for(model, SOFTMAX, 5, 1, 4), SOFTMAX)
    assert found["0.bias"] <= EXACT
    assert found["0.weight"] > INEXACT


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("rep", [regular(P4M), ITEMS * ITEMS], ids=["functions", "pairs"])
def test_one_output_entry_one_datum_any_net(rep, approx):
    one = trivial(rep.group)
    head = (nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    model = net(EquivariantLinear(rep, one, 2, 4), *head)
    batch = data_for(model, SOFTMAX, 1, 2, rep.dim)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx=approx))
    several = data_for(model, SOFTMAX, 6, 2, rep.dim)
    assert errors(model, several, SOFTMAX)["0.weight"] > INEXACT


def test_squares_at_each_entry_of_a_deep_linear_net_are_exact_in_expand_only():
    vector = rotations(3)
    model = net(EquivariantLinear(vector * vector, vector, 2, 3), MIX(3, 2), nn.Flatten())
    batch = data_for(model, SQUARES, 5, 2, 9)
    assert_exact(errors(model, batch, SQUARES))
    assert errors(model, batch, SQUARES, kfac_approx="reduce")["0.weight"] > INEXACT


def test_a_direct_mean_over_entries_is_exact_in_reduce_only():
    mean = Lambda(lambda y: y.mean(2))
    model = net(EquivariantLinear(PAIRS, ITEMS, 2, 3), mean, nn.Linear(3, 5), nn.Tanh())
    model = net(*model, nn.Linear(5, 3))
    batch = data_for(model, SOFTMAX, 1, 2, 16)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert errors(model, batch, SOFTMAX)["0.weight"] > INEXACT


def test_a_sample_of_the_output_entries_reads_only_their_rows():
    layer, x = layer_of(PAIRS, ITEMS, 2, 3), torch.randn(3, 2, 16, dtype=F64)
    rule = rule_for(EquivariantLinear)
    positions = torch.tensor([[3, 0], [1, 2], [0, 1]])
    every = rule.inputs(layer, x, lambda _: None)["weight"]
    sampled = rule.inputs(layer, x, lambda _: positions)["weight"]
    assert sampled.n_positions == every.n_positions == 4
    assert torch.equal(sampled.rows, torch.stack([every.rows[n, positions[n]] for n in range(3)]))


def test_empty_batches_have_empty_outputs():
    layer = EquivariantLinear(PAIRS, ITEMS, 2, 3)
    assert layer(torch.zeros(0, 2, 16)).shape == (0, 3, 4)
    assert layer(torch.zeros(0, 32)).shape == (0, 3, 4)
