"""Where a Kronecker block has to be exact, and where it must not be.

The reference is the dense GGN from autograd Jacobians; float64 throughout. Exact means 1e-10,
inexact more than 1 %, both relative in Frobenius norm.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.curvature.kron import BlockKron
from margeq.laplace import accumulate
from margeq.layers import FactoredLinear2d, Linear2d, SparseConv2d, SparseFactoredLinear2d
from margeq.likelihoods import Categorical, Gaussian
from tests.oracles import Lambda, MeanPool, data_for, dense_blocks, errors, net, relative_error

EXACT, INEXACT = 1e-10, 1e-2
SOFTMAX, SQUARES = Categorical(), Gaussian()
LIKELIHOODS = pytest.mark.parametrize("likelihood", [SOFTMAX, SQUARES], ids=["softmax", "squares"])
APPROXIMATIONS = pytest.mark.parametrize("approx", ["expand", "reduce"])


def errors_of(model, likelihood, *shape, **options):
    return errors(model, data_for(model, likelihood, *shape), likelihood, **options)


def biases(found):
    return {name: error for name, error in found.items() if "bias" in name}


def assert_exact(found):
    assert found
    assert max(found.values()) <= EXACT, found


def assert_biases_exact(found):
    assert_exact(biases(found))


# --- linear maps


@LIKELIHOODS
def test_linear_one_datum_any_net(likelihood):
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert_exact(errors_of(model, likelihood, 1, 5))


def test_linear_maps_on_feature_maps_one_datum():
    model = net(Linear2d(2, 3, (2, 3), 2), nn.Tanh(), Linear2d(3, 2, 2, 2), nn.Flatten())
    assert_exact(errors_of(model, SOFTMAX, 1, 2, 2, 3))


def test_deep_linear_net_with_squares():
    model = net(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    assert_exact(errors_of(model, SQUARES, 7, 5))


@pytest.mark.parametrize(
    ("activation", "likelihood"),
    [(nn.Identity(), SOFTMAX), (nn.ReLU(), SQUARES)],
    ids=["softmax", "relu"],
)
def test_linear_several_data_is_inexact_otherwise(activation, likelihood):
    found = errors_of(net(nn.Linear(5, 4), activation, nn.Linear(4, 3)), likelihood, 7, 5)
    assert found["0.weight"] > INEXACT
    assert_biases_exact(found)


# --- convolutions with one output position


def one_position(groups=1, c=2, d=4, mode="circular"):
    # 3x3 map, padded by one, stride 3: one patch, five of its nine entries from the padding
    return nn.Conv2d(c, d, 3, padding=1, stride=3, padding_mode=mode, groups=groups)


@APPROXIMATIONS
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_conv_one_position_one_datum(approx, groups):
    model = net(one_position(groups), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 2, 3, 3, kfac_approx=approx))


@APPROXIMATIONS
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_conv_one_position_deep_linear_with_squares(approx, groups):
    model = net(one_position(groups), nn.Flatten(), nn.Linear(4, 3))
    assert_exact(errors_of(model, SQUARES, 5, 2, 3, 3, kfac_approx=approx))


@APPROXIMATIONS
def test_depthwise_one_position_one_datum(approx):
    model = net(one_position(groups=3, c=3, d=6), nn.Flatten(), nn.ReLU(), nn.Linear(6, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 3, 3, 3, kfac_approx=approx))


def test_grouped_one_position_several_data_is_inexact():
    model = net(one_position(groups=2), nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
    found = errors_of(model, SOFTMAX, 6, 2, 3, 3)
    assert found["0.weight"] > INEXACT
    assert_biases_exact(found)


@pytest.mark.parametrize(("kind", "n_axes"), [(nn.Conv1d, 1), (nn.Conv3d, 3)])
def test_conv_of_other_dimensions_one_position_one_datum(kind, n_axes):
    conv = kind(2, 3, 3, padding=1, stride=3, padding_mode="circular")
    model = net(conv, nn.Flatten(), nn.Tanh(), nn.Linear(3, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 2, *[3] * n_axes))


# --- convolutions with several positions


def conv(c=2, d=3, size=3, **options):
    options = {"padding": size // 2, "padding_mode": "circular"} | options
    return nn.Conv2d(c, d, size, **options)


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_conv_with_direct_mean_one_datum_is_exact_in_reduce_only(groups):
    head = (MeanPool(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = net(conv(d=4, groups=groups), *head)
    batch = data_for(model, SOFTMAX, 1, 2, 4, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    expand = errors(model, batch, SOFTMAX, kfac_approx="expand")
    assert expand["0.weight"] > INEXACT
    assert_biases_exact(expand)


def test_conv_with_direct_mean_deep_linear_is_exact_in_reduce_only():
    model = net(conv(), MeanPool(), nn.Linear(3, 3))
    batch = data_for(model, SQUARES, 5, 2, 4, 4)
    assert_exact(errors(model, batch, SQUARES, kfac_approx="reduce"))
    assert errors(model, batch, SQUARES, kfac_approx="expand")["0.weight"] > INEXACT


def test_conv_with_squares_at_each_position_is_exact_in_expand_only():
    model = net(conv(), conv(3, 2, 1))
    batch = data_for(model, SQUARES, 5, 2, 3, 3)
    assert_exact(errors(model, batch, SQUARES, kfac_approx="expand"))
    reduce = errors(model, batch, SQUARES, kfac_approx="reduce")
    assert min(reduce["0.weight"], reduce["1.weight"]) > INEXACT
    assert_biases_exact(reduce)


def test_conv_before_relu_with_squares_at_each_position_is_inexact():
    found = errors_of(net(conv(), nn.ReLU(), conv(3, 2, 1)), SQUARES, 5, 2, 3, 3)
    assert found["0.weight"] > INEXACT
    assert found["2.weight"] <= EXACT
    assert_biases_exact(found)


@APPROXIMATIONS
@pytest.mark.parametrize("head", ["relu-mean", "flatten"])
def test_conv_before_relu_and_mean_or_a_dense_head_is_inexact(approx, head):
    tail = (nn.ReLU(), MeanPool(), nn.Linear(3, 3))
    if head == "flatten":
        tail = (nn.Flatten(), nn.Linear(48, 3))
    found = errors_of(net(conv(), *tail), SOFTMAX, 1, 2, 4, 4, kfac_approx=approx)
    assert found["0.weight"] > INEXACT
    assert_biases_exact(found)


def test_bias_approximation_of_other_libraries_is_inexact():
    model = net(conv(), nn.ReLU(), MeanPool(), nn.Linear(3, 3))
    found = errors_of(model, SOFTMAX, 4, 2, 4, 4, bias_approx="expand")
    assert found["0.bias"] > INEXACT


def test_linear_over_positions_with_direct_mean_is_exact_in_reduce_only():
    mean = Lambda(lambda y: y.mean(1))
    model = net(nn.Linear(4, 3), mean, nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = data_for(model, SOFTMAX, 1, 6, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    expand = errors(model, batch, SOFTMAX, kfac_approx="expand")
    assert expand["0.weight"] > INEXACT
    assert_biases_exact(expand)


# --- F-FC: exact on the (c, c) blocks of U and the (d, d) blocks of V


def factored(c=3, d=4):
    return FactoredLinear2d(c, d, (2, 3), (2, 2))


@LIKELIHOODS
def test_f_fc_one_datum_any_net(likelihood):
    model = net(factored(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    assert_exact(errors_of(model, likelihood, 1, 3, 2, 3))


def test_f_fc_deep_linear_with_squares():
    model = net(factored(), nn.Flatten(), nn.Linear(16, 5))
    assert_exact(errors_of(model, SQUARES, 9, 3, 2, 3))


def test_f_fc_several_data_is_inexact_otherwise():
    model = net(factored(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    found = errors_of(model, SOFTMAX, 9, 3, 2, 3)
    assert min(found["0.weight_u"], found["0.weight_v"]) > INEXACT
    assert_biases_exact(found)


@pytest.mark.parametrize("name", ["0.weight_u", "0.weight_v"])
def test_f_fc_with_averaged_gradient_covariance_is_inexact(name):
    """The paper's own form; and without the mask, the blocks that the form leaves out."""
    model = net(factored(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batch = data_for(model, SOFTMAX, 1, 3, 2, 3)
    kron = accumulate(model, [batch], SOFTMAX).kron[name]
    dense = dense_blocks(model, batch, SOFTMAX)[name]
    averaged = kron.grad_cov.mean(0, keepdim=True).expand_as(kron.grad_cov)
    paper = BlockKron(averaged, kron.input_cov, kron.n_shared, kron.layout)
    assert relative_error(paper.to_dense(), kron.to_dense()) > INEXACT
    assert relative_error(kron.to_dense(), dense) > INEXACT


# --- S-CONV and S-FC: the same blocks between anchors

LENGTHSCALES = pytest.mark.parametrize("per_filter", [False, True], ids=["layer", "filter"])


def sparse_one_position(per_filter, groups=1):
    options = {"padding_mode": "circular", "groups": groups, "per_filter": per_filter}
    return SparseConv2d(2, 4, 3, padding=1, stride=3, **options)


def sparse_factored(per_filter=False):
    return SparseFactoredLinear2d(3, 4, (2, 3), (2, 2), anchors=(4, 3), per_filter=per_filter)


@APPROXIMATIONS
@LENGTHSCALES
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_s_conv_one_position(approx, per_filter, groups):
    linear = net(sparse_one_position(per_filter, groups), nn.Flatten(), nn.Linear(4, 3))
    assert_exact(errors_of(linear, SQUARES, 5, 2, 3, 3, kfac_approx=approx))
    model = net(*linear, nn.Tanh(), nn.Linear(3, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 2, 3, 3, kfac_approx=approx))


@APPROXIMATIONS
def test_s_conv_several_data_is_inexact_otherwise(approx):
    model = net(sparse_one_position(False), nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
    found = errors_of(model, SOFTMAX, 5, 2, 3, 3, kfac_approx=approx)
    assert found["0.weight"] > INEXACT
    assert_biases_exact(found)


def test_s_conv_with_direct_mean_one_datum_is_exact_in_reduce_only():
    head = (MeanPool(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model = net(SparseConv2d(2, 3, 3, padding=1, padding_mode="circular"), *head)
    batch = data_for(model, SOFTMAX, 1, 2, 4, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert errors(model, batch, SOFTMAX, kfac_approx="expand")["0.weight"] > INEXACT


@LENGTHSCALES
def test_s_fc_one_datum_any_net_or_deep_linear_with_squares(per_filter):
    layer = sparse_factored(per_filter)
    linear = net(layer, nn.Flatten(), nn.Linear(16, 5))
    assert_exact(errors_of(linear, SQUARES, 9, 3, 2, 3))
    assert_exact(errors_of(net(*linear, nn.Tanh(), nn.Linear(5, 3)), SOFTMAX, 1, 3, 2, 3))


def test_s_fc_several_data_is_inexact_otherwise():
    model = net(sparse_factored(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    found = errors_of(model, SOFTMAX, 9, 3, 2, 3)
    assert min(found["0.weight_u"], found["0.weight_v"]) > INEXACT
    assert_biases_exact(found)


# --- padding: the neighbouring libraries take zero-padded patches for every mode


def zero_padded(model, x, kron):
    """The block with the input covariance of zero-padded patches."""
    conv = model[0]
    patches = nn.functional.unfold(x, conv.kernel_size, padding=1, stride=conv.stride)[..., 0]
    return BlockKron(kron.grad_cov, (patches.mT @ patches)[None], kron.n_shared).to_dense()


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize(("likelihood", "n_data"), [(SOFTMAX, 1), (SQUARES, 6)])
def test_padding_mode_enters_the_patches(mode, likelihood, n_data):
    model = net(one_position(mode=mode), nn.Flatten())
    batch = data_for(model, likelihood, n_data, 2, 3, 3)
    kron = accumulate(model, [batch], likelihood).kron["0.weight"]
    dense = dense_blocks(model, batch, likelihood)["0.weight"]
    assert relative_error(kron.to_dense(), dense) <= EXACT
    assert relative_error(zero_padded(model, batch[0], kron), dense) > 0.1


def test_zero_padding_is_what_the_neighbouring_libraries_assume():
    model = net(one_position(mode="zeros"), nn.Flatten())
    batch = data_for(model, SOFTMAX, 1, 2, 3, 3)
    kron = accumulate(model, [batch], SOFTMAX).kron["0.weight"]
    assert relative_error(zero_padded(model, batch[0], kron), kron.to_dense()) <= EXACT


# --- one weight, several uses


class Twice(nn.Module):
    """One linear map used twice on the same input, with different functions behind it."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.map(x)) - self.map(x) ** 2)


class Tied(nn.Module):
    """Two modules that share one weight but not their biases, side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.tanh(self.one(x)) - self.two(x) ** 2)


@pytest.mark.parametrize("kind", [Twice, Tied])
def test_weight_used_twice_side_by_side_is_exact_in_reduce_only(kind):
    model = net(kind())
    batch = data_for(model, SOFTMAX, 1, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert max(errors(model, batch, SOFTMAX, kfac_approx="expand").values()) > INEXACT


@pytest.mark.parametrize("kind", [Twice, Tied])
def test_biases_of_a_module_used_twice_are_exact_for_several_data(kind):
    found = errors_of(net(kind()), SOFTMAX, 6, 4)
    assert_biases_exact(found)


def test_weight_used_twice_in_a_row_has_exact_biases():
    model = net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    repeated = nn.Sequential(model[0], model[1], model[0], model[1], model[2])
    found = errors_of(repeated, SOFTMAX, 6, 4)
    assert_biases_exact(found)
    assert found["0.weight"] > INEXACT
