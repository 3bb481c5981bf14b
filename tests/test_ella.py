"""The paper's architecture: its parameter counts, its sizes, and the symmetry it claims."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import nn

import margeq
from margeq.errors import ConfigError, DataError
from margeq.layers import ResidualPathways
from margeq.layers.pooling import BatchPolyphaseSubsample
from margeq.models import ella
from margeq.parameters import named_hyperparameters, named_weights

F64 = torch.float64
HEAD = 109_450  # of width 10 and ten classes
CHANNELS = [10, 20, 20, 40, 40, 80, 80, 160]
DENSE = ["fc", "conv", "fc+conv", "f_fc", "f_fc+conv"]


def on_meta(kind, **kwargs):
    with torch.device("meta"):
        return ella(kind, **kwargs)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- parameter counts of the paper


@pytest.mark.parametrize(
    ("kind", "in_channels", "num_classes", "total"),
    [
        ("fc", 3, 10, 133_635_690),
        ("conv", 3, 10, 338_770),
        ("fc+conv", 3, 10, 133_865_010),
        ("f_fc", 3, 10, 1_542_625),
        ("f_fc+conv", 3, 10, 1_771_945),
        ("fc", 1, 40, 112_683_400),
        ("fc", 1, 10, 112_664_170),
        ("conv", 1, 40, 357_820),
        ("conv", 1, 10, 338_590),
        ("f_fc+conv", 1, 40, 1_750_035),
        ("f_fc+conv", 1, 10, 1_730_805),
    ],
)
def test_parameters_of_the_dense_networks(kind, in_channels, num_classes, total):
    assert count(on_meta(kind, in_channels=in_channels, num_classes=num_classes)) == total


@pytest.mark.parametrize(
    ("kind", "kwargs", "weights", "lengthscales"),
    [
        ("s_fc", {}, 831_820, 16),
        ("s_fc", {"reference": True}, 831_820, 16),
        ("s_conv", {}, 237_050, 8),  # 5 anchors
        ("s_conv", {"reference": True}, 211_620, 8),  # 4
        ("s_conv", {"reference": True, "anchors": 0.8}, 287_910, 8),  # 7
        ("s_fc+s_conv", {}, 959_420, 24),
        ("s_fc+s_conv", {"reference": True}, 933_990, 24),
        ("s_fc+s_conv", {"anchors": {"s_conv": 7}}, 1_010_280, 24),
        ("s_conv", {"anchors": "grid", "per_filter": True}, 338_770, sum(CHANNELS)),
    ],
)
def test_parameters_of_the_sparsified_networks(kind, kwargs, weights, lengthscales):
    model = ella(kind, **kwargs)
    assert sum(weight.numel() for weight in named_weights(model).values()) == weights
    assert sum(p.numel() for p in named_hyperparameters(model).values()) == lengthscales


def layers(model):
    return [getattr(model, f"layer{number}") for number in range(8)]


def test_parameters_per_layer():
    fc = [layer.paths["fc"].weight.numel() for layer in layers(on_meta("fc"))]
    assert fc == [
        31_457_280, 52_428_800, 26_214_400, 13_107_200, 6_553_600, 3_276_800, 409_600, 51_200
    ]  # fmt: skip
    f_fc = [layer.paths["f_fc"] for layer in layers(on_meta("f_fc"))]
    assert [(path.weight_u.numel(), path.weight_v.numel()) for path in f_fc] == [
        (30_720, 30_720),
        (204_800, 51_200),
        (102_400, 102_400),
        (204_800, 51_200),
        (102_400, 102_400),
        (204_800, 51_200),
        (102_400, 25_600),
        (51_200, 12_800),
    ]


def test_parameters_of_the_head():
    model = on_meta("conv")
    assert count(model.head0) + count(model.head1) == HEAD


@pytest.mark.parametrize(("kind", "tensors"), [("conv", 20), ("fc+conv", 36), ("f_fc+conv", 52)])
def test_number_of_weight_tensors(kind, tensors):
    assert len(list(on_meta(kind).parameters())) == tensors


# --- sizes


def map_shapes(model, *size):
    """Shapes of the outputs of the layers for a picture of this size."""
    shapes = []
    for layer in layers(model):
        layer.register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape[1:])))
    assert model(torch.zeros(2, *size, device="meta")).shape == (2, 10)
    return shapes


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (32, [(32, 32), (16, 16), (16, 16), (8, 8), (8, 8), (4, 4), (2, 2), (1, 1)]),
        (16, [(16, 16), (8, 8), (8, 8), (4, 4), (4, 4), (2, 2), (1, 1), (1, 1)]),
        (28, [(28, 28), (14, 14), (14, 14), (7, 7), (7, 7), (7, 7), (7, 7), (7, 7)]),
        (64, [(64, 64), (32, 32), (32, 32), (16, 16), (16, 16), (8, 8), (4, 4), (2, 2)]),
        ((24, 32), [(24, 32), (12, 16), (12, 16), (6, 8), (6, 8), (3, 4), (3, 4), (3, 4)]),
    ],
)
def test_channels_and_sizes_of_every_layer(kind, size, sides):
    picture = (size, size) if isinstance(size, int) else size
    found = map_shapes(on_meta(kind, size=size), 3, *picture)
    assert found == [(channels, *side) for channels, side in zip(CHANNELS, sides, strict=True)]


@pytest.mark.parametrize("kind", ["f_fc+conv", "s_fc+s_conv"])
@pytest.mark.parametrize("size", [16, 28, (24, 32), 64])
def test_every_size_is_computed(kind, size):
    picture = (size, size) if isinstance(size, int) else size
    logits = ella(kind, width=1, size=size, anchors=0.02)(torch.randn(2, 3, *picture))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


# --- paths


def test_paths_keep_their_names_and_one_order():
    model = on_meta("conv+fc")
    names = [name for name, module in model.named_children()]
    pairs = [name for number in range(8) for name in (f"layer{number}", f"relu{number}")]
    assert names == [*pairs, "pool", "flatten", "head0", "relu8", "head1"]
    assert all(layer.active == ("fc", "conv") for layer in layers(model))
    assert all(isinstance(layer, ResidualPathways) for layer in layers(on_meta("conv")))


@pytest.mark.parametrize("path", ["f_fc", "conv"])
def test_a_path_alone_is_its_single_path_network(path):
    both, single = ella("f_fc+conv", width=1, size=8), ella(path, width=1, size=8)
    for joint, alone in zip(layers(both), layers(single), strict=True):
        joint.switch_off(*{"f_fc", "conv"} - {path})
        alone.paths[path].load_state_dict(joint.paths[path].state_dict())
    single.head0, single.head1 = both.head0, both.head1
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(both(x), single(x))


def test_convolutions_carry_over_to_other_sizes():
    small, large = ella("conv", width=1, size=7), ella("conv", width=1, size=32)
    large.load_state_dict(small.state_dict())


def test_the_mean_is_half_the_sum():
    model = ella("fc+conv", width=1, size=8, reduction="mean")
    assert all(layer.scale == 0.5 for layer in layers(model))
    assert all(layer.scale == 1.0 for layer in layers(ella("fc+conv", width=1, size=8)))


def test_the_head_sees_the_mean_over_positions():
    model = ella("conv", width=1, size=(24, 32))
    x = torch.randn(2, 3, 24, 32)
    maps, y = [], model(x)
    model.relu7.register_forward_hook(lambda module, args, out: maps.append(out))
    model(x)
    assert maps[0].shape == (2, 16, 3, 4)
    torch.testing.assert_close(y, model.head1(model.head0(maps[0].mean((2, 3))).relu()))


def anchors_of(**kwargs):
    model = ella("s_fc+s_conv", width=1, size=8, **kwargs)
    conv = [layer.paths["s_conv"][0].basis.anchors for layer in layers(model)]
    return conv, [layer.paths["s_fc"].basis_u.anchors for layer in layers(model)]


def test_anchors_differ_between_layers_and_depend_on_the_seed_alone():
    conv, fc = anchors_of(seed=3)
    torch.manual_seed(5)
    again, others = anchors_of(seed=3), anchors_of(seed=4)
    for mine, same in zip(conv + fc, again[0] + again[1], strict=True):
        assert torch.equal(mine, same)
    assert all(not torch.equal(a, b) for a, b in combinations(conv + others[0], 2))
    assert not torch.equal(fc[0], fc[1])


def test_convolutions_start_at_the_gain_of_a_rectifier_and_biases_at_zero():
    model = ella("conv+s_conv", width=10, size=8)
    for name in ("conv", "s_conv"):
        conv = model.layer6.paths[name][0]
        filters = conv.weight if name == "conv" else conv.filters()
        assert float(filters.detach().std() * 360**0.5) == pytest.approx(1.0, rel=0.02)
    assert model.layer6.paths["conv"][0].weight.abs().max() <= (6 / 720) ** 0.5
    assert all(not p.any() for name, p in model.named_parameters() if "bias" in name)


# --- symmetry


def all_shifts(picture):
    """Every circular shift of one picture, as a batch."""
    height, width = picture.shape[-2:]
    shifts = product(range(height), range(width))
    return torch.stack([picture.roll(shift, (-2, -1)) for shift in shifts])


def lively(kind, **kwargs):
    """A network in float64 whose biases are not zero."""
    model = ella(kind, width=2, in_channels=1, **kwargs).double()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["conv", "s_conv"])
@pytest.mark.parametrize("size", [(32, 32), (12, 20), (7, 8)])
def test_convolutions_are_blind_to_every_shift(kind, size):
    model = lively(kind, size=size)
    logits = model(all_shifts(torch.randn(1, *size, dtype=F64)))
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-12)
    assert (model(torch.randn(2, 1, *size, dtype=F64)).diff(dim=0).abs() > 1e-3).any()


def test_two_convolutional_paths_choose_their_own_phases():
    logits = lively("s_conv+conv")(all_shifts(torch.randn(1, 32, 32, dtype=F64)))
    assert (logits - logits[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["fc+conv", "f_fc+conv", "s_fc+s_conv"])
def test_fully_connected_paths_see_shifts(kind):
    logits = lively(kind, size=8)(all_shifts(torch.randn(1, 8, 8, dtype=F64)))
    assert (logits - logits[:1]).abs().amax(1)[1:].min() > 1e-6


@pytest.mark.parametrize("kind", ["conv", "f_fc+conv", "s_fc+s_conv"])
def test_predictions_do_not_depend_on_the_batch(kind):
    model, x = lively(kind, size=16), torch.randn(16, 1, 16, 16, dtype=F64)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)


# --- the published code


def test_the_reference_depends_on_the_batch():
    model, x = lively("conv", reference=True), torch.randn(16, 1, 32, 32, dtype=F64)
    alone = torch.cat([model(one[None]) for one in x])
    moved = (model(x) - alone).abs().amax(1) > 1e-6
    assert moved.sum() > len(x) / 2


def test_the_reference_takes_the_mean():
    assert on_meta("fc+conv", reference=True).layer0.scale == 0.5
    assert on_meta("fc+conv", reference=True, reduction="sum").layer0.scale == 1.0


def test_the_reference_phase_is_that_of_the_largest_signed_entry_of_the_batch():
    x = torch.zeros(2, 3, 4, 4)
    x[0, :, 1::2, 0::2] = -3.0
    x[0, 1, 2, 3] = 1.0
    x[1, 0, 0, 0] = 0.5
    kept = BatchPolyphaseSubsample()(x)
    assert torch.equal(kept, x[..., 0::2, 1::2])
    assert BatchPolyphaseSubsample()(x[:0]).shape == (0, 3, 2, 2)
    with pytest.raises(DataError, match="map of 3 x 4"):
        BatchPolyphaseSubsample()(torch.zeros(1, 1, 3, 4))


# --- training and errors


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_training_reports_every_layer():
    x, y = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    model = ella("f_fc+conv", width=1, in_channels=1, num_classes=3, size=8)
    result = margeq.optimize_marglik(
        model, [(x, y)], n_epochs=2, n_epochs_burnin=1, marglik_frequency=1,
        restarts="symmetric", seed=0,
    )  # fmt: skip
    rows = [(row.layer, row.path) for row in result.effective_dimension().paths]
    chosen = [(f"layer{number}", path) for number in range(8) for path in ("f_fc", "conv")]
    assert [row for row in rows if row[1]] == chosen
    assert {row[0] for row in rows if not row[1]} == {"head0", "head1"}


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("conv+dense", {}, "unknown path 'dense'; .*fc, f_fc, s_fc, conv, s_conv, gconv"),
        ("", {}, "unknown path ''"),
        ("conv+conv", {}, "named twice"),
        ("conv", {"width": 0}, "width=0"),
        ("conv", {"num_classes": 0}, "num_classes=0"),
        ("conv", {"in_channels": -1}, "in_channels=-1"),
        ("conv", {"width": 1.5}, r"width=1\.5"),
        ("conv", {"width": True}, "width=True"),
        ("conv", {"size": (8, 0)}, "size=0"),
        ("conv", {"size": "32"}, "size='32'"),
        ("conv", {"size": 16.5}, r"size=16\.5"),
        ("conv", {"size": (8, 8, 8)}, "height, width"),
        ("conv", {"reduction": "max"}, "reduction='max'"),
        ("s_conv", {"anchors": {"conv": 0.5}}, "no sparsified path 'conv'; use s_fc, s_conv"),
        ("s_conv", {"anchors": 1.5}, "anchors=1.5"),
        ("s_conv", {"anchors": 1.5, "reference": True}, "anchors=1.5"),
        ("s_fc", {"basis": "wavelet"}, "basis='wavelet'"),
        ("gconv", {"group": "p4"}, "group='p4'"),
        ("gconv", {"separability": "half"}, "separability='half'"),
        ("gconv", {"reference": True}, "reference=True on P4"),
    ],
)
def test_errors_name_what_is_wrong(kind, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ella(kind, **kwargs)
