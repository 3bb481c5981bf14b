"""Where the curvature of a group layer has to be exact, and where it must not be.

The references are the rule of an ordinary convolution with the induced filters, and the dense GGN
from autograd Jacobians; float64 throughout. Exact means 1e-10, inexact more than 3 %.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from margeq.curvature.io import rule_for
from margeq.groups import P4, P4M, PM, Z2, C
from margeq.laplace import accumulate
from margeq.layers import GroupConv2d, LiftingConv2d
from margeq.likelihoods import Categorical, Gaussian
from tests.oracles import F64, Lambda, MeanPool, data_for, errors, net, relative_error

EXACT, INEXACT = 1e-10, 3e-2
SOFTMAX, SQUARES = Categorical(), Gaussian()
GROUPS = pytest.mark.parametrize("group", [P4, P4M, C(8)], ids=repr)
KINDS = pytest.mark.parametrize("kind", ["full", "pointwise", "depthwise", "dg", "g", "gc"])
APPROXIMATIONS = ("expand", "reduce", "expand/reduce", "reduce/expand")


def conv(group, kind="full", **options):
    options = {"padding": 1, "padding_mode": "circular"} | options
    return GroupConv2d(2, 2, 3, group=group, separability=kind, **options)


def head(channels=2):
    return nn.Linear(channels, 5), nn.Tanh(), nn.Linear(5, 3)


def errors_of(model, likelihood, *shape, **options):
    return errors(model, data_for(model, likelihood, *shape), likelihood, **options)


def of_layer(found):
    return {name: error for name, error in found.items() if name.startswith("0.")}


def assert_exact(found):
    assert found
    assert max(found.values()) <= EXACT, found


def assert_inexact(found):
    weights = {name: error for name, error in found.items() if "weight" in name}
    assert weights
    assert min(weights.values()) > INEXACT, weights


# --- the factors are those of a convolution between all elements, in the frame of each


def induced(layer):
    """The ordinary convolution that a group convolution is, on flat channels."""
    conv = nn.Conv2d(
        layer.in_channels * layer.order, layer.out_channels * layer.order, 3, padding=1,
        padding_mode="circular", dtype=F64,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(layer.filters())
        conv.bias.copy_(layer.bias.repeat_interleave(layer.order))
    return conv


def frames_of(layer):
    """``[h, i, p]``: what weight i adds to entry p of the filter of element h, one by one."""
    number = layer.weight[0].numel()
    units = GroupConv2d(layer.in_channels, number, 3, group=layer.group).double()
    with torch.no_grad():
        units.weight.copy_(torch.eye(number, dtype=F64).view_as(units.weight))
    return units.filters().unflatten(0, (number, layer.order)).flatten(2).transpose(0, 1).detach()


@GROUPS
def test_factors_are_those_of_the_induced_convolution(group):
    layer = conv(group).double()
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(2 * group.order * 16, 3))
    own = net(layer, tail)
    shape = Lambda(lambda y: y.unflatten(1, (2, group.order)))
    plain = nn.Sequential(nn.Flatten(1, 2), induced(layer), shape, tail).double()
    x, y = data_for(own, SOFTMAX, 3, 2, group.order, 4, 4)
    torch.testing.assert_close(plain(x), own(x), rtol=0.0, atol=1e-12)
    kron = accumulate(own, [(x, y)], SOFTMAX).kron["0.weight"]
    reference = accumulate(plain, [(x, y)], SOFTMAX).kron["1.weight"]
    frames = frames_of(layer)
    mean = torch.einsum("hip,pq,hjq->ij", frames, reference.input_cov[0], frames) / group.order
    scale = reference.n_shared / kron.n_shared
    assert float(kron.n_shared) == group.order * float(reference.n_shared)
    assert relative_error(kron.input_cov[0] * scale, mean) <= 1e-12
    by_element = reference.grad_cov[0].unflatten(1, (2, -1)).unflatten(0, (2, -1))
    assert relative_error(kron.grad_cov[0], torch.einsum("ohph->op", by_element)) <= 1e-12


# --- means over elements and positions


@GROUPS
@KINDS
def test_with_direct_mean_one_datum_is_exact_in_reduce_only(group, kind):
    model = net(conv(group, kind), MeanPool(), *head())
    batch = data_for(model, SOFTMAX, 1, 2, group.order, 4, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert_inexact(of_layer(errors(model, batch, SOFTMAX, kfac_approx="expand")))


@KINDS
def test_with_direct_mean_deep_linear_with_squares_is_exact_in_reduce_only(kind):
    model = net(conv(P4, kind), MeanPool(), nn.Linear(2, 3))
    batch = data_for(model, SQUARES, 3, 2, 4, 3, 3)
    assert_exact(errors(model, batch, SQUARES, kfac_approx="reduce"))
    assert_inexact(of_layer(errors(model, batch, SQUARES, kfac_approx="expand")))


def test_lifting_with_direct_mean_one_datum_is_exact_in_reduce_only():
    layer = LiftingConv2d(2, 2, 3, group=P4M, padding=1, padding_mode="circular")
    model = net(layer, MeanPool(), *head())
    batch = data_for(model, SOFTMAX, 1, 2, 4, 4)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert_inexact(of_layer(errors(model, batch, SOFTMAX, kfac_approx="expand")))


def test_mean_over_one_axis_alone_is_exact_in_no_approximation():
    model = net(conv(P4), Lambda(lambda y: y.mean(2).flatten(1)), nn.Linear(32, 3))
    batch = data_for(model, SOFTMAX, 1, 2, 4, 4, 4)
    for approx in APPROXIMATIONS:
        assert_inexact(of_layer(errors(model, batch, SOFTMAX, kfac_approx=approx)))


def test_mean_over_elements_with_squares_at_each_position_is_exact_in_expand_reduce_only():
    model = net(conv(P4), Lambda(lambda y: y.mean(2)), nn.Conv2d(2, 3, 1))
    batch = data_for(model, SQUARES, 3, 2, 4, 3, 3)
    assert_exact(of_layer(errors(model, batch, SQUARES, kfac_approx="expand/reduce")))
    for approx in ("expand", "reduce", "reduce/expand"):
        assert_inexact(of_layer(errors(model, batch, SQUARES, kfac_approx=approx)))


def test_mean_over_positions_with_squares_at_each_element_is_exact_in_reduce_expand_only():
    model = net(conv(P4), Lambda(lambda y: y.flatten(3).mean(3)), nn.Conv1d(2, 3, 1))
    batch = data_for(model, SQUARES, 3, 2, 4, 3, 3)
    assert_exact(of_layer(errors(model, batch, SQUARES, kfac_approx="reduce/expand")))
    for approx in ("expand", "reduce", "expand/reduce"):
        assert_inexact(of_layer(errors(model, batch, SQUARES, kfac_approx=approx)))


def test_before_relu_and_mean_is_inexact():
    model = net(conv(P4), nn.ReLU(), MeanPool(), *head())
    batch = data_for(model, SOFTMAX, 1, 2, 4, 4, 4)
    for approx in APPROXIMATIONS:
        assert_inexact(of_layer(errors(model, batch, SOFTMAX, kfac_approx=approx)))


# --- squares at each position


@pytest.mark.parametrize("kind", ["full", "pointwise"])
@GROUPS
def test_squares_at_each_position_are_exact_in_expand_only(group, kind):
    channels = GroupConv2d(2, 2, 1, group=group, separability="pointwise")
    model = net(conv(group, kind), channels)
    batch = data_for(model, SQUARES, 2, 2, group.order, 2, 2)
    assert_exact(errors(model, batch, SQUARES, kfac_approx="expand"))
    for approx in APPROXIMATIONS[1:]:
        assert_inexact(errors(model, batch, SQUARES, kfac_approx=approx))


# --- one position of one element


def one_frame(kind):
    # the first factor of "gc" sees all pixels of the map, so it gets one
    size = 1 if kind == "gc" else 3
    return GroupConv2d(2, 4, size, group=Z2, separability=kind), size


@KINDS
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_one_element_and_position_one_datum(kind, approx):
    layer, size = one_frame(kind)
    model = net(layer, nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 2, 1, size, size, kfac_approx=approx))


def test_several_data_are_inexact_otherwise():
    layer, size = one_frame("full")
    model = net(layer, nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
    assert_inexact(of_layer(errors_of(model, SOFTMAX, 5, 2, 1, size, size)))


def depthwise(group):
    return GroupConv2d(3, 6, 3, group=group, separability="pointwise", groups=3)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_depthwise_one_position_one_datum(approx):
    model = net(depthwise(Z2), nn.Flatten(), nn.ReLU(), nn.Linear(6, 3))
    assert_exact(errors_of(model, SOFTMAX, 1, 3, 1, 3, 3, kfac_approx=approx))


def test_depthwise_one_position_of_several_elements_needs_their_direct_mean():
    model = net(depthwise(P4), MeanPool(), *head(6))
    batch = data_for(model, SOFTMAX, 1, 3, 4, 3, 3)
    assert_exact(errors(model, batch, SOFTMAX, kfac_approx="reduce"))
    assert_inexact(of_layer(errors(model, batch, SOFTMAX, kfac_approx="expand")))
    relu = net(depthwise(P4), nn.ReLU(), MeanPool(), *head(6))
    assert_inexact(of_layer(errors(relu, batch, SOFTMAX, kfac_approx="reduce")))


# --- one approximation per axis


def hand_sums(model, batch, sum_places, sum_frames):
    """Factors of the first layer from its rows: ``a`` are means, ``g`` sums, over an axis."""
    layer, (x, _) = model[0], batch
    y = layer(x)
    outputs = model[1:](y)
    grads = [torch.autograd.grad(f.sum(), y, retain_graph=True)[0] for f in outputs.unbind(1)]
    rule = rule_for(type(layer))
    assert rule is not None
    with torch.no_grad():
        io = rule.io(layer, x, torch.stack(grads))["weight"]
    inputs = io.inputs.unflatten(1, (layer.order, -1))
    gradients = io.output_grads.unflatten(2, (layer.order, -1))
    axes = [axis for axis, summed in ((1, sum_frames), (2, sum_places)) if summed]
    for axis in axes:
        inputs = inputs.mean(axis, keepdim=True)
        gradients = gradients.sum(axis + 1, keepdim=True)
    input_cov = torch.einsum("nhtbi,nhtbj->bij", inputs, inputs)
    grad_cov = torch.einsum("vnhtbo,vnhtbp->bop", gradients, gradients)
    return input_cov, grad_cov, inputs[:, :, :, 0, 0].numel()


@pytest.mark.parametrize(
    ("approx", "sums"),
    [
        ("expand", (False, False)),
        ("reduce", (True, True)),
        ("expand/reduce", (False, True)),
        ("reduce/expand", (True, False)),
    ],
)
@pytest.mark.parametrize("kind", ["full", "pointwise", "lifting"])
@pytest.mark.parametrize("group", [P4, C(3)], ids=repr)
def test_sums_along_each_axis_by_hand(approx, sums, kind, group):
    layer = (
        LiftingConv2d(2, 2, 3, group=group, padding=1) if kind == "lifting" else conv(group, kind)
    )
    model = net(layer, nn.Tanh(), nn.Flatten(), nn.Linear(2 * group.order * 9, 3))
    elements = () if kind == "lifting" else (group.order,)
    batch = data_for(model, SQUARES, 3, 2, *elements, 3, 3)
    kron = accumulate(model, [batch], SQUARES, kfac_approx=approx).kron["0.weight"]
    input_cov, grad_cov, n_shared = hand_sums(model, batch, *sums)
    assert relative_error(kron.input_cov, input_cov) <= 1e-12
    assert relative_error(kron.grad_cov, grad_cov) <= 1e-12
    assert float(kron.n_shared) == n_shared


@pytest.mark.parametrize(
    ("approx", "group", "size", "same"),
    [
        ("expand/reduce", Z2, 4, "expand"),
        ("reduce/expand", Z2, 4, "reduce"),
        ("reduce/expand", P4, 3, "expand"),
        ("expand/reduce", P4, 3, "reduce"),
    ],
)
def test_an_axis_of_one_leaves_the_approximation_of_the_other(approx, group, size, same):
    model = net(conv(group, padding=0), nn.Tanh(), MeanPool(), nn.Linear(2, 3))
    batch = data_for(model, SOFTMAX, 3, 2, group.order, size, size)
    found, expected = (
        accumulate(model, [batch], SOFTMAX, kfac_approx=name).kron["0.weight"]
        for name in (approx, same)
    )
    assert relative_error(found.to_dense(), expected.to_dense()) <= 1e-12


class Twice(nn.Module):
    """A map without elements, used twice."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.map(x) - self.map(x.flip(-1)) ** 2).mean((2, 3)))


@pytest.mark.parametrize(
    ("approx", "same"), [("reduce/expand", "reduce"), ("expand/reduce", "expand")]
)
def test_layers_without_elements_follow_the_approximation_of_places(approx, same):
    model = net(Twice())
    batch = data_for(model, SOFTMAX, 3, 2, 4, 4)
    found, expected = (
        accumulate(model, [batch], SOFTMAX, kfac_approx=name).kron["0.map.weight"]
        for name in (approx, same)
    )
    assert relative_error(found.to_dense(), expected.to_dense()) <= 1e-12


# --- what the evidence reads of the factors


@KINDS
@pytest.mark.parametrize("group", [P4, PM, C(3)], ids=repr)
@pytest.mark.parametrize("approx", ["expand", "reduce/expand"])
def test_log_determinant_and_effective_number_are_those_of_the_dense_blocks(kind, group, approx):
    model = net(conv(group, kind), nn.Tanh(), MeanPool(), nn.Linear(2, 3))
    batch = data_for(model, SOFTMAX, 3, 2, group.order, 3, 3)
    state = accumulate(model, [batch], SOFTMAX, kfac_approx=approx)
    eigenvalues = state.curvature.decompose()
    logs = {name: torch.tensor(0.3 * i, dtype=F64) for i, name in enumerate(state.kron)}
    scale = torch.tensor(0.7, dtype=F64)
    effective = eigenvalues.effective(logs, scale)
    total = 0.0
    for name, kron in state.kron.items():
        dense = scale.exp() * kron.to_dense()
        delta = logs[name].exp() * torch.eye(len(dense), dtype=F64)
        total += torch.logdet((dense + delta) / logs[name].exp())
        expected = torch.linalg.solve(dense + delta, dense).trace()
        torch.testing.assert_close(effective[name], expected, rtol=1e-10, atol=1e-12)
    found = eigenvalues.log_determinant(logs, scale)
    torch.testing.assert_close(found, total, rtol=1e-10, atol=0.0)
