"""One or more cases per layer type; ``tests/test_layers.py`` runs the contract over each."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from margeq.groups import (
    P2,
    P4,
    P4M,
    PM,
    C,
    D,
    FiniteGroup,
    S,
    regular,
    rotations,
    standard,
    trivial,
)
from margeq.layers import (
    EquivariantLinear,
    FactoredLinear2d,
    GroupConv2d,
    GroupGate,
    GroupSampler,
    IrrepGroupConv2d,
    LiftingConv2d,
    Linear2d,
    MonteCarloGroupConv2d,
    MonteCarloLiftingConv2d,
    PairSeparableConv2d,
    PartialGroupConv2d,
    PartialLiftingConv2d,
    PlanarSubset,
    SampleBatchNorm,
    SeparableGroupConv2d,
    SparseConv2d,
    SparseFactoredLinear2d,
    SparseGroupConv2d,
    SubgroupConv2d,
)
from margeq.testing import LayerCase
from tests.group_samples import Arc, Points

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv(kind: type[nn.Module], name: str, *channels: int, size: tuple[int, ...], **options):
    make = partial(kind, *channels, 3, **options)
    return LayerCase(f"{kind.__name__}-{name}", make, (3, channels[0], *size), shared=("weight",))


sparse = SparseFactoredLinear2d


def batch_norm(kind: type[nn.Module], *size: int):
    def make() -> nn.Module:
        layer = kind(3).eval()
        layer.eps = 0.1
        layer.running_mean.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 1.0, 3.0]))
        return layer

    name = "-".join([kind.__name__, *map(str, size)])
    return LayerCase(name, make, (4, 3, *size), shared=("weight",) if size else ())


def tracked_instance_norm() -> nn.Module:
    layer = nn.InstanceNorm2d(2, affine=True, track_running_stats=True).eval()
    layer.running_mean.copy_(torch.tensor([-1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([0.5, 3.0]))
    return layer


def on_two_samples(num_features: int) -> nn.Module:
    return SampleBatchNorm(num_features, GroupSampler(Points([0.0, 1.0]), 2))


def on_group(kind: type[nn.Module], name: str, group: FiniteGroup, *args, size=(3, 3), **options):
    lifts = issubclass(kind, LiftingConv2d)
    shape = (3, args[0], *size) if lifts else (3, args[0], group.order, *size)
    shared = ("weight", "weight_w", "pairs.weight_w", *(f"{part}.weight" for part in PARTS))
    shared += tuple(f"weight_{r}" for r in range(5))
    return LayerCase(
        f"{kind.__name__}-{name}", partial(kind, *args, group=group, **options), shape, shared
    )


PARTS = ("elements", "plane", "channels", "pairs", "conv")


def on_samples(name: str, *channels: int, inputs=None, outputs, size=(4, 4), kernel=3, **options):
    """In evaluation mode, as the samples of training are not the same in every call."""

    def make() -> nn.Module:
        samplers = {"outputs": GroupSampler(outputs(), 2)}
        if inputs is not None:
            samplers["inputs"] = GroupSampler(inputs(), 4)
        kind = MonteCarloLiftingConv2d if inputs is None else MonteCarloGroupConv2d
        return kind(*channels, kernel, **samplers, hidden=4, **options).eval()

    shape = (3, channels[0], *(() if inputs is None else (4,)), *size)
    return LayerCase(f"MonteCarlo-{name}", make, shape, shared=("weight",))


def equivariant(name: str, rep_in, rep_out, *channels: int, **options):
    make = partial(EquivariantLinear, rep_in, rep_out, *channels, **options)
    shared = ("weight",) if rep_out.dim > 1 else ()
    return LayerCase(f"EquivariantLinear-{name}", make, (3, channels[0], rep_in.dim), shared)


def transposed(kind: type[nn.Module], name: str, *size: int, channels=(2, 3), **options):
    make = partial(kind, *channels, 3, **options)
    shape = (3, channels[0], *size)
    return LayerCase(f"{kind.__name__}-{name}", make, shape, shared=("weight",))


class Indices(nn.Module):
    """Turns any numbers into indices from 0 to 4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x.abs()).long().clamp(max=4)


def embedding(name: str, *size: int, **options):
    def make() -> nn.Module:
        return nn.Sequential(Indices(), nn.Embedding(5, 2, **options))

    shared = ("1.weight",) if size != (1,) else ()
    return LayerCase(f"Embedding-{name}", make, (4, *size), shared, linear=False)


class Attends(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def attention(name: str, *shared: str, **options):
    names = tuple(f"attention.{weight}" for weight in (*shared, "out_proj.weight"))
    make = partial(Attends, **options)
    return LayerCase(f"MultiheadAttention-{name}", make, (3, 3, 4), names, linear=False)


def norm(name: str, make, *size: int, shared: bool = True):
    return LayerCase(name, make, (4, *size), ("weight",) if shared else (), linear=False)


LAYER_CASES = [
    LayerCase("Linear", partial(nn.Linear, 4, 3), (5, 4)),
    LayerCase("Linear-no-bias", partial(nn.Linear, 4, 3, bias=False), (5, 4)),
    LayerCase("Linear-one-axis", partial(nn.Linear, 4, 3), (3, 5, 4), shared=("weight",)),
    LayerCase("Linear-two-axes", partial(nn.Linear, 4, 3), (3, 2, 3, 4), shared=("weight",)),
    *(
        conv(kind, mode, 2, 3, size=(4,) * n_axes, padding=1, padding_mode=mode)
        for n_axes, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
        for mode in PADDING_MODES
        if not (n_axes == 3 and mode == "reflect")
    ),
    conv(nn.Conv3d, "reflect", 1, 2, size=(3, 3, 3), padding=1, padding_mode="reflect"),
    conv(nn.Conv2d, "same", 2, 3, size=(4, 5), padding="same", padding_mode="circular"),
    conv(nn.Conv2d, "uneven", 2, 3, size=(5, 4), padding=(2, 0), padding_mode="circular"),
    conv(nn.Conv2d, "no-bias", 2, 3, size=(4, 4), bias=False),
    conv(nn.Conv1d, "stride", 2, 3, size=(8,), stride=2, padding=1),
    conv(nn.Conv2d, "stride", 2, 3, size=(6, 5), stride=(2, 1), padding=1),
    conv(nn.Conv3d, "stride", 1, 2, size=(5, 4, 4), stride=2, padding=1),
    conv(nn.Conv1d, "dilation", 2, 3, size=(9,), dilation=3),
    conv(nn.Conv2d, "dilation", 2, 3, size=(7, 6), dilation=(3, 2), padding=1),
    conv(nn.Conv1d, "groups", 4, 6, size=(5,), groups=2),
    conv(nn.Conv2d, "groups", 4, 6, size=(4, 4), groups=2, padding=1, padding_mode="circular"),
    conv(nn.Conv2d, "depthwise", 3, 6, size=(4, 4), groups=3, stride=2, padding=1),
    conv(nn.Conv3d, "groups", 2, 2, size=(3, 3, 3), groups=2, padding=1),
    LayerCase("Conv2d-one-position", partial(nn.Conv2d, 2, 3, 3), (4, 2, 3, 3)),
    LayerCase("Conv2d-depthwise-one-position", partial(nn.Conv2d, 3, 6, 2, groups=3), (4, 3, 2, 2)),
    LayerCase("Linear2d", partial(Linear2d, 2, 3, (2, 3), (2, 1)), (4, 2, 2, 3)),
    LayerCase("Linear2d-1d", partial(Linear2d, 2, 3, 4, 2, bias=False), (4, 2, 4)),
    LayerCase("FactoredLinear2d", partial(FactoredLinear2d, 2, 3, (2, 3), (2, 2)), (4, 2, 2, 3)),
    LayerCase("FactoredLinear2d-1d", partial(FactoredLinear2d, 3, 2, 4, 2, bias=False), (4, 3, 4)),
    *(
        conv(SparseConv2d, mode, 2, 3, size=(4, 4), padding=1, padding_mode=mode)
        for mode in PADDING_MODES
    ),
    conv(SparseConv2d, "grid", 2, 3, size=(4, 4), anchors="grid", bias=False),
    conv(SparseConv2d, "identity", 2, 3, size=(4, 4), anchors="grid", basis="identity"),
    conv(SparseConv2d, "exponential", 2, 3, size=(4, 4), anchors=3, basis="exponential"),
    conv(SparseConv2d, "learned-anchors", 2, 3, size=(4, 4), learn_anchors=True),
    conv(SparseConv2d, "strided-groups", 4, 6, size=(7, 6), groups=2, stride=2, dilation=(1, 2)),
    conv(SparseConv2d, "per-filter", 4, 6, size=(4, 4), groups=2, padding="same", per_filter=True),
    LayerCase("SparseConv2d-one-position", partial(SparseConv2d, 2, 3, 3), (4, 2, 3, 3)),
    LayerCase("SparseFactoredLinear2d", partial(sparse, 2, 3, (3, 3), (2, 2)), (4, 2, 3, 3)),
    LayerCase("SparseFactoredLinear2d-1d", partial(sparse, 3, 2, 4, 3, bias=False), (4, 3, 4)),
    LayerCase(
        "SparseFactoredLinear2d-per-filter",
        partial(sparse, 2, 3, (3, 3), (2, 2), per_filter=True, basis="exponential"),
        (4, 2, 3, 3),
    ),
    LayerCase(
        "SparseFactoredLinear2d-learned-anchors",
        partial(sparse, 2, 3, (3, 3), (2, 2), anchors=(4, "grid"), learn_anchors=True),
        (4, 2, 3, 3),
    ),
    on_group(LiftingConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(LiftingConv2d, "p4m-even", P4M, 1, 2, 2, size=(4, 4), stride=2),
    on_group(LiftingConv2d, "groups", P4, 4, 6, 3, groups=2, padding="same", bias=False),
    on_group(LiftingConv2d, "c8", C(8), 1, 2, 3),
    on_group(LiftingConv2d, "bilinear", C(8), 1, 2, 3, padding=1, filters="bilinear"),
    on_group(LiftingConv2d, "siren", D(3), 1, 2, 3, filters="siren"),
    on_group(GroupConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(GroupConv2d, "p4m", P4M, 1, 2, 2),
    on_group(GroupConv2d, "p4m-reflect", P4M, 1, 2, 3, padding=1, padding_mode="reflect"),
    on_group(GroupConv2d, "z2", C(1), 2, 3, 3, padding=1, bias=False),
    on_group(GroupConv2d, "groups", PM, 4, 6, 3, groups=2, size=(5, 5), stride=2, dilation=2),
    on_group(GroupConv2d, "one-by-one", P4, 2, 3, 1),
    on_group(GroupConv2d, "c6", C(6), 1, 2, 3, padding=1),
    on_group(GroupConv2d, "d3-bilinear", D(3), 1, 1, 3, filters="bilinear"),
    *(
        on_group(GroupConv2d, f"{group}-pointwise", group, 2, 3, 3, separability="pointwise")
        for group in (P2, P4M, C(3))
    ),
    on_group(
        GroupConv2d, "pointwise-groups", P4, 4, 6, 3, separability="pointwise", groups=2, padding=1
    ),
    on_group(GroupConv2d, "pointwise-depthwise", P4, 2, 4, 2, separability="pointwise", groups=2),
    on_group(PairSeparableConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(PairSeparableConv2d, "p4m", P4M, 1, 2, 2, bias=False),
    on_group(PairSeparableConv2d, "c8", C(8), 1, 2, 3),
    *(
        on_group(SeparableGroupConv2d, kind, P4, 2, 3, 3, kind, padding=1)
        for kind in ("depthwise", "dg", "g", "gc")
    ),
    batch_norm(nn.BatchNorm1d),
    batch_norm(nn.BatchNorm1d, 5),
    batch_norm(nn.BatchNorm2d, 3, 2),
    batch_norm(nn.BatchNorm3d, 2, 2, 3),
    batch_norm(on_two_samples, 2, 2, 3),
    transposed(nn.ConvTranspose1d, "stride", 4, stride=2, padding=1, output_padding=1),
    transposed(nn.ConvTranspose2d, "plain", 3, 2),
    transposed(nn.ConvTranspose2d, "no-bias", 3, 3, stride=3, padding=2, bias=False),
    transposed(nn.ConvTranspose2d, "groups", 2, 3, channels=(4, 6), groups=2, stride=2),
    transposed(nn.ConvTranspose2d, "dilated", 3, 3, dilation=(2, 3), output_padding=(1, 2)),
    transposed(nn.ConvTranspose3d, "stride", 2, 1, 2, stride=(1, 2, 2), padding=(1, 0, 1)),
    embedding("one", 1),
    embedding("several", 3),
    embedding("padding", 2, padding_idx=1),
    attention("packed", "in_proj_weight"),
    attention("no-bias", "in_proj_weight", bias=False),
    norm("LayerNorm", partial(nn.LayerNorm, 3), 3, shared=False),
    norm("LayerNorm-positions", partial(nn.LayerNorm, 3), 2, 3),
    norm("LayerNorm-two-axes", partial(nn.LayerNorm, (2, 3), bias=False), 2, 3, shared=False),
    norm("RMSNorm", partial(nn.RMSNorm, 3, eps=0.1), 2, 3),
    norm("GroupNorm", partial(nn.GroupNorm, 2, 4), 4, 3, 2),
    norm("InstanceNorm1d", partial(nn.InstanceNorm1d, 2, affine=True), 2, 5),
    norm("InstanceNorm2d", partial(nn.InstanceNorm2d, 2, affine=True), 2, 3, 2),
    norm("InstanceNorm3d", partial(nn.InstanceNorm3d, 2, affine=True), 2, 2, 2, 2),
    norm("InstanceNorm-tracked", tracked_instance_norm, 2, 3, 2),
    equivariant("set", standard(S(3)), standard(S(3)), 2, 3),
    equivariant("orbits", standard(S(3)) * standard(S(3)), 2 * standard(S(3)), 1, 2),
    equivariant("shifts", regular(C(4)), regular(C(4)), 2, 1, bias=False),
    equivariant("one-output", regular(P4M), trivial(P4M), 2, 3),
    equivariant("plane", regular(D(3)), standard(D(3)) + trivial(D(3)), 1, 2),
    equivariant("vectors", rotations(3) * rotations(3), 2 * rotations(3), 2, 2),
    on_group(SparseGroupConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(SparseGroupConv2d, "p4m-even", P4M, 1, 2, 2, size=(4, 4), stride=2, bias=False),
    on_group(SparseGroupConv2d, "identity", P4, 2, 3, 3, anchors="grid", basis="identity"),
    on_group(SparseGroupConv2d, "exponential", PM, 2, 2, 3, anchors=7, basis="exponential"),
    on_group(SparseGroupConv2d, "learned-anchors", P2, 2, 2, 3, anchors=5, learn_anchors=True),
    on_group(SparseGroupConv2d, "per-filter", P4, 4, 6, 2, groups=2, per_filter=True, anchors=6),
    LayerCase("Linear2d-group", partial(Linear2d, 1, 2, (4, 3, 3), (4, 2, 2)), (4, 1, 4, 3, 3)),
    LayerCase(
        "FactoredLinear2d-group",
        partial(FactoredLinear2d, 2, 3, (4, 3, 3), (4, 2, 2)),
        (4, 2, 4, 3, 3),
    ),
    LayerCase(
        "SparseFactoredLinear2d-group",
        partial(sparse, 2, 2, (4, 3, 3), (4, 2, 2), group=P4),
        (4, 2, 4, 3, 3),
    ),
    LayerCase(
        "SparseFactoredLinear2d-lifting-per-filter",
        partial(sparse, 1, 2, (3, 3), (6, 2, 2), group=D(3), per_filter=True, basis="exponential"),
        (4, 1, 3, 3),
    ),
    LayerCase(
        "SparseFactoredLinear2d-group-learned-anchors",
        partial(sparse, 1, 2, (3, 2, 2), (3, 1, 2), group=C(3), anchors=4, learn_anchors=True),
        (4, 1, 3, 2, 2),
    ),
    on_group(IrrepGroupConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(IrrepGroupConv2d, "p4m-even", P4M, 1, 2, 2, bias=False),
    on_group(IrrepGroupConv2d, "groups", PM, 4, 6, 3, groups=2, size=(5, 5), stride=2),
    on_group(SubgroupConv2d, "d4-c4", P4M, 1, 1, 2, subgroup=P4),
    on_group(SubgroupConv2d, "c4-z2", P4, 1, 2, 3, subgroup=C(1), padding=1),
    on_group(PartialLiftingConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(PartialLiftingConv2d, "p4m-mean", P4M, 1, 2, 2, size=(4, 4), stride=2, scale="mean"),
    on_group(PartialLiftingConv2d, "c8", C(8), 1, 2, 3, bias=False),
    on_group(PartialGroupConv2d, "p4", P4, 2, 3, 3, padding=1, padding_mode="circular"),
    on_group(PartialGroupConv2d, "p4m", P4M, 1, 2, 2, bias=False),
    on_group(PartialGroupConv2d, "pm-groups", PM, 4, 6, 3, groups=2, size=(5, 5), stride=2),
    on_group(PartialGroupConv2d, "c6", C(6), 1, 2, 3, padding=1, scale="mean"),
    on_group(PartialGroupConv2d, "z2", C(1), 2, 3, 3, padding=1),
    on_group(
        PartialGroupConv2d, "narrow-input", P4, 2, 3, 3, input_gate=GroupGate(P4, 0.5), padding=1
    ),
    on_samples("lifting", 2, 3, outputs=partial(Arc, 0.7), padding=1),
    on_samples("lifting-mirrors", 1, 2, outputs=partial(Arc, mirrors=True), kernel=2, stride=2),
    on_samples(
        "group",
        2,
        2,
        inputs=partial(Arc, 0.6),
        outputs=partial(Arc, 0.4),
        padding=1,
        padding_mode="circular",
    ),
    on_samples(
        "group-mirrors",
        1,
        2,
        inputs=partial(Arc, mirrors=True),
        outputs=Arc,
        nonlinearity="swish",
        bias=False,
    ),
    on_samples(
        "group-subset",
        1,
        2,
        inputs=partial(PlanarSubset, True, True, 0.7, 0.4),
        outputs=partial(PlanarSubset, True, False, 0.9),
    ),
    on_samples(
        "one-by-one", 2, 3, inputs=Arc, outputs=partial(Points, [0.3]), kernel=1, size=(2, 2)
    ),
    LayerCase("PReLU", nn.PReLU, (4, 3, 2), (), linear=False),
    LayerCase("PReLU-slopes", partial(nn.PReLU, 3), (4, 3, 2, 2), (), linear=False),
    LayerCase("PReLU-vectors", partial(nn.PReLU, 3), (4, 3), (), linear=False),
]
