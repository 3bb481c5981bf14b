"""Every layer on groups commutes with them, and the measure of it says so; float64, to 1e-12.

Turns and mirrors of the oracle are ``torch.rot90`` and ``flip``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from margeq.errors import ConfigError, DataError
from margeq.groups import P2, P4, P4M, PM, Z2, C, D, S
from margeq.groups.action import act, disk
from margeq.layers import (
    GroupConv2d,
    GroupPool,
    LiftingConv2d,
    MergeGroup,
    PerElement,
    PolyphaseSubsample,
    SplitGroup,
)
from margeq.testing import equivariance_error
from tests.oracles import F64, Lambda, MeanPool, net

GROUPS = [Z2, P2, P4, PM, P4M, D(2)]
KINDS = ["full", "pointwise", "depthwise", "dg", "g", "gc"]
EXACT = 1e-12
ON_GROUPS = pytest.mark.parametrize("group", GROUPS, ids=repr)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def turned(x, group, u):
    """``(T_u f)(x) = f(u^-1 x)``; rows run downwards, so rotations are clockwise."""
    n_rotations = group.order // 2 if group in (PM, P4M, D(2)) else group.order
    mirrors, rotations = divmod(u, n_rotations)
    x = x.flip(-1) if mirrors else x
    return x.rot90(-rotations * 4 // n_rotations, (-2, -1))


def moved(f, group, u):
    """``(L_u f)(g, x) = f(u^-1 g, u^-1 x)``."""
    inverse = int(group.inverse[u])
    sources = [group.compose(inverse, g) for g in range(group.order)]
    return torch.stack([turned(f[:, :, g], group, u) for g in sources], 2)


def float64(layer):
    """One layer in double precision, with random biases."""
    return net(layer)[0]


def error_of(model, group, *shape, **options):
    found = equivariance_error(model, group, torch.randn(shape, dtype=F64), **options)
    assert list(found.exact.per_element) == list(range(group.order))
    assert not found.approximate.per_element
    return found.exact.max


# --- the action


@ON_GROUPS
def test_action_is_that_of_turned_arrays(group):
    picture, f = torch.randn(2, 3, 5, 5), torch.randn(2, 3, group.order, 4, 4)
    for u in range(group.order):
        assert torch.equal(act(picture, group, u, "picture"), turned(picture, group, u))
        assert torch.equal(act(f, group, u, "map"), moved(f, group, u))
        once = act(f, group, u, "map", shift=(1, 3))
        assert torch.equal(once, moved(f, group, u).roll((1, 3), (-2, -1)))
        constant = f[..., :1, :1].expand_as(f)
        expected = moved(constant, group, u)[..., 0, 0]
        assert torch.equal(act(f[..., 0, 0], group, u, "elements"), expected)


def test_action_follows_products():
    f = torch.randn(1, 2, 8, 3, 3)
    for u in range(8):
        for v in range(8):
            one_by_one = act(act(f, P4M, v, "map"), P4M, u, "map")
            assert torch.equal(one_by_one, act(f, P4M, P4M.compose(u, v), "map"))


def test_exact_elements_of_a_fine_group_are_exact_and_rectangles_can_be_mirrored():
    picture = torch.randn(1, 1, 4, 4)
    for u in range(4):
        assert torch.equal(act(picture, C(8), 2 * u, "picture"), act(picture, P4, u, "picture"))
    assert torch.equal(act(picture[:, :, :2], P4, 2, "picture"), picture[:, :, :2].flip(-2, -1))
    with pytest.raises(DataError, match="square"):
        act(picture[:, :, :2], P4, 1, "picture")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("group", [C(8), D(8), C(3)], ids=repr)
def test_other_elements_interpolate_in_the_same_sense(group, interpolation):
    y, x = torch.meshgrid(*[torch.arange(21, dtype=F64) - 10] * 2, indexing="ij")

    def wave(matrix):
        places = matrix.T @ torch.stack([x.flatten(), y.flatten()])
        return torch.sin(0.2 * places[0] + 0.1 * places[1] + 0.4).reshape(1, 1, 21, 21)

    for u in range(1, group.order):
        found = act(wave(group.matrices[0]), group, u, "picture", interpolation=interpolation)
        difference = (found - wave(group.matrices[u]))[..., disk(21, 21, 0.7)]
        assert difference.abs().max() < 0.02


def test_action_refuses_what_it_cannot_move():
    f = torch.zeros(2, 3, 4, 5, 5)
    for wrong in (
        lambda: act(f, P4M, 1, "map"),
        lambda: act(f, P4, 1, "picture"),
        lambda: act(f[..., 0, 0], P4M, 1, "elements"),
    ):
        with pytest.raises(DataError, match="axes"):
            wrong()
    with pytest.raises(ConfigError, match="kind='image'"):
        act(f, P4, 1, "image")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="element=4"):
        act(f, P4, 4, "map")
    with pytest.raises(ConfigError, match="interpolation"):
        act(f, P4, 1, "map", interpolation="nearest")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="plane"):
        act(f, S(3), 1, "map")


# --- layers


@ON_GROUPS
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_layers_commute_with_all_elements(group, size, mode):
    window = {"padding": size // 2, "padding_mode": mode}
    lifting = net(LiftingConv2d(2, 3, size, group=group, **window))
    assert error_of(lifting, group, 1, 2, 5, 5) <= EXACT
    for kind in KINDS:
        layer = net(GroupConv2d(2, 4, size, group=group, separability=kind, **window))
        assert error_of(layer, group, 1, 2, group.order, 5, 5) <= EXACT, kind


@ON_GROUPS
@pytest.mark.parametrize("kind", KINDS)
def test_layers_commute_by_the_oracle(group, kind):
    lifting = net(LiftingConv2d(2, 3, 3, group=group))
    layer = net(GroupConv2d(3, 2, 2, group=group, separability=kind, padding=1))
    x = torch.randn(1, 2, 6, 6, dtype=F64)
    f = lifting(x)
    for u in range(group.order):
        torch.testing.assert_close(lifting(turned(x, group, u)), moved(f, group, u))
        torch.testing.assert_close(layer(moved(f, group, u)), moved(layer(f), group, u))


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}])
def test_strides_dilation_and_blocks_commute(options):
    for kind in ("full", "pointwise"):
        layer = net(GroupConv2d(2, 4, 3, group=P4M, separability=kind, **options))
        assert error_of(layer, P4M, 1, 2, 8, 7, 7) <= EXACT


def network(group, kind, *more):
    return net(
        LiftingConv2d(1, 2, 3, group=group, padding=1, padding_mode="circular"),
        nn.BatchNorm3d(2),
        nn.ReLU(),
        GroupConv2d(2, 2, 3, group=group, separability=kind, padding=1, padding_mode="circular"),
        nn.Tanh(),
        *more,
    )


@ON_GROUPS
@pytest.mark.parametrize("training", [True, False])
def test_networks_with_normalisation_commute_in_both_modes(group, training):
    maps = network(group, "full").train(training)
    pictures = network(group, "gc", GroupPool(group)).train(training)
    vectors = network(group, "depthwise", GroupPool(group, "mean"), MeanPool()).train(training)
    for model in (maps, pictures, vectors):
        assert error_of(model, group, 3, 1, 4, 4, shifts=True) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_polyphase_networks_commute_with_turns_and_shifts_jointly(kind):
    more = [
        PolyphaseSubsample(),
        GroupConv2d(2, 2, 3, group=P4M, padding=1, padding_mode="circular"),
    ]
    model = network(P4M, kind, *more, nn.Tanh(), PolyphaseSubsample())
    assert error_of(model, P4M, 3, 1, 8, 8, shifts=[(1, 0), (3, 2), (-1, 5)]) <= EXACT
    pooled = network(P4M, kind, PerElement(nn.MaxPool2d(2)))
    assert error_of(pooled, P4M, 2, 1, 8, 8) <= EXACT
    assert error_of(pooled, P4M, 2, 1, 8, 8, shifts=True) > 0.02


# --- what breaks a symmetry is seen


def test_ordinary_layers_on_merged_channels_do_not_commute():
    free = net(MergeGroup(), nn.Conv2d(16, 8, 3, padding=1), SplitGroup(P4M))
    assert error_of(free, P4M, 1, 2, 8, 5, 5) > 0.1
    by_element = net(MergeGroup(), nn.BatchNorm2d(16), SplitGroup(P4M))
    by_element[1].weight.uniform_(0.5, 2.0)
    assert error_of(by_element, P4M, 3, 2, 8, 5, 5) > 0.1


def test_the_error_is_the_relative_difference():
    model = net(nn.Conv2d(1, 2, 3, padding=1))
    x = torch.randn(2, 1, 5, 5, dtype=F64)
    found = equivariance_error(model, P4, x).exact
    y = model(x)
    for u in range(4):
        expected = (model(turned(x, P4, u)) - turned(y, P4, u)).norm() / y.norm()
        assert found.per_element[u] == pytest.approx(float(expected), rel=1e-12)
    assert found.max == max(found.per_element.values()) > found.mean > 0.0
    assert found.mean == pytest.approx(sum(found.per_element.values()) / 4)
    assert set(found.standard_error.values()) == {0.0}


@pytest.mark.parametrize("filters", ["bilinear", "band-limited"])
def test_interpolated_filters_are_exact_for_quarter_turns_only(filters):
    y, x = torch.meshgrid(*[torch.arange(15, dtype=F64)] * 2, indexing="ij")
    wave = torch.sin(0.4 * x + 0.3 * y)[None, None]
    model = net(LiftingConv2d(1, 4, 5, group=C(8), filters=filters, padding=2), nn.ReLU())
    found = equivariance_error(model, C(8), wave)
    assert list(found.exact.per_element) == [0, 2, 4, 6]
    assert list(found.approximate.per_element) == [1, 3, 5, 7]
    assert found.exact.max <= EXACT
    least, most = {"bilinear": (0.1, 0.6), "band-limited": (1e-4, 0.04)}[filters]
    assert least < found.approximate.mean <= found.approximate.max < most
    assert not equivariance_error(model, C(8), wave, mode="approximate").exact.per_element
    assert not equivariance_error(model, C(8), wave, mode="exact").approximate.per_element


def test_layers_are_named_and_judged_by_all_before_them():
    model = network(P4, "gc", MergeGroup(), nn.ReLU(), nn.Conv2d(8, 2, 1), MeanPool())
    x = torch.randn(2, 1, 5, 5, dtype=F64)
    found = equivariance_error(model.eval(), P4, x, per_layer=True).exact
    names = {name for name, _ in model.named_modules() if name}
    assert set(found.per_layer) == names
    broken = {name for name, error in found.per_layer.items() if error > 1e-2}
    assert broken == {"7", "8"}
    assert max(found.per_layer[name] for name in names - broken) <= EXACT
    assert found.per_layer["8"] == found.max
    assert not equivariance_error(model, P4, x).exact.per_layer


def test_layers_used_twice_count_by_their_worst_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = nn.Tanh()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.activation(self.conv(self.activation(x)))

    found = equivariance_error(
        float64(Twice()), P4, torch.randn(1, 1, 4, 4, dtype=F64), per_layer=True
    )
    assert found.exact.per_layer["activation"] == found.exact.max > 0.1


def test_outputs_are_those_before_an_activation_in_place():
    model = float64(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True)))
    x = torch.randn(2, 1, 5, 5, dtype=F64)
    found = equivariance_error(model, P4, x, per_layer=True).exact
    alone = equivariance_error(model[0], P4, x).exact
    assert found.per_layer == {"0": alone.max, "1": found.max}
    assert alone.max != found.max


def test_corners_that_would_leave_the_frame_do_not_count():
    ones = torch.ones(1, 1, 31, 31, dtype=F64)
    found = equivariance_error(MeanPool(), C(8), ones)
    assert 0.0 < found.approximate.max < 0.03 < float(1 - disk(31, 31).double().mean())
    assert found.exact.max <= EXACT


# --- random networks


class RandomPose(nn.Module):
    """A convolution of the picture in a random one of some poses: equivariant on average."""

    def __init__(self, n_poses):
        super().__init__()
        self.conv, self.n_poses = nn.Conv2d(1, 2, 3, padding=1), n_poses

    def forward(self, x):
        u = int(torch.randint(self.n_poses, ()))
        return turned(self.conv(turned(x, P4, (4 - u) % 4)), P4, u)


@pytest.mark.parametrize(("n_poses", "on_average"), [(4, True), (2, False)])
def test_random_networks_are_compared_in_expectation(n_poses, on_average):
    model, x = float64(RandomPose(n_poses)), torch.randn(1, 1, 5, 5, dtype=F64)
    found = equivariance_error(model, P4, x, n_draws=200, per_layer=True).exact
    ratios = {u: found.per_element[u] / found.standard_error[u] for u in range(4)}
    assert max(ratios.values()) < 2.0 if on_average else max(ratios.values()) > 5.0
    assert ratios[0] < 2.0
    assert set(found.per_layer) == {"conv"}


def test_the_standard_error_is_that_of_repeated_measurements():
    model, x = float64(RandomPose(4)), torch.randn(1, 1, 5, 5, dtype=F64)
    squares, standard_errors = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        found = equivariance_error(model, P4, x, n_draws=10, mode="exact").exact
        squares.append(found.per_element[1] ** 2)
        standard_errors.append(found.standard_error[1])
    spread = (sum(squares) / len(squares)) ** 0.5
    assert sum(standard_errors) / len(standard_errors) == pytest.approx(spread, rel=0.2)


def test_the_standard_error_by_hand():
    model, x = Lambda(lambda x: 1.0 + torch.randn(2, 3, dtype=F64)), torch.ones(2, 1, 4, 4)
    torch.manual_seed(5)
    found = equivariance_error(model, P4, x, n_draws=3).exact
    torch.manual_seed(5)
    passes = torch.stack([model(x) for _ in range(4 * 3 * 2)])
    y, z = passes.unflatten(0, (4, 3, 2)).unbind(2)  # elements, draws, two passes
    size = y.mean(1).flatten(1).norm(dim=1)
    errors = (z - y).mean(1).flatten(1).norm(dim=1) / size
    standard_errors = ((z - y).var(1).flatten(1).sum(1) / 3).sqrt() / size
    for u in range(4):
        assert found.per_element[u] == pytest.approx(float(errors[u]), rel=1e-12)
        assert found.standard_error[u] == pytest.approx(float(standard_errors[u]), rel=1e-12)


# --- what is left as it was, and what is refused


def test_measuring_leaves_the_model_and_the_random_state_alone():
    model = network(P4, "full", GroupPool(P4)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    equivariance_error(model, P4, torch.randn(2, 1, 4, 4, dtype=F64), per_layer=True)
    torch.set_rng_state(state)
    x = torch.randn(2, 1, 4, 4, dtype=F64)
    state = torch.get_rng_state()
    equivariance_error(nn.Sequential(model, nn.Dropout()), P4, x, n_draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False, True, True, True]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode='all'"),
        ({"mode": "approximate"}, "all elements of P4 are exact"),
        ({"n_draws": 0}, "n_draws=0"),
        ({"n_draws": 2, "shifts": True}, "shifts=True"),
        ({"share": 0.0}, "share=0.0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        equivariance_error(nn.Identity(), P4, torch.randn(1, 1, 4, 4), **options)


def test_random_networks_need_draws():
    with pytest.raises(ConfigError, match="n_draws"):
        equivariance_error(nn.Dropout(), P4, torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("model", "shape", "options", "message"),
    [
        (nn.Identity(), (2, 3, 8, 5, 5), {}, r"inputs \(2, 3, 8, 5, 5\)"),
        (nn.Identity(), (2, 3), {}, r"inputs \(2, 3\)"),
        (nn.Identity(), (0, 3, 5, 5), {}, "inputs"),
        (nn.Identity(), (2, 3, 4, 5), {}, "square"),
        (nn.Flatten(2), (2, 3, 5, 5), {}, r"Flatten returned \(2, 3, 25\)"),
        (nn.Identity(), (2, 3, 5, 5), {"out": "map"}, "no map of P4"),
        (Lambda(lambda x: (x, x)), (2, 3, 5, 5), {}, "returned tuple"),
        (Lambda(lambda x: x / 0.0), (2, 3, 5, 5), {}, "not finite"),
        (nn.MaxPool2d(3, 2), (2, 3, 5, 5), {"shifts": True}, "circular shifts"),
    ],
)
def test_wrong_shapes_are_refused(model, shape, options, message):
    with pytest.raises(DataError, match=message):
        equivariance_error(model, P4, torch.randn(shape), **options)


# --- one function, several ways to compute it


@ON_GROUPS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_separable_kinds_are_one_convolution_with_products(group, size):
    order, window = group.order, {"padding": size // 2}
    relative = group.relative
    f = torch.randn(2, 3, order, 6, 6, dtype=F64)
    for kind in ("g", "gc"):
        layer = float64(GroupConv2d(3, 2, size, group=group, separability=kind, **window))
        last = list(layer)[-1]
        plane = last.weight.unflatten(-1, (size, size))  # [o, i or 1, y, x]
        elements = last.weight_w if kind == "g" else layer.elements.weight[..., 0]
        filters = torch.stack(
            [
                torch.einsum("oiyx,oig->oigyx", turned(plane, group, h).expand(2, 3, -1, -1),
                             elements[:, :, relative[h]])
                for h in range(order)
            ],
            1,
        )  # fmt: skip
        y = conv2d(f.flatten(1, 2), filters.flatten(2, 3).flatten(0, 1), **window)
        expected = y.unflatten(1, (2, order)) + last.bias[:, None, None, None]
        torch.testing.assert_close(layer(f), expected, rtol=EXACT, atol=EXACT)
        if kind == "g":
            torch.testing.assert_close(last.dense_filters(), filters, rtol=EXACT, atol=EXACT)


@ON_GROUPS
@pytest.mark.parametrize("groups", [1, 2])
def test_layers_are_one_convolution_with_dense_filters(group, groups):
    f = torch.randn(2, 4, group.order, 6, 6, dtype=F64)
    for kind in ("full", "pointwise"):
        layer = float64(GroupConv2d(4, 2, 3, group=group, separability=kind, groups=groups))
        dense = layer.dense_filters().flatten(2, 3).flatten(0, 1)
        y = conv2d(f.flatten(1, 2), dense).unflatten(1, (2, group.order))
        expected = y + layer.bias[:, None, None, None]
        torch.testing.assert_close(layer(f), expected, rtol=EXACT, atol=EXACT)


@ON_GROUPS
def test_pointwise_is_full_with_weights_at_the_identity(group):
    pointwise = float64(GroupConv2d(2, 3, 3, group=group, separability="pointwise"))
    full = float64(GroupConv2d(2, 3, 3, group=group))
    full.weight.zero_()
    full.weight[:, :, 0] = pointwise.weight
    full.bias.copy_(pointwise.bias)
    f = torch.randn(2, 2, group.order, 5, 5, dtype=F64)
    torch.testing.assert_close(pointwise(f), full(f), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_on_the_trivial_group_it_is_the_ordinary_convolution(mode):
    window = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": mode}
    plain = nn.Conv2d(4, 6, 3, **window).double()
    x = torch.randn(2, 4, 9, 9, dtype=F64)
    layers = [
        GroupConv2d(4, 6, 3, group=Z2, **window),
        GroupConv2d(4, 6, 3, group=Z2, separability="pointwise", **window),
        LiftingConv2d(4, 6, 3, group=Z2, **window),
    ]
    for layer in layers:
        layer.double().load_state_dict(
            {"weight": plain.weight.reshape(layer.weight.shape), "bias": plain.bias}
        )
        y = layer(x) if isinstance(layer, LiftingConv2d) else layer(x[:, :, None])
        torch.testing.assert_close(y[:, :, 0], plain(x), rtol=EXACT, atol=EXACT)


# --- modules and buffers with two names


def test_buffers_of_modules_with_two_names_stay_as_they_were():
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, norm)
    own = model[0].running_mean
    equivariance_error(model, P4, torch.randn(4, 1, 5, 5) + 3)
    assert model[0].running_mean is own
    assert own.item() == 0.0
    assert norm.num_batches_tracked.item() == 0


def test_one_buffer_of_two_modules_is_one_copy():
    class Counts(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.register_buffer("count", count, persistent=False)

        def forward(self, x):
            self.count.add_(1)
            return x * 0.0 + self.count

    count = torch.zeros(())
    model = nn.Sequential(Counts(count), Counts(count))
    found = equivariance_error(model, P4, torch.ones(1, 1, 3, 3), per_layer=True)
    assert found.exact.max == 0.0
    assert model[0].count is model[1].count is count
    assert count.item() == 0.0
    assert not model.state_dict()
    seen = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(float(y.mean())))
    equivariance_error(model, P4, torch.ones(1, 1, 3, 3))
    assert set(seen) == {2.0}


def test_buffers_are_put_back_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(2))
    own = model[0].running_mean
    with pytest.raises(DataError):
        equivariance_error(model, P4, torch.randn(2, 1, 5, 5) + 3)
    assert model[0].running_mean is own
    assert own.item() == 0.0


def test_outputs_that_are_all_zero_cannot_be_told_from_equivariant_ones():
    model = Lambda(lambda x: x * 0.0)
    assert equivariance_error(model, P4, torch.randn(1, 1, 4, 4)).exact.max == 0.0
