"""Networks on groups of the plane: their published sizes, and the symmetry that they claim."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from margeq.errors import ConfigError, EquivarianceWarning
from margeq.groups import P4, P4M, Z2, C
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import GroupConv2d
from margeq.likelihoods import Categorical
from margeq.models import all_cnn_c, count_macs, resnet44, rotmnist_cnn
from margeq.models.planar_layers import PlanarLayers, SeparableConv2d
from margeq.priors import GaussianPrior
from tests.oracles import F64

PICTURE = (1, 28, 28)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def lively(model, *shape):
    """In float64, with norms that fit data of this shape, and biases that are not zero."""
    model = model.double().requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = 1.0
            module.weight.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    model(torch.randn(8, *(shape or PICTURE), dtype=F64))
    return model.eval()


def turns(x, mirrors=False):
    """The batch in all poses of the square, by other means than those of the library."""
    poses = [torch.rot90(x, quarter, (-2, -1)) for quarter in range(4)]
    return poses + [pose.flip(-1) for pose in poses] if mirrors else poses


def spread(model, x, mirrors=False):
    """Largest change of the outputs under a pose, relative to how far they differ by datum."""
    upright, *others = (model(pose) for pose in turns(x, mirrors))
    size = (upright - upright.mean(0)).abs().max()
    return float(max((other - upright).abs().max() for other in others) / size)


# --- networks for rotated digits

ROTMNIST = [  # kind, width, parameters, multiplications as published, and at their real sizes
    ("z2", 20, 25_210, 2_979_480, 2_979_480),
    ("c-z2", 57, 25_603, 3_331_023, 4_120_530),
    ("p4", 10, 24_810, 11_673_860, 11_673_860),
    ("g-p4", 10, 8_910, 4_369_860, 4_758_660),
    ("gc-p4", 10, 3_420, 1_798_020, 2_186_820),
    ("g-p4", 17, 25_255, 12_339_178, 13_462_810),
    ("gc-p4", 30, 24_640, 13_006_860, 16_506_060),
]


@pytest.mark.parametrize(("kind", "width", "parameters", "published", "real"), ROTMNIST)
def test_sizes_of_table_1(kind, width, parameters, published, real):
    model = rotmnist_cnn(kind, width)
    assert count(model) == parameters
    assert count_macs(model, PICTURE, "paper") == published
    assert count_macs(model, PICTURE, "rearranged") == real


def multiplications(model, *shape):
    """Those of convolutions and dense layers, as torch counts them; turning filters is neither."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    flops = counter.get_flop_counts()["Global"]
    return sum(flops[kind] for kind in (torch.ops.aten.convolution, torch.ops.aten.addmm)) // 2


@pytest.mark.parametrize("kind", ["z2", "c-z2", "p4", "gc-p4", "p4m", "gc-p4m"])
def test_real_multiplications_are_those_that_torch_counts(kind):
    model = rotmnist_cnn(kind, 4)
    assert count_macs(model, PICTURE) == multiplications(model, *PICTURE)


@pytest.mark.parametrize("readout", ["max", "mean"])
@pytest.mark.parametrize("kind", ["p4", "g-p4", "gc-p4", "p4m", "g-p4m", "gc-p4m"])
def test_digits_are_read_in_every_pose(kind, readout):
    model = lively(rotmnist_cnn(kind, 4, readout=readout))
    assert spread(model, torch.randn(3, *PICTURE, dtype=F64), mirrors="m" in kind) < 1e-12


@pytest.mark.parametrize("kind", ["p4", "g-p4", "gc-p4"])
def test_digits_are_read_in_every_pose_while_training(kind):
    model, x = lively(rotmnist_cnn(kind, 4)).train(), torch.randn(4, *PICTURE, dtype=F64)
    assert spread(model, x) < 1e-12
    each = torch.cat([turns(one[None])[number] for number, one in enumerate(x)])
    torch.testing.assert_close(model(each), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "mirrors"), [("z2", False), ("c-z2", False), ("p4", True), ("gc-p4", True)]
)
def test_other_poses_are_told_apart(kind, mirrors):
    model = lively(rotmnist_cnn(kind, 4))
    assert spread(model, torch.randn(3, *PICTURE, dtype=F64), mirrors) > 1e-2


@pytest.mark.parametrize("size", [28, 30, 34])
def test_larger_pictures(size):
    model = lively(rotmnist_cnn("p4", 2, size=size, in_channels=2, num_classes=3), 2, size, size)
    x = torch.randn(3, 2, size, size, dtype=F64)
    assert model(x).shape == (3, 3)
    assert spread(model, x) < 1e-12


@pytest.mark.parametrize(("readout", "pool"), [("max", "amax"), ("mean", "mean")])
def test_the_read_out_is_over_elements_and_positions(readout, pool):
    model, x = lively(rotmnist_cnn("p4", 2, readout=readout)), torch.randn(3, 1, 32, 32, dtype=F64)
    maps = model[: list(dict(model.named_children())).index("group_pool")](x)
    assert maps.shape == (3, 2, 4, 3, 3)
    expected = model.head(getattr(maps, pool)((2, 3, 4)))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_every_layer_has_one_norm_for_all_elements():
    model = rotmnist_cnn("p4", 3)
    norms = [model.get_submodule(f"norm{number}") for number in range(1, 8)]
    assert all(isinstance(norm, nn.BatchNorm3d) and norm.num_features == 3 for norm in norms)
    assert isinstance(rotmnist_cnn("z2", 3).norm1, nn.BatchNorm2d)


# --- All-CNN-C


@pytest.mark.parametrize(
    ("group", "parameters"), [(Z2, 1_372_254), (P4, 1_371_006), (P4M, 1_219_678)], ids=repr
)
def test_parameters_of_all_cnn(group, parameters):
    assert count(all_cnn_c(group)) == parameters


@pytest.mark.parametrize("separability", ["g", "gc"])
def test_parameters_of_separable_all_cnn(separability):
    a, b, order = 5, 7, 4
    pairs = [(a, a), (a, a), (a, b), (b, b), (b, b), (b, b)]
    filters = {"g": [i * o * (order + 9) for i, o in pairs],
               "gc": [i * o * order + o * 9 for i, o in pairs]}[separability]  # fmt: skip
    pointwise = (b * b + b * 10) * order
    biases_and_norms = 3 * (3 * a + 5 * b + 10)
    expected = 3 * a * 9 + sum(filters) + pointwise + biases_and_norms
    assert count(all_cnn_c(P4, (a, b), separability)) == expected


@pytest.mark.parametrize("separability", ["full", "g", "gc"])
@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_all_cnn_is_invariant_at_odd_sizes_only(group, separability):
    model = lively(all_cnn_c(group, (4, 5), separability), 3, 16, 16)
    mirrors = group is P4M
    assert spread(model, torch.randn(3, 3, 13, 13, dtype=F64), mirrors) < 1e-12
    assert spread(model, torch.randn(3, 3, 16, 16, dtype=F64), mirrors) > 1e-3


def test_all_cnn_halves_twice_and_has_logits_of_either_sign():
    model = all_cnn_c(Z2, (4, 6), num_classes=7).train()
    shapes = []
    model.norm9.register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape)))
    assert (model(torch.randn(5, 3, 32, 32)) < 0).any()
    assert shapes == [(5, 7, 8, 8)]


# --- ResNet44


@pytest.mark.parametrize(
    ("group", "separability", "parameters"),
    [
        (Z2, "full", 2_636_458),
        (P4M, "full", 2_621_829),
        (P4M, "g", 1_782_381),
        (P4M, "gc", 1_884_270),
    ],
)
def test_parameters_of_resnet(group, separability, parameters):
    assert count(resnet44(group, separability=separability)) == parameters


def test_multiplications_of_resnet():
    model, shape = resnet44(Z2), (3, 32, 32)
    assert count_macs(model, shape) == multiplications(model, *shape) == 388_859_136


@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_activate_before_they_convolve(stride):
    """Preactivation, written with torch's functions; the shortcut gets the input as it is."""
    model = lively(resnet44(Z2, (2, 3, 3)), 3, 9, 9)
    block = model.stage2[0] if stride == 2 else model.stage2[1]
    x = torch.randn(4, block.norm1.num_features, 5, 5, dtype=F64)
    y = F.conv2d(block.norm1(x).relu(), block.conv1.weight, stride=stride, padding=1)
    y = F.conv2d(block.norm2(y).relu(), block.conv2.weight, padding=1)
    around = x
    if stride == 2:
        conv, norm = block.shortcut
        around = norm(F.conv2d(x, conv.weight, stride=2))
    torch.testing.assert_close(block(x), y + around, rtol=0, atol=1e-12)


@pytest.mark.parametrize("separability", ["full", "g", "gc"])
def test_resnet_is_invariant_at_odd_sizes_only(separability):
    model = lively(resnet44(P4M, (2, 3, 4), separability, head="pool"), 3, 16, 16)
    assert spread(model, torch.randn(2, 3, 33, 33, dtype=F64), mirrors=True) < 1e-12
    assert spread(model, torch.randn(2, 3, 32, 32, dtype=F64), mirrors=True) > 1e-3


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: all_cnn_c(P4, (2, 3)), "norm9"),
        (lambda: resnet44(P4M, (2, 3, 4), head="pool"), "relu"),
    ],
)
def test_read_outs_are_means_over_elements_and_positions(make, last):
    model, x = lively(make(), 3, 16, 16), torch.randn(2, 3, 12, 12, dtype=F64)
    maps = []
    model.get_submodule(last).register_forward_hook(lambda module, args, y: maps.append(y))
    y = model(x)
    head = getattr(model, "head", nn.Identity())
    torch.testing.assert_close(y, head(maps[0].mean((2, 3, 4))), rtol=0, atol=1e-12)


def test_the_flat_head_of_resnet_tells_elements_apart():
    model, x = lively(resnet44(P4M, (2, 3, 4)), 3, 9, 9), torch.randn(2, 3, 9, 9, dtype=F64)
    assert model.head.in_features == 8 * 4
    assert spread(model, x) > 1e-2
    means = []
    model.pool.register_forward_hook(lambda module, args, y: means.append(y.flatten(2)))
    for pose in turns(x, mirrors=True):
        model(pose)
    # the elements are exchanged, and nothing else
    upright, *others = (mean.sort(-1).values for mean in means)
    for other in others:
        torch.testing.assert_close(other, upright, rtol=0, atol=1e-11)


def test_shortcuts_are_full_and_stand_where_the_shape_changes():
    model = resnet44(P4M, (2, 3, 3), "gc")
    stages = {number: model.get_submodule(f"stage{number}") for number in (1, 2, 3)}
    plain = [n for n, stage in stages.items() if isinstance(stage[0].shortcut, nn.Identity)]
    assert plain == [1]
    conv, norm = model.stage2[0].shortcut
    assert isinstance(conv, GroupConv2d)
    assert conv.weight.shape == (3, 2, 8, 1)
    assert isinstance(norm, nn.BatchNorm3d)
    assert all(isinstance(block.shortcut, nn.Identity) for block in model.stage2[1:])
    assert not any("conv" in name and "bias" in name for name, _ in model.named_parameters())


# --- the layers they share


@pytest.mark.parametrize("separability", ["full", "pointwise", "depthwise", "dg", "g", "gc"])
def test_convolutions_have_the_gain_of_a_rectifier(separability):
    conv = PlanarLayers(P4, separability).conv(40, 200, 3)
    assert float(conv(torch.randn(8, 40, 4, 9, 9)).detach().var()) == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize(("group", "lifts"), [(Z2, True), (Z2, False), (P4, True), (C(8), True)])
def test_other_convolutions_have_it_too(group, lifts):
    conv = PlanarLayers(group, "gc" if group == Z2 else "full").conv(40, 200, 3, lifts=lifts)
    assert isinstance(conv, SeparableConv2d) == (group == Z2 and not lifts)
    assert float(conv(torch.randn(8, 40, 9, 9)).detach().var()) == pytest.approx(2.0, rel=0.15)
    assert not any(p.any() for name, p in conv.named_parameters() if "bias" in name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rotmnist_cnn("c-z2", 3),
        lambda: rotmnist_cnn("p4", 2),
        lambda: rotmnist_cnn("g-p4", 2),
        lambda: rotmnist_cnn("gc-p4", 2),
        lambda: all_cnn_c(P4, (2, 2), "gc", in_channels=1),
        lambda: resnet44(P4, (2, 2, 2), "g", in_channels=1),
    ],
)
def test_all_weights_get_curvature(make):
    model = make().double().eval()
    batches = [(torch.randn(4, *PICTURE, dtype=F64), torch.arange(4))]
    state = accumulate(model, batches, "classification")
    assert set(state.kron) == {name for name, _ in model.named_parameters()}
    prior, likelihood = GaussianPrior(model, structure="layerwise"), Categorical()
    assert torch.isfinite(log_marginal_likelihood(state, prior, likelihood))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotmnist_cnn("p8", 10), "kind='p8'.*gc-p4m"),
        (lambda: rotmnist_cnn("p4", 0), "width=0"),
        (lambda: rotmnist_cnn("p4", 2, num_classes=0), "num_classes=0"),
        (lambda: rotmnist_cnn("p4", 2, size=26), "size=26.*at least 28"),
        (lambda: rotmnist_cnn("p4", 2, size=29), "size=29.*even"),
        (lambda: rotmnist_cnn("p4", 2, size="28"), "size='28'"),
        (lambda: rotmnist_cnn("p4", 2, readout="sum"), "readout='sum'"),
        (lambda: all_cnn_c("p4"), "group='p4'"),
        (lambda: all_cnn_c(C(2)), "widths=None on P2"),
        (lambda: all_cnn_c(P4, (2, 0)), "widths=0"),
        (lambda: all_cnn_c(P4, (2, 2), "half"), "separability='half'"),
        (lambda: all_cnn_c(Z2, separability="g"), "separability='g' on Z2"),
        (lambda: resnet44(P4), "widths=None on P4.*three"),
        (lambda: resnet44(P4, (1, 2)), "three"),
        (lambda: resnet44(P4M, head="mean"), "head='mean'"),
        (lambda: count_macs(nn.Linear(1, 1), (1,), "real"), "convention='real'"),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "named"),
    [(resnet44, r"stage2.0.conv1 \(GroupConv2d"), (all_cnn_c, r"conv3 \(GroupConv2d")],
)
def test_a_known_size_that_breaks_the_symmetry_is_named(make, named):
    widths = (1, 1, 1) if make is resnet44 else (1, 1)
    with pytest.warns(EquivarianceWarning, match=named):
        make(P4M, widths, size=32)
    make(P4M, widths, size=33)  # warnings are errors
    with pytest.raises(ConfigError, match="size=0"):
        make(P4M, widths, size=0)
