"""Plain networks from those with candidate paths and group layers."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from copy import deepcopy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq import models
from margeq.convert import cost_table, costs
from margeq.convert.folding import folded, scaled
from margeq.errors import ConfigError, ConversionError, UnsupportedLayerError
from margeq.groups import P2, P4, P4M, Z2
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    GroupGate,
    GroupPool,
    Lift,
    LiftingConv2d,
    MergeGroup,
    MonotoneGates,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    PerElement,
    PolyphaseSubsample,
    ResidualPathways,
    SparseConv2d,
    SplitGroup,
)
from margeq.models.planar_layers import SeparableConv2d
from tests.layer_cases import LAYER_CASES

DOUBLE = torch.float64
WITHOUT = ("MonteCarlo", "on_two_samples")


def shaken(model: nn.Module) -> nn.Module:
    """No parameter at zero, and norms that do something in evaluation mode."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def require_same(plain: nn.Module, model: nn.Module, x: Tensor, rtol: float | None = None) -> None:
    """The same outputs, and nothing of margeq left."""
    with torch.no_grad():
        y, expected = plain(x), model(x)
    tolerance = rtol or (1e-10 if x.dtype == DOUBLE else 1e-5)
    assert float((y - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
    for module in plain.modules():
        assert not any(kind.__module__.startswith("margeq") for kind in type(module).__mro__)
        assert not any("margeq" in type(value).__module__ for value in vars(module).values())


# -- layer by layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_every_layer(case):
    model = shaken(nn.Sequential(case.make()).double())
    x = torch.randn(*case.input_shape, dtype=DOUBLE)
    if case.name.startswith(WITHOUT):
        with pytest.raises(UnsupportedLayerError, match="has no plain form"):
            margeq.harden(model)
    else:
        require_same(margeq.harden(model), model, x)


def test_maps_without_weights():
    model = nn.Sequential(
        Lift(P4), GroupGate(P4, 0.6), PerElement(nn.MaxPool2d(2)), MergeGroup(), nn.ReLU(),
        SplitGroup(P4), PerElement(PolyphaseSubsample()), GroupPool(P4),
    )  # fmt: skip
    x = torch.randn(3, 2, 8, 8)
    plain = margeq.harden(model)
    assert torch.equal(plain(x), model(x))
    require_same(plain, model, x)
    mean = nn.Sequential(Lift(P4M), PolyphaseSubsample(), GroupPool(P4M, "mean"))
    require_same(margeq.harden(mean), mean, x)


def test_factored_path_keeps_its_size():
    layer = FactoredLinear2d(3, 5, (4, 6), (2, 3))
    plain = margeq.harden(shaken(layer), example_input=torch.randn(2, 3, 4, 6))
    kinds = [type(module).__name__ for module in plain]
    assert kinds == ["Factors", "Unflatten"]
    weights = [part.weight.numel() for part in plain.modules() if isinstance(part, nn.Conv1d)]
    assert weights == [layer.weight_u.numel(), layer.weight_v.numel()]
    assert sum(p.numel() for p in plain.parameters()) == sum(weights) + 5 * 6  # one bias


def test_group_layers_become_convolutions():
    model = nn.Sequential(
        LiftingConv2d(1, 2, 3, group=P4, padding=1), nn.BatchNorm3d(2), nn.ReLU(),
        GroupConv2d(2, 3, 3, group=P4, stride=2), GroupPool(P4),
    )  # fmt: skip
    plain = margeq.harden(shaken(model), example_input=torch.randn(2, 1, 7, 7))
    kinds = [[type(part) for part in module.children()] for module in plain]
    assert kinds[0] == [nn.Conv2d, nn.Unflatten]
    assert kinds[3] == [nn.Flatten, nn.Conv2d, nn.Unflatten]
    assert type(plain[1]) is nn.BatchNorm3d
    assert plain[3][1].weight.shape == (12, 8, 3, 3)


def test_layers_that_see_some_elements_alone():
    first = PartialLiftingConv2d(1, 2, 3, group=P4, width=0.5, padding=1)
    second = PartialGroupConv2d(2, 3, 3, group=P4, width=0.5, input_gate=first.gate)
    model = nn.Sequential(first, second).double()
    plain = margeq.harden(model)
    require_same(plain, model, torch.randn(2, 1, 6, 6, dtype=DOUBLE))
    seen = plain[1][1].weight.unflatten(1, (2, 4)).abs().sum((0, 1, 3, 4)) > 0
    assert seen.tolist() == [True, True, False, True]


# -- sums of paths ---------------------------------------------------------------------------------


def fold(paths: dict[str, nn.Module], x: Tensor, reduction: str = "sum") -> nn.Module:
    model = shaken(ResidualPathways(paths, reduction).double())
    plain = margeq.harden(model)
    require_same(plain, model, x)
    return plain


def test_everything_that_is_a_convolution_folds_into_one():
    x = torch.randn(2, 4, 9, 8, dtype=DOUBLE)
    gconv = GroupConv2d(1, 2, 3, group=P4, padding=1)
    paths = {
        "conv": nn.Conv2d(4, 8, 3, padding=1),
        "large": nn.Conv2d(4, 8, (5, 3), padding=(2, 1)),
        "dilated": nn.Conv2d(4, 8, 3, padding=2, dilation=2, bias=False),
        "pointwise": nn.Conv2d(4, 8, 1, padding_mode="circular"),
        "grouped": nn.Conv2d(4, 8, 3, padding="same", groups=2),
        "sparse": SparseConv2d(4, 8, 3, padding=1),
        "p4": nn.Sequential(SplitGroup(P4), gconv, MergeGroup()),
        "lifting": nn.Sequential(LiftingConv2d(4, 2, 3, group=P4, padding=1), MergeGroup()),
        "named": nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(4, 8, 1))),
    }
    for reduction in ("sum", "mean"):
        plain = fold(paths, x, reduction)
        assert type(plain) is nn.Conv2d
        assert (plain.kernel_size, plain.dilation, plain.padding) == ((5, 5), (1, 1), (2, 2))


def sums(*windows: dict) -> tuple[list[nn.Conv2d], list[nn.Conv2d]]:
    convs = [nn.Conv2d(4, 4, **window).double() for window in windows]
    return convs, folded(convs)


def same_sum(before: list[nn.Conv2d], after: list[nn.Conv2d], size: tuple[int, int]) -> None:
    x = torch.randn(2, 4, *size, dtype=DOUBLE)
    y, expected = (sum(conv(x) for conv in convs) for convs in (after, before))
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)


FOLDED = [
    ({"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 1, "stride": 2}, (3, 1)),
    ({"kernel_size": 3}, {"kernel_size": 3}, (3, 1)),
    ({"kernel_size": 2, "padding": 1}, {"kernel_size": 4, "padding": 2}, (4, 1)),
    ({"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 1}, (3, 2)),
    ({"kernel_size": 3, "dilation": 4, "padding": 4},
     {"kernel_size": 3, "dilation": 2, "padding": 2}, (5, 2)),
    ({"kernel_size": 5, "padding": "same"}, {"kernel_size": 3, "padding": 1}, (5, 1)),
    ({"kernel_size": 1}, {"kernel_size": 1, "padding": "valid"}, (1, 1)),
    ({"kernel_size": 3, "padding": 1}, {"kernel_size": 2, "padding": "same"}, (3, 1)),
    *(
        ({"kernel_size": 3, "padding": 1, "padding_mode": mode},
         {"kernel_size": 5, "padding": 2, "padding_mode": mode, "bias": False}, (5, 1))
        for mode in ("circular", "reflect", "replicate")
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize(("one", "other", "shape"), FOLDED)
def test_windows_that_fold(one, other, shape):
    for windows in ((one, other), (other, one)):
        before, after = sums(*windows)
        assert len(after) == 1
        assert (after[0].kernel_size[0], after[0].dilation[0]) == shape
        same_sum(before, after, (9, 8))
    three_before, three_after = sums(one, other, one)
    assert len(three_after) == 1
    same_sum(three_before, three_after, (8, 11))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}),
        ({"kernel_size": 3, "padding": 1},
         {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
        ({"kernel_size": 2, "padding": "same"}, {"kernel_size": 2, "padding": "same"}),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": 2, "stride": 2}),
        ({"kernel_size": 3, "padding": 0}, {"kernel_size": 1, "padding": 1}),
        ({"kernel_size": 5, "padding": 2, "groups": 4}, {"kernel_size": 1}),
    ],
)  # fmt: skip
def test_windows_that_stay_apart(one, other):
    before, after = sums(one, other)
    assert len(after) == 2
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("groups", [*itertools.product([1, 2, 4], repeat=2)])
def test_groups_of_channels(groups):
    windows = [{"kernel_size": 3, "padding": 1, "groups": number} for number in groups]
    before, after = sums(*windows)
    assert len(after) == 1
    assert after[0].groups == min(groups)
    same_sum(before, after, (5, 5))


def test_flags_and_factors_of_folded_convolutions():
    frozen, other = (nn.Conv2d(2, 2, 3).eval().requires_grad_(False) for _ in range(2))
    (both,) = folded([frozen, other])
    assert not both.weight.requires_grad
    assert not both.training
    assert both.weight.is_contiguous()
    conv = scaled(nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", groups=2), 0.5)
    assert (conv.padding, conv.padding_mode, conv.groups) == ("same", "circular", 2)


def test_sums_that_do_not_fold():
    x = torch.randn(3, 2, 8, 8, dtype=DOUBLE)
    half = ((8, 8), (4, 4))
    paths = {
        "conv": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), PolyphaseSubsample()),
        "fc": FactoredLinear2d(2, 4, *half),
        "strided": nn.Conv2d(2, 4, 3, stride=2, padding=1),
        "pointwise": nn.Conv2d(2, 4, 1, stride=2),
    }
    for reduction in ("sum", "mean"):
        plain = fold(dict(paths), x, reduction)
        assert isinstance(plain, fx.GraphModule)
        assert sorted(name for name, _ in plain.terms.named_children()) == ["conv", "fc", "strided"]
    alone = fold({"conv": paths["conv"]}, x)
    assert type(alone[0]) is nn.Conv2d
    model = ResidualPathways({name: paths[name] for name in ("conv", "fc")}).double()
    model.switch_off("fc")
    require_same(margeq.harden(model), model, x)  # the mean still divides by two


def test_paths_that_are_subsampled_together():
    x = torch.randn(3, 2, 4, 8, 8, dtype=DOUBLE)
    paths = {
        "gconv": GroupConv2d(2, 3, 3, group=P4, padding=1),
        "conv": nn.Sequential(MergeGroup(), nn.Conv2d(8, 12, 3, padding=1), SplitGroup(P4)),
        "fc": nn.Sequential(MergeGroup(), FactoredLinear2d(8, 12, (8, 8), (4, 4)), SplitGroup(P4)),
    }
    model = ResidualPathways(paths, "mean", PolyphaseSubsample(), ("gconv", "conv")).double()
    plain = margeq.harden(shaken(model))
    require_same(plain, model, x)
    convs = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 1  # of both
    for off in ("fc", "gconv"):
        model.switch_off(off)
        require_same(margeq.harden(model), model, x)
    model.switch_on("fc")
    model.switch_off("conv")
    require_same(margeq.harden(model), model, x)  # no path before the subsampling is left


def test_sums_inside_of_paths_and_identities():
    inner = ResidualPathways({"a": nn.Conv2d(2, 2, 3, padding=1), "b": nn.Conv2d(2, 2, 1)})
    inner.switch_off("a")
    outer = ResidualPathways({"sum": nn.Sequential(inner, nn.ReLU()), "same": nn.Identity()}, "sum")
    require_same(margeq.harden(outer), outer, torch.randn(2, 2, 5, 5))
    groups = {
        str(group): nn.Sequential(SplitGroup(group), GroupGate(group, 0.6), MergeGroup())
        for group in (P4, P2)
    }
    split = ResidualPathways(groups, "sum")
    require_same(margeq.harden(split), split, torch.randn(2, 8, 5, 5))
    two = ResidualPathways({"a": nn.Identity(), "b": nn.Identity()}, "mean")
    require_same(margeq.harden(two), two, torch.randn(2, 2, 5, 5))


# -- networks --------------------------------------------------------------------------------------

NETWORKS = {
    "digits": (lambda: models.digit_network(4), (1, 16, 16)),
    "group-digits": (
        lambda: models.group_digit_network(4, paths=("gconv", "partial", "conv", "fc")),
        (1, 16, 16),
    ),
    **{
        kind: (lambda kind=kind: models.ella(kind, width=2, in_channels=1, size=16), (1, 16, 16))
        for kind in ("fc+f_fc", "s_fc+s_conv+conv", "f_fc+conv+gconv")
    },
    "ella-reference": (
        lambda: models.ella("f_fc+conv", width=2, in_channels=1, size=16, reference=True),
        (1, 16, 16),
    ),
    **{
        kind: (lambda kind=kind: models.rotmnist_cnn(kind, width=3), (1, 28, 28))
        for kind in ("z2", "c-z2", "p4", "g-p4", "gc-p4m")
    },
    "partial": (lambda: models.partial_cnn(4, width=0.6), (1, 16, 16)),
    "gates": (lambda: MonotoneGates(models.partial_cnn(4, width=0.6), 2.0), (1, 16, 16)),
    "resnet-p4": (lambda: models.resnet44(P4, (2, 2, 2)), (3, 32, 32)),
    "resnet-z2": (lambda: models.resnet44(Z2, (2, 2, 2)), (3, 32, 32)),
    "all-cnn": (lambda: models.all_cnn_c(P4M, (1, 2)), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, shape = NETWORKS[name]
    model, x = shaken(make()), torch.randn(4, *shape)
    plain = margeq.harden(model, example_input=x)
    require_same(plain, model, x)
    require_same(margeq.harden(plain), model, x)


def test_caller_keeps_the_model_and_flags_go_over():
    model = models.digit_network(4)
    model.head.weight.requires_grad_(False)
    model.layer1.paths["fc"].weight_u.requires_grad_(False)
    model.relu1.eval()
    state = deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    plain = margeq.harden(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    assert (plain.training, plain.relu1.training, plain.layer2.training) == (True, False, True)
    assert not plain.head.weight.requires_grad
    frozen = [module for module in plain.layer1.modules() if isinstance(module, nn.Conv1d)]
    assert [conv.weight.requires_grad for conv in frozen] == [False, True]
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in plain.parameters()}
    assert not shared
    plain(torch.randn(2, 1, 16, 16)).sum().backward()


def test_parts_keep_their_own_mode():
    norm = nn.BatchNorm2d(2).eval()
    model = nn.Sequential(
        PerElement(nn.Sequential(nn.Dropout(0.5).eval(), nn.MaxPool2d(2))), MergeGroup(),
        ResidualPathways({"a": nn.Sequential(nn.Conv2d(8, 2, 1), norm), "b": nn.Conv2d(8, 2, 3)}),
        SparseConv2d(2, 2, 3).eval(),
    )  # fmt: skip
    plain = margeq.harden(model)
    flags = {type(module): module.training for module in plain.modules()}
    assert (flags[nn.Dropout], flags[nn.BatchNorm2d], flags[nn.Flatten]) == (False, False, True)
    assert (plain[2].training, plain[2].get_submodule("terms.b").training, plain[3].training) == (
        True,
        True,
        False,
    )
    assert not any(module.training for module in margeq.harden(model.eval()).modules())


def test_modules_that_stand_there_twice():
    layer = SparseConv2d(2, 2, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plain = margeq.harden(model)
    require_same(plain, model, torch.randn(2, 2, 5, 5))
    assert plain[0] is plain[2]
    inside = SeparableConv2d(2, 2, 3)
    inside.plane = inside.channels
    require_same(margeq.harden(inside), inside, torch.randn(2, 2, 5, 5))


def test_users_modules_stay_what_they_are():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = LiftingConv2d(1, 2, 3, group=P4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean() if x.sum() > 0 else self.conv(x).sum()

    model = Mine()
    plain = margeq.harden(model, example_input=torch.rand(1, 1, 5, 5))
    assert type(plain) is Mine
    require_same(plain, model, -torch.rand(1, 1, 5, 5))


# -- what cannot be --------------------------------------------------------------------------------


def test_modules_without_a_plain_form_are_named():
    class Mine(GroupPool):
        pass

    with pytest.raises(UnsupportedLayerError, match=r"1 \(Mine\) has no plain form; replace"):
        margeq.harden(nn.Sequential(nn.ReLU(), Mine(P4)))
    with pytest.raises(UnsupportedLayerError, match=r"the model itself \(Mine\) has no plain"):
        margeq.harden(Mine(P4))
    with pytest.raises(ConfigError, match="model is a int"):
        margeq.harden(3)


def test_containers_that_cannot_be_traced():
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    Branches.__module__ = "margeq.models.unknown"
    with pytest.raises(UnsupportedLayerError, match=r"0 \(Branches\) has no plain form \("):
        margeq.harden(nn.Sequential(Branches()))


def test_outputs_that_differ():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return x * Counting.calls

    x = torch.randn(1, 2)
    margeq.harden(Counting())
    with pytest.raises(ConversionError, match=r"differ from the model's by .*, more than 1e-05"):
        margeq.harden(Counting(), example_input=x)
    with pytest.raises(ConversionError, match="more than 1e-10"):
        margeq.harden(Counting(), example_input=x.double())


# -- after training --------------------------------------------------------------------------------


def bars(n: int) -> TensorDataset:
    """Upright and lying bars anywhere: no path but a convolution is needed."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 2
    images = 0.1 * torch.randn(n, 1, 16, 16)
    for image, label in zip(images, labels, strict=True):
        row, column = torch.randint(0, 10, (2,)).tolist()
        if label:
            image[0, row : row + 6, column] += 1
        else:
            image[0, row, column : column + 6] += 1
    return TensorDataset(images, labels)


def train(model: nn.Module, data: TensorDataset, start: str) -> margeq.MargLikResult:
    return margeq.optimize_marglik(
        model, DataLoader(data, batch_size=32), n_epochs=12, n_epochs_burnin=6,
        marglik_frequency=1, seed=0, restarts=[start], optimizer_kwargs={"lr": 1e-2},
        hessian_root="mc",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, margeq.MargLikResult, Tensor]:
    data = bars(192)
    model = models.digit_network(2, widths=(4, 8))
    result = train(model, data, "symmetric")
    assert float(model(data.tensors[0]).detach().std()) > 1.0  # it has learned something
    return model, result, data.tensors[0]


pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def test_paths_that_are_off_are_dropped(trained):
    model, result, images = trained
    rows = result.effective_dimension().paths
    off = [(row.layer, row.path) for row in rows if row.verdict == "off"]
    assert ("layer1", "fc") in off
    plain = margeq.harden(model, result, example_input=images[:64])
    reference = deepcopy(model)
    for layer, path in off:
        reference.get_submodule(layer).switch_off(path)
    require_same(plain, reference, images)
    assert isinstance(plain.layer1, nn.Sequential)
    assert type(plain.layer1[0]) is nn.Conv2d
    before, after = (costs(m, images, repeats=5) for m in (model, plain))
    selected = sum(p.numel() for name, p in model.named_parameters() if not _is_off(name, off))
    assert len(off) == 2
    assert after.parameters == selected < 0.2 * before.parameters
    conv_macs = 4 * 9 * 16 * 16 + 8 * 4 * 9 * 8 * 8 + 8 * 2
    assert after.macs == conv_macs <= before.macs
    for pathways in (model.layer1, model.layer2):
        assert pathways.active == ("conv",)
    everything = deepcopy(model)
    everything.layer1.switch_on("fc")
    everything.layer2.switch_on("fc")
    assert after.macs < costs(everything, images, repeats=1).macs
    # one of five comparisons, on a machine with other work
    assert any(
        costs(plain, images, repeats=9).latency < costs(everything, images, repeats=9).latency
        for _ in range(5)
    )


def test_a_verdict_drops_what_is_still_computed(trained):
    model, result, images = trained
    other = deepcopy(model)
    other.layer1.switch_on("fc")
    nn.init.normal_(other.layer1.paths["fc"].weight_v)
    nn.init.normal_(other.layer1.paths["fc"].weight_u)
    plain = margeq.harden(other, result, example_input=images[:8])
    assert other.layer1.active == ("conv", "fc")
    require_same(plain, margeq.harden(model), images)
    assert float((other(images[:8]) - plain(images[:8])).detach().abs().max()) > 0.1


def _is_off(name: str, off: list[tuple[str, str]]) -> bool:
    return any(name.startswith(f"{layer}.paths.{path}.") for layer, path in off)


def test_results_of_another_model(trained):
    model, result, _ = trained
    with pytest.raises(ConfigError, match="path 'conv' of 'layer1', which this model does not"):
        margeq.harden(nn.Linear(2, 2), result)
    other = deepcopy(model)
    other.layer1.switch_on("fc")
    other.layer1.switch_off("conv")
    with pytest.raises(ConfigError, match="layer1: fc are off in result, and every other path"):
        margeq.harden(other, result)


def test_relaxed_network_after_training():
    data = bars(96)
    images = data.tensors[0]
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    model = margeq.relax(original, images[:2], ("factored", "p4", "s_conv"))
    result = train(model, data, "only:p4")
    assert model[2].active == ("p4",)
    plain = margeq.harden(model, result, example_input=images[:32])
    require_same(plain, model, images)
    assert [type(plain[0]), type(plain[2])] == [nn.Conv2d] * 2
    before, after = (sum(p.numel() for p in m.parameters()) for m in (original, plain))
    assert after == before - 8  # p4 has no biases
    # with every path on, three of four are one convolution
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.1)
    for pathways in (model[0], model[2]):
        for path in pathways.paths:
            pathways.switch_on(path)
    plain = margeq.harden(model, example_input=images[:8])
    assert len([m for m in plain.modules() if isinstance(m, nn.Conv2d)]) == 2
    before, after = (costs(m, images, repeats=9) for m in (model, plain))
    assert after.macs < before.macs
    weights = [sum(p.numel() for p in m.parameters() if p.ndim > 1) for m in (model, plain)]
    assert weights[1] < weights[0]


# -- out of margeq ---------------------------------------------------------------------------------

LOADS = """
    import sys
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "margeq":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Refuse())
    import torch
    program = torch.export.load(sys.argv[1])
    x, y = torch.load(sys.argv[2], weights_only=True)
    with torch.no_grad():
        assert torch.equal(program.module()(x), y)
        assert program.module()(x[:1]).shape == y[:1].shape
    assert not [name for name in sys.modules if name.split(".")[0] == "margeq"]
"""

EXPORTED = ["digits", "group-digits", "gc-p4m"]


@pytest.mark.parametrize("name", EXPORTED)
def test_export_and_load_without_margeq(name, tmp_path):
    make, shape = NETWORKS[name]
    model, x = shaken(make()), torch.randn(4, *shape)
    plain = margeq.harden(model)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "plain.pt2")
    y = plain(x).detach()
    torch.save((x, y), tmp_path / "data.pt")
    assert torch.equal(torch.export.load(tmp_path / "plain.pt2").module()(x), y)
    if name == EXPORTED[0]:
        script = [sys.executable, "-c", textwrap.dedent(LOADS)]
        files = [str(tmp_path / "plain.pt2"), str(tmp_path / "data.pt")]
        subprocess.run([*script, *files], check=True, timeout=120)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    make, shape = NETWORKS[name]
    model, x = shaken(make()), torch.randn(4, *shape)
    file = tmp_path / "plain.onnx"
    torch.onnx.export(margeq.harden(model), (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach()
    gap = float((torch.from_numpy(y) - expected).abs().max())
    assert gap <= 1e-5 * max(1.0, float(expected.abs().max()))


# -- costs -----------------------------------------------------------------------------------------


def test_costs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))
    found = costs(model, torch.zeros(2, 1, 5, 5), repeats=3)
    assert (found.parameters, found.macs) == (20 + 57, 9 * 18 + 54)
    assert 0 < found.latency < 1
    assert costs(nn.PReLU(), torch.zeros(2, 1, 5, 5), repeats=1).macs is None
    assert costs(nn.Bilinear(2, 2, 1), (torch.zeros(1, 2),) * 2, repeats=1).macs is None
    with pytest.raises(ConfigError, match="repeats=0"):
        costs(model, torch.zeros(2, 1, 5, 5), repeats=0)
    paths = ResidualPathways({"a": nn.Conv2d(1, 2, 3), "b": nn.Conv2d(1, 2, 3, bias=False)})
    paths.switch_off("b")
    found = costs(paths, torch.zeros(1, 1, 5, 5), repeats=1)
    assert (found.parameters, found.active_parameters, found.macs) == (38, 20, 162)


def test_cost_table():
    x = torch.zeros(2, 1, 5, 5)
    models_ = {"before": nn.Conv2d(1, 2, 3), "after": nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU())}
    header, before, after = cost_table(models_, x, repeats=1).splitlines()
    assert header.split() == ["model", "parameters", "MACs", "latency"]
    assert before.split()[:3] == ["before", "20", "162"]
    assert "not counted" in after
    assert before.endswith(" ms")
