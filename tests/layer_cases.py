"""One or more cases per layer type; ``tests/test_layers.py`` runs the contract over each."""

from __future__ import annotations

from functools import partial

from torch import nn

from margeq.layers import FactoredLinear2d, Linear2d, SparseConv2d, SparseFactoredLinear2d
from margeq.testing import LayerCase

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv(kind: type[nn.Module], name: str, *channels: int, size: tuple[int, ...], **options):
    make = partial(kind, *channels, 3, **options)
    return LayerCase(f"{kind.__name__}-{name}", make, (3, channels[0], *size), shared=("weight",))


sparse = SparseFactoredLinear2d

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
]
