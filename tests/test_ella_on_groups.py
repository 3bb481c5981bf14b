"""The paper's mixers and the networks of its table 7: sizes, symmetry and curvature."""

from __future__ import annotations

import pytest
import torch

from margeq.groups import P4, P4M, Z2
from margeq.laplace import accumulate
from margeq.models import ella
from tests.test_ella import CHANNELS, F64, all_shifts, count, layers, lively, on_meta


@pytest.mark.parametrize(
    ("separability", "width", "total"),
    [
        ("full", 10, 1_025_380),
        ("full", 6, 371_200),
        ("depthwise", 10, 214_550),
        ("depthwise", 13, 358_463),
        ("dg", 10, 139_725),  # the paper has 139735
        ("dg", 16, 346_215),
        ("pointwise", 10, 338_770),
    ],
)
def test_parameters_of_table_7(separability, width, total):
    assert count(on_meta("gconv", separability=separability, width=width)) == total


@pytest.mark.parametrize(("in_channels", "total"), [(3, 1_237_527), (1, 1_105_843)])
def test_parameters_of_the_mixer(in_channels, total):
    mixer = on_meta("f_fc+conv+gconv", width=2, in_channels=in_channels)
    assert count(mixer) == total
    assert [layer.active for layer in layers(mixer)] == [("f_fc", "conv", "gconv")] * 8


def poses(picture, mirrors=False):
    """Every quarter turn of every circular shift of one picture, as a batch."""
    turned = [torch.rot90(picture, quarter, (-2, -1)) for quarter in range(4)]
    turned += [pose.flip(-1) for pose in turned] if mirrors else []
    return torch.cat([all_shifts(pose) for pose in turned])


GCONV = ["pointwise", "full", "depthwise", "dg", "g", "gc"]


@pytest.mark.parametrize("separability", GCONV)
@pytest.mark.parametrize(("group", "size"), [(P4, 12), (P4M, 8), (P4, 7)], ids=["12", "P4M", "7"])
def test_group_convolutions_are_blind_to_every_pose(separability, group, size):
    model = lively("gconv", separability=separability, group=group, size=size)
    logits = model(poses(torch.randn(1, size, size, dtype=F64), mirrors=group is P4M))
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-12)
    assert (model(torch.randn(2, 1, size, size, dtype=F64)).diff(dim=0).abs() > 1e-4).any()


def test_the_group_convolution_of_a_rotation_group_sees_mirrors():
    picture = torch.randn(1, 1, 8, 8, dtype=F64)
    model = lively("gconv", separability="full", size=8)
    assert (model(picture) - model(picture.flip(-1))).abs().max() > 1e-4


def test_paths_on_a_group_share_one_phase():
    model, x = lively("conv+gconv", size=16), all_shifts(torch.randn(1, 16, 16, dtype=F64))
    logits = model(x)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-12)
    assert (model(torch.rot90(x, 1, (-2, -1))) - logits).abs().min(0).values.max() > 1e-6
    before = ("conv", "gconv")
    assert [layer.before for layer in layers(model)] == [
        before if halves else () for halves in (0, 1, 0, 1, 0, 1, 1, 0)
    ]


@pytest.mark.parametrize("kind", ["f_fc+conv+gconv", "s_fc+s_conv+gconv", "fc+gconv"])
def test_fully_connected_paths_on_a_group_see_shifts(kind):
    logits = lively(kind, size=8)(all_shifts(torch.randn(1, 8, 8, dtype=F64)))
    assert (logits - logits[:1]).abs().amax(1)[1:].min() > 1e-6


@pytest.mark.parametrize("kind", ["f_fc+conv+gconv", "gconv", "f_fc+conv", "fc", "s_fc+s_conv"])
@pytest.mark.parametrize("size", [8, (4, 6)])
def test_maps_live_on_the_group(kind, size):
    model = ella(kind, width=1, size=size, group=P4, num_classes=5)
    shapes = []
    for layer in layers(model):
        layer.register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape[:3])))
    picture = (size, size) if isinstance(size, int) else size
    assert model(torch.randn(2, 3, *picture)).shape == (2, 5)
    assert shapes == [(2, channels // 10, 4) for channels in CHANNELS]


@pytest.mark.parametrize("separability", ["pointwise", "full"])
def test_on_the_trivial_group_it_is_the_ordinary_network(separability):
    plain, trivial = lively("conv"), lively("gconv", group=Z2, separability=separability)
    for mine, other in zip(layers(trivial), layers(plain), strict=True):
        group_conv, conv = mine.paths["gconv"], other.paths["conv"][0]
        group_conv.weight.copy_(conv.weight.reshape(group_conv.weight.shape))
        group_conv.bias.copy_(conv.bias)
    trivial.head0, trivial.head1 = plain.head0, plain.head1
    x = torch.randn(3, 1, 32, 32, dtype=F64)
    torch.testing.assert_close(trivial(x), plain(x), rtol=0, atol=1e-12)


def test_convolutions_on_a_group_see_every_element_as_a_channel():
    model = lively("conv", group=P4, size=4)
    x = torch.randn(2, 1, 4, 4, dtype=F64)
    conv = model.layer0.paths["conv"][1]
    assert conv.weight.shape == (2 * 4, 1 * 4, 3, 3)
    y = conv(x.expand(2, 4, 4, 4)).reshape(2, 2, 4, 4, 4)
    torch.testing.assert_close(model.layer0(model.lift(x)), y, rtol=0, atol=1e-12)


def test_a_mixer_gets_curvature_and_an_evidence_for_each_path():
    model = lively("f_fc+conv+gconv", size=8, num_classes=3).requires_grad_(True)
    batches = [(torch.randn(6, 1, 8, 8, dtype=F64), torch.arange(6) % 3)]
    state = accumulate(model, batches, "classification")
    assert set(state.kron) == {name for name, _ in model.named_parameters()}
    assert all(layer.less_constrained() == ("f_fc", "conv") for layer in layers(model)[:3])


@pytest.mark.parametrize("separability", ["pointwise", "full"])
def test_group_convolutions_start_at_the_gain_of_a_rectifier(separability):
    model = ella("gconv", separability=separability, size=8)
    filters = model.layer6.paths["gconv"].weight.detach()
    fan_in = filters[0].numel()
    assert float(filters.std() * fan_in**0.5) == pytest.approx(2.0**0.5, rel=0.02)


def test_the_head_sees_the_mean_over_positions_of_the_maximum_over_the_group():
    model, x = lively("gconv", size=(24, 32)), torch.randn(2, 1, 24, 32, dtype=F64)
    maps = []
    model.relu7.register_forward_hook(lambda module, args, y: maps.append(y))
    y = model(x)
    assert maps[0].shape == (2, 32, 4, 3, 4)
    expected = model.head1(model.head0(maps[0].amax(2).mean((2, 3))).relu())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
