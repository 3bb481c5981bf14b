"""Candidate paths around networks that know nothing of them."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq import models
from margeq.convert import relaxation
from margeq.convert.observed import largest_difference
from margeq.errors import ConfigError, ConversionError
from margeq.groups import P4
from margeq.laplace import decompose
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    LiftingConv2d,
    Linear2d,
    ResidualPathways,
    SparseConv2d,
    SparseFactoredLinear2d,
)
from margeq.training.solvers import mackay_step
from tests.vision_networks import UNet, resnet18, small_resnet, small_vgg, vgg11

EVERY = ("conv", "fc", "factored", "s_conv", "s_factored", "p4", "c8")


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


PICTURES = {
    "cnn": (small_cnn, (3, 9, 9)),
    "resnet18": (resnet18, (3, 16, 16)),
    "vgg11": (vgg11, (3, 32, 32)),
    "unet": (UNet, (1, 8, 8)),
    "ella": (lambda: models.ella("conv", width=2, in_channels=1, size=16), (1, 16, 16)),
    "ella of the paper": (lambda: models.ella("conv", width=20), (3, 32, 32)),
}


def sums(model: nn.Module) -> dict[str, ResidualPathways]:
    found = model.named_modules()
    return {name: m for name, m in found if isinstance(m, ResidualPathways) and "conv" in m.paths}


def unequal(model: nn.Module) -> nn.Module:
    """Norms that do something in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


# -- the same function -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PICTURES)
def test_same_outputs_bit_by_bit(name, dtype):
    make, shape = PICTURES[name]
    x = torch.randn(3, *shape, dtype=dtype)
    model = make().to(dtype).eval()
    model(x)  # lazy modules
    model = unequal(model)
    relaxed = margeq.relax(model, x)
    assert torch.equal(relaxed(x), model(x))
    other = torch.randn(5, *shape, dtype=dtype)
    assert torch.equal(relaxed(other), model(other))
    assert len(relaxation(relaxed).relaxed) >= 2


@pytest.mark.parametrize("name", ["cnn", "unet", "ella"])
def test_every_path_begins_at_zero_with_a_gradient(name):
    make, shape = PICTURES[name]
    x = torch.randn(3, *shape)
    model = unequal(make()).eval()
    relaxed = margeq.relax(model, x, EVERY)
    y = relaxed(x)
    assert torch.equal(y, model(x))
    (y * torch.linspace(1.0, 2.0, y.numel()).view_as(y)).sum().backward()
    for layer in relaxation(relaxed).relaxed:
        pathways = relaxed.get_submodule(layer.names[0])
        assert pathways.reduction == "sum"
        for path in pathways.paths.values():
            grads = [p.grad for p in path.parameters() if p.grad is not None]
            assert any(bool((grad != 0).any()) for grad in grads)


def test_what_the_paths_are():
    relaxed = margeq.relax(small_cnn(), torch.randn(1, 3, 9, 9), EVERY)
    first, second = (sums(relaxed)[name].paths for name in ("0", "2"))
    assert list(first) == list(second) == list(EVERY)
    kinds = [nn.Conv2d, Linear2d, FactoredLinear2d, SparseConv2d, SparseFactoredLinear2d]
    assert [type(path) for path in first.values()][:5] == kinds
    assert type(first["p4"][0]) is LiftingConv2d
    assert [type(part) for part in second["c8"]][1:2] == [GroupConv2d]
    assert second["p4"][1].group == P4
    assert second["p4"][1].window.step == 2
    assert tuple(second["factored"].out_shape) == (4, 4)
    for name in ("weight_u", "weight_v"):
        drawn = getattr(first["factored"], name).std() > 0
        assert bool(drawn) == (name == "weight_u")
    assert first["s_conv"].bias is None
    assert first["factored"].bias_u is not None


def test_group_path_is_equivariant_on_merged_channels():
    relaxed = margeq.relax(nn.Sequential(*small_cnn()[:3]), torch.randn(1, 3, 9, 9), ("p4",))
    path = sums(relaxed)["2"].paths["p4"].double().requires_grad_(False)
    nn.init.normal_(path[1].weight)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)

    def turned(maps: Tensor, quarters: int) -> Tensor:
        by_element = maps.unflatten(1, (-1, 4)).rot90(quarters, (-2, -1))
        return by_element.roll(1, 2).flatten(1, 2)

    # element r turns by r quarters in one of the two senses
    gaps = [(path(turned(x, q)) - turned(path(x), q)).abs().max() for q in (-1, 1)]
    assert min(gaps) < 1e-12 < max(gaps)


def test_callers_model_is_left_as_it_is():
    model = small_cnn()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    model[2].eval()
    before = deepcopy(model.state_dict())
    random = torch.get_rng_state()
    relaxed = margeq.relax(model, torch.randn(2, 3, 9, 9, generator=torch.Generator()))
    assert torch.equal(random, torch.get_rng_state())
    assert list(model.state_dict()) == list(before)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )
    assert type(model[0]) is nn.Conv2d
    assert (model.training, model[3].training) == (True, False)
    assert (relaxed.training, relaxed[3].training, relaxed[0].training) == (True, False, True)
    assert not any(module.training for module in relaxed[2].modules())
    assert not relaxed[0].paths["conv"].weight.requires_grad
    assert relaxed[0].paths["factored"].weight_v.requires_grad
    relaxed[0].paths["conv"].weight.data.zero_()
    assert bool(model[0].weight.any())


def test_draws_follow_seed_layer_and_path():
    def drawn(**options) -> Tensor:
        relaxed = margeq.relax(model, torch.zeros(1, 3, 9, 9), **options)
        return relaxed[2].paths["factored"].weight_u

    model = small_cnn()
    one = drawn()
    assert torch.equal(one, drawn(paths=("p4", "factored")))
    assert not torch.equal(one, drawn(seed=1))
    pair = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    first, second = margeq.relax(pair, torch.zeros(1, 2, 4, 4))
    both = [layer.paths["factored"].weight_u for layer in (first, second)]
    assert not torch.equal(*both)


def test_inputs_in_double_precision_and_by_name():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(2, 4, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"sum": self.a(left) + self.b(right)}

    model = Two().double()
    x, y = (torch.randn(2, c, 5, 5, dtype=torch.float64) for c in (1, 2))
    for example in ((x, y), {"left": x, "right": y}):
        relaxed = margeq.relax(model, example, ("factored", "p4"))
        assert torch.equal(relaxed(x, y)["sum"], model(x, y)["sum"])
        # both map from pictures, although the second is not called first
        assert [type(relaxed.get_submodule(n).paths["p4"][0]) for n in "ab"] == [LiftingConv2d] * 2


def test_lazy_layers_and_channels_last():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.ReLU(), nn.LazyConv2d(6, 3))
    x = torch.randn(2, 3, 8, 8)
    relaxed = margeq.relax(lazy, x)
    assert [layer.original for layer in relaxation(relaxed).relaxed] == ["conv", "conv"]
    assert type(lazy[0]) is nn.LazyConv2d
    lazy(x)
    model = lazy.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    relaxed = margeq.relax(model, last, ("factored", "s_conv", "p2"))
    assert torch.equal(relaxed(last), model(last))
    assert torch.equal(relaxed(x), model(x))


def test_one_layer_after_the_other():
    model, x = small_cnn().eval(), torch.randn(2, 3, 9, 9)
    first = margeq.relax(model, x, include=["0"])
    both = margeq.relax(first, x, exclude=["0"])
    assert torch.equal(both(x), model(x))
    assert [layer.names for layer in relaxation(both).relaxed] == [("2",)]
    assert [layer.names for layer in relaxation(first).relaxed] == [("0",)]


# -- the way back ----------------------------------------------------------------------------------


def test_state_of_the_original_and_names():
    model = small_cnn()
    relaxed = margeq.relax(model, torch.zeros(1, 3, 9, 9))
    names = relaxation(relaxed).names
    assert names["0.weight"] == "0.paths.conv.weight"
    assert names["7.bias"] == "7.bias"
    parameters = dict(relaxed.named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[names[name]])
    with torch.no_grad():
        for p in relaxed.parameters():
            p.add_(1.0)
    state = relaxation(relaxed).original_state_dict(relaxed)
    assert state.keys() == model.state_dict().keys()
    other = small_cnn()
    other.load_state_dict(state)
    assert torch.equal(other[2].weight, model[2].weight + 1.0)


def test_record_survives_a_copy_and_is_asked_of_relaxed_models_only():
    relaxed = margeq.relax(small_cnn(), torch.zeros(1, 3, 9, 9))
    assert relaxation(deepcopy(relaxed)) == relaxation(relaxed)
    with pytest.raises(ConfigError, match="has no record"):
        relaxation(small_cnn())


def test_model_that_is_a_convolution_itself():
    conv, x = nn.Conv2d(1, 2, 3), torch.randn(1, 1, 5, 5)
    relaxed = margeq.relax(conv, x)
    assert isinstance(relaxed, ResidualPathways)
    assert torch.equal(relaxed(x), conv(x))
    nn.Conv2d(1, 2, 3).load_state_dict(relaxation(relaxed).original_state_dict(relaxed))
    assert relaxation(relaxed).names == {n: f"paths.conv.{n}" for n in ("weight", "bias")}
    assert str(relaxation(relaxed)).startswith("the model itself (Conv2d, 1 x 5 x 5")


# -- which layers ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer of each kind that is left, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.shared
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.sizes = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.unused = nn.Conv2d(4, 4, 3)
        self.named = nn.Conv2d(4, 4, 3, padding=1)
        self.single = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.shared(self.first(x)).relu())
        y = self.sizes(x) + self.sizes(x[..., :4, :4]).mean()
        y = self.up(self.line(self.depthwise(y).flatten(2)).view_as(y))
        return self.named(input=y) + torch.stack([self.single(row) for row in y])


def test_layers_that_are_left_say_why():
    x = torch.randn(2, 1, 6, 6)
    model = Odd().eval()
    relaxed = margeq.relax(model, x)
    assert torch.equal(relaxed(x), model(x))
    assert relaxed.again is relaxed.shared
    lines = {layer.names: layer for layer in relaxation(relaxed).layers}
    assert lines["shared", "again"].original == "conv"
    notes = {names[0]: layer.note for names, layer in lines.items() if not layer.original}
    assert "different sizes" in notes["sizes"]
    assert "4 groups of channels" in notes["depthwise"]
    assert "no candidate paths are known of Conv1d" in notes["line"]
    assert "ConvTranspose2d" in notes["up"]
    assert "not called" in notes["unused"]
    assert "other arguments" in notes["named"]
    assert "no data axis" in notes["single"]
    text = str(relaxation(relaxed))
    assert "shared = again (Conv2d, 4 x 6 x 6 -> 4 x 6 x 6): conv (148) + factored (" in text
    assert "line (Conv1d, 4 x 36 -> 4 x 36): left as it is: no candidate" in text
    state = relaxation(relaxed).original_state_dict(relaxed)
    assert state.keys() == model.state_dict().keys()


def test_depthwise_convolutions_get_what_fits():
    x = torch.randn(2, 1, 6, 6)
    relaxed = margeq.relax(Odd().eval(), x, ("factored", "s_conv", "p4"))
    paths = relaxed.depthwise.paths
    assert list(paths) == ["conv", "s_conv"]
    assert paths["s_conv"].groups == 4
    omitted = next(
        layer.omitted for layer in relaxation(relaxed).relaxed if "depthwise" in layer.names
    )
    assert sorted(omitted) == ["factored", "p4"]


def test_include_and_exclude():
    model, x = UNet(), torch.randn(1, 1, 8, 8)

    def chosen(**options) -> list[str]:
        record = relaxation(margeq.relax(model, x, **options))
        return [layer.names[0] for layer in record.relaxed]

    everything = ["first", "down", "middle", "last", "read_out"]
    assert chosen() == everything
    assert chosen(include=["first", "last"]) == ["first", "last"]
    assert chosen(include="down") == ["down"]
    assert chosen(exclude=["first"]) == everything[1:]
    assert chosen(include=nn.Conv2d, exclude=("middle", "last")) == ["first", "down", "read_out"]
    inside = nn.Sequential(model, nn.Flatten())
    assert relaxation(margeq.relax(inside, x, include=["0"])).relaxed
    with pytest.raises(ConfigError, match=r"no layer of Sequential is relaxed:\n- 0.first.*exclu"):
        margeq.relax(inside, x, exclude=[UNet])
    for entry in ("firs", "first.wei", 3, int):
        with pytest.raises(ConfigError, match=r"is no module of the model.*first, down, middle"):
            margeq.relax(model, x, exclude=[entry])
        with pytest.raises(ConfigError, match="include: "):
            margeq.relax(model, x, include=[entry])


def test_layers_in_path_sums_are_candidates_already():
    x = torch.randn(2, 1, 16, 16)
    both = models.digit_network(3)
    with pytest.raises(ConfigError, match="in a candidate path already"):
        margeq.relax(both, x)
    alone = models.digit_network(3, paths=("conv",))
    relaxed = margeq.relax(alone, x)
    assert isinstance(relaxed.layer1.paths["conv"][0], ResidualPathways)


def test_linear_layers_on_maps():
    x = torch.randn(2, 2, 6, 6)
    model = nn.Sequential(
        Linear2d(2, 4, (6, 6), (3, 3)), nn.ReLU(), Linear2d(4, 4, (3, 3), (2, 2)),
        nn.Flatten(), Linear2d(4, 4, 4, 2),
    )  # fmt: skip
    relaxed = margeq.relax(model, x, ("conv", "factored", "p4", "s_conv"))
    assert torch.equal(relaxed(x), model(x))
    first, second = relaxed[0].paths, relaxed[2].paths
    assert list(first) == ["fc", "conv", "factored", "p4", "s_conv"]
    assert (first["conv"].stride, first["conv"].padding_mode) == ((2, 2), "circular")
    assert list(second) == ["fc", "factored"]
    note = relaxation(relaxed).relaxed[1].omitted["conv"]
    assert note == "no convolution maps (3, 3) to (2, 2) pixels"
    assert list(relaxed[4].paths) == ["fc", "factored"]  # maps along a line
    assert relaxation(relaxed).names["0.weight"] == "0.paths.fc.weight"


def test_windows_that_turns_cannot_keep():
    convs = {
        "kernel": nn.Conv2d(4, 4, (3, 1)),
        "padding": nn.Conv2d(4, 4, 3, padding=(1, 0)),
        "channels": nn.Conv2d(4, 6, 3),
        "same": nn.Conv2d(6, 4, 3, padding="same"),
    }
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding="valid"), *convs.values())
    relaxed = margeq.relax(model, torch.randn(1, 1, 12, 12), ("p4", "factored"))
    assert list(relaxed[0].paths) == ["conv", "p4", "factored"]
    reasons = [layer.omitted["p4"] for layer in relaxation(relaxed).relaxed[1:]]
    assert "kernel_size=(3, 1) differs" in reasons[0]
    assert "padding=(1, 0) differs" in reasons[1]
    assert "4 -> 6 channels are no maps on P4" in reasons[2]
    assert "6 -> 4 channels" in reasons[3]


# -- which paths -----------------------------------------------------------------------------------


def test_dense_path_above_the_limit_names_the_smaller_ones():
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), torch.zeros(1, 2, 8, 8)
    dense, factored, sparse = 2 * 3 * 64 * 64, 2 * 3 * 128, 2 * 3 * 64
    message = f"0: the dense path would have {dense:,} .*'factored' .* {factored:,}.*{sparse:,}"
    with pytest.raises(ConfigError, match=message):
        margeq.relax(model, x, ("fc",), largest_path=dense - 1)
    relaxed = margeq.relax(model, x, ("fc", "factored", "s_factored"), largest_path=dense)
    counts = [sum(p.numel() for p in path.parameters()) for path in relaxed[0].paths.values()]
    assert counts[1] == dense + 3 * 64
    assert [p.weight_u.numel() + p.weight_v.numel() for p in list(relaxed[0].paths.values())[2:]] \
        == [factored, sparse]  # fmt: skip
    with pytest.raises(ConfigError, match="largest_path=0"):
        margeq.relax(model, x, largest_path=0)
    with pytest.raises(ConfigError, match="more than largest_path=10,000,000"):
        margeq.relax(nn.Conv2d(3, 64, 3), torch.zeros(1, 3, 32, 32), ("fc",))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("factored", r"use a tuple of names, \('factored',\)"),
        ((), "paths is empty"),
        (("p5",), "unknown path 'p5'; use conv, fc, factored, s_conv, s_factored, a group"),
        (("c1",), "unknown path 'c1'"),
        ((len,), "own paths need a mapping"),
        ({"conv": len}, "'conv' is the path of original layers"),
        ({"mine": 3}, "use a name or a function"),
        ({"mine": lambda *_: 3}, "returned a int, not a module"),
        ({"mine": lambda *_: nn.Conv2d(3, 8, 1)}, r"0: the path 'mine' returns \(8, 9, 9\)"),
        ({"mine": lambda *_: nn.Flatten()}, r"returns \(243,\)"),
        ({"a.b": "factored"}, "plain words without dots"),
    ],
)
def test_paths_that_cannot_be(paths, message):
    x = torch.zeros(1, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(ConfigError, match=message):
        margeq.relax(model, x, paths)


def test_own_paths():
    seen = []

    def mine(conv, in_shape, out_shape):
        seen.append((type(conv), tuple(in_shape), tuple(out_shape)))
        if in_shape[0] == 3:
            return None
        middle = nn.Conv2d(in_shape[0], 5, 3, stride=2)
        return nn.Sequential(middle, nn.Conv2d(5, out_shape[0], 1), nn.BatchNorm2d(out_shape[0]))

    model, x = small_cnn().eval(), torch.randn(4, 3, 9, 9)
    relaxed = margeq.relax(model, x, {"mine": mine, "turned": "p4"})
    assert seen == [(nn.Conv2d, (3, 9, 9), (8, 9, 9)), (nn.Conv2d, (8, 9, 9), (8, 4, 4))]
    assert torch.equal(relaxed(x), model(x))
    assert list(relaxed[0].paths) == ["conv", "turned"]
    mine_path = relaxed[2].paths["mine"]
    assert not mine_path[2].weight.any()  # the last map with weights, and no other
    assert bool(mine_path[1].weight.any())
    assert not mine_path.training
    assert relaxation(relaxed).relaxed[0].omitted == {"mine": "its function returned none"}


class Offset(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1.0


@pytest.mark.parametrize(
    "path",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), Offset()),
        nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0.5, 1.0), nn.Threshold(0.6, 0.0)),
    ],
)
def test_paths_that_cannot_start_at_zero(path):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 9, 9)
    own = {"mine": lambda *_: path}
    with pytest.raises(ConfigError, match="0: the path 'mine' cannot start at the zero function"):
        margeq.relax(model, x, own)


# -- models that cannot be relaxed -----------------------------------------------------------------


def test_models_without_convolutions_and_no_models():
    with pytest.raises(ConfigError, match="no layer of Linear is relaxed: it has no convolutions"):
        margeq.relax(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(ConfigError, match=r"model is a function, not a torch\.nn\.Module"):
        margeq.relax(small_cnn, torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="conv is its only path"):
        margeq.relax(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 4, 4), ("conv",))


class Counting(nn.Module):
    """Another function at each call, or one that looks at its layer."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.conv, self.looks, self.calls = nn.Conv2d(1, 2, 3), looks, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * (self.conv.out_channels if self.looks else self.calls)


def test_models_whose_outputs_would_change():
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(ConversionError, match="outputs differ from the model's by"):
        margeq.relax(Counting(looks=False), x)
    with pytest.raises(ConversionError, match=r"looks at attributes .*out_channels.*exclude"):
        margeq.relax(Counting(looks=True), x)

    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "no tensor"

    with pytest.raises(ConversionError, match="returns a str"):
        margeq.relax(nn.Sequential(nn.Conv2d(1, 1, 1), Text()), x)


def test_largest_difference():
    a = torch.tensor([1.0, float("nan"), float("inf"), 4.0])
    assert largest_difference([a], [a.clone()]) == 0.0
    assert largest_difference([a[:1]], [a[3:]]) == 3.0
    assert largest_difference([a[3:]], [a[:1]]) == 0.75  # in units of the first
    assert largest_difference([a], [a[:2]]) == float("inf")
    gap = largest_difference([a[:1]], [a[1:2]])
    assert gap != gap
    assert largest_difference([torch.zeros(0)], [torch.zeros(0)]) == 0.0


# -- training --------------------------------------------------------------------------------------


def a_loader(n: int, *shape: int, n_classes: int = 4) -> DataLoader:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, *shape), torch.arange(n) % n_classes)
    return DataLoader(data, batch_size=8)


TRAINED = {
    "resnet": (small_resnet, (3, 8, 8), 4),
    "vgg": (small_vgg, (3, 8, 8), 4),
    "unet": (UNet, (1, 8, 8), 3),
    "ella": (
        lambda: models.ella("conv", width=1, in_channels=1, num_classes=4, size=8), (1, 8, 8), 4
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", TRAINED)
def test_training_names_every_layer(name, tmp_path):
    make, shape, n_classes = TRAINED[name]
    loader = a_loader(16, *shape, n_classes=n_classes)
    model = make()
    relaxed = margeq.relax(model, loader.dataset[0][0][None])
    result = margeq.optimize_marglik(
        relaxed, loader, n_epochs=1, n_epochs_burnin=1, seed=0, hessian_root="mc",
        restarts=["current"],
    )  # fmt: skip
    table = result.effective_dimension()
    rows = {(row.layer, row.path) for row in table.paths}
    for layer in relaxation(relaxed).relaxed:
        assert {(layer.names[0], path) for path in layer.paths} <= rows
        assert layer.names[0] in table.selected
    layers = {row.layer for row in table.paths}
    weights = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    inside = {layer.names[0] for layer in relaxation(relaxed).relaxed}
    # ELLA's layers are in path sums of their own
    assert {n for n in weights if n not in inside and ".paths." not in n} <= layers
    assert torch.isfinite(torch.tensor(result.log_marginal_likelihood))
    require_named(result, relaxed, tmp_path)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ([] if name != "resnet" else list(NORMS))
    held = {name for unit in result.diagnostics.held_norms for name in unit}
    assert held >= {f"{layer}.paths.conv.weight" for layer in NORMS.values() if norms}


NORMS = {"1": "0", "3.bn1": "3.conv1", "3.bn2": "3.conv2", "4.bn1": "4.conv1", "4.bn2": "4.conv2",
         "4.downsample.1": "4.downsample.0"}  # fmt: skip
"""BatchNorm -> the convolution before it, whose norm is held."""


def require_named(result: margeq.MargLikResult, relaxed: nn.Module, directory: Path) -> None:
    """Every layer with weights, norms too, stands in the table and on the page."""
    page = result.report(directory).read_text(encoding="utf-8")
    text = str(result.effective_dimension())
    weights = margeq.named_weights(relaxed)
    for layer in {name.rpartition(".")[0].partition(".paths.")[0] for name in weights}:
        assert layer in text
        assert layer in page
    assert {row.name for row in result.effective_dimension().tensors} == weights.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::margeq.errors.NumericalWarning")  # of single precision
@pytest.mark.parametrize(
    ("make", "size"),
    [(resnet18, 8), (vgg11, 32), (lambda: models.ella("conv", width=20), 32)],
    ids=["resnet18", "vgg11", "ella"],
)
def test_training_of_full_widths(make, size, tmp_path):
    """Of one processor 86 s for ResNet-18, 57 s for VGG-11, less for ELLA; and 2.5 GB."""
    loader = a_loader(8, 3, size, size, n_classes=10)
    x = loader.dataset[0][0][None]
    model = make().eval()
    model(x)
    relaxed = margeq.relax(model, x, ("s_conv",))
    assert torch.equal(relaxed(x), model(x))
    result = margeq.optimize_marglik(
        relaxed, loader, n_epochs=1, n_epochs_burnin=1, restarts=["current"], seed=0,
        hessian_root="mc",
    )  # fmt: skip
    layers = {row.layer for row in result.effective_dimension().paths}
    assert {layer.names[0] for layer in relaxation(relaxed).relaxed} <= layers
    require_named(result, relaxed, tmp_path)


def trained_current(relaxed: nn.Module, loader: DataLoader, lr: float, n_epochs: int, **options):
    return margeq.optimize_marglik(
        relaxed, loader, n_epochs=n_epochs, n_epochs_burnin=1, marglik_frequency=1, seed=0,
        restarts=["current"], optimizer_kwargs={"lr": lr}, **options,
    )  # fmt: skip


def test_weights_at_zero_keep_their_precision():
    """MacKay's fixed point divides by their norm."""
    loader = a_loader(16, 1, 6, 6)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 4))
    relaxed = margeq.relax(model, torch.zeros(1, 1, 6, 6), ("factored", "p4"))
    state = margeq.laplace.accumulate(relaxed, loader)
    prior = margeq.GaussianPrior(relaxed, prior_precision=3.0)
    mackay_step(decompose(state), prior, margeq.Categorical())
    for name in ("p4.0.weight", "factored.weight_v", "factored.bias_v"):
        assert float(prior.prior_precision[f"0.paths.{name}"]) == pytest.approx(3.0, rel=1e-12)
    assert float(prior.prior_precision["0.paths.conv.weight"]) != pytest.approx(3.0, rel=1e-3)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("prior", ["layerwise", "tied", "pathwise"])
def test_precisions_of_new_paths_do_not_run_away(prior):
    """One epoch after zero and an update after each: within a factor 1e4 of function scale."""
    loader = a_loader(64, 1, 6, 6)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    relaxed = margeq.relax(model, torch.zeros(1, 1, 6, 6), ("factored", "p4"))
    result = trained_current(relaxed, loader, 1e-3, 2, prior=prior)
    for update in result.history.updates:
        for group, value in update.prior_precision.items():
            if "paths" in group:
                assert abs(math.log(value) - result.prior.log_center[group]) < math.log(1e4)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_path_that_the_data_need_grows_from_zero():
    """Which half is bright? A circular convolution and a mean over positions cannot tell."""
    torch.manual_seed(0)
    y = torch.arange(96) % 2
    x = torch.zeros(96, 1, 6, 6)
    x[y == 0, :, :, :3] = 1.0
    x[y == 1, :, :, 3:] = 1.0
    loader = DataLoader(TensorDataset(x + 0.3 * torch.randn_like(x), y), batch_size=16)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    relaxed = margeq.relax(model, x[:1], ("factored",))
    result = trained_current(relaxed, loader, 2e-2, 12)
    row = result.effective_dimension().of("0", "factored")
    assert row.function_share > 0.2
    accuracy = (relaxed.eval()(x).argmax(1) == y).double().mean()
    assert accuracy > 0.95


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_restarts_other_than_current_draw_anew():
    loader = a_loader(16, 1, 6, 6)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    nn.init.constant_(model[0].weight, 3.0)
    relaxed = margeq.relax(model, torch.zeros(1, 1, 6, 6))
    margeq.optimize_marglik(
        relaxed, loader, n_epochs=1, n_epochs_burnin=1, restarts=["symmetric"], seed=0,
        optimizer_kwargs={"lr": 1e-12},
    )  # fmt: skip
    assert bool(relaxed[0].paths["factored"].weight_v.any())
    assert bool((relaxed[0].paths["conv"].weight < 2.9).all())
