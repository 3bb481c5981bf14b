"""How alike the filters of a group convolution are over the group (Lengyel & van Gemert 2021).

Section 3.2: a filter of one pair of channels is ``|H|`` pictures of ``k^2`` pixels. If they are one
picture times ``|H|`` numbers, then their first principal component explains all their variance, and
a separable convolution can take the place of the full one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from margeq.layers import GroupConv2d

__all__ = ["BINS", "first_component_ratios", "redundancy"]

BINS = 20
"""Of the histograms, equally wide from 0 to 1."""


def first_component_ratios(weight: Tensor) -> Tensor:
    """Share of variance that the first principal component over the group explains.

        s_1^2 / sum_r s_r^2,   s = singular values of F[x, g] - mean_x F[x, g]

    The group elements are the features and the pixels the samples, as published.

    Args:
        weight: filters ``[o, i, g, x]``.

    Returns:
        ``[o, i]``, between ``1 / |H|`` and 1; 1 where the filters are constant.
    """
    features = weight.detach().double().transpose(-1, -2)
    centred = features - features.mean(-2, keepdim=True)
    squares = torch.linalg.svdvals(centred).square()
    total = squares.sum(-1)
    # rounding must not carry a ratio out of the last bin of the histogram
    return torch.where(total > 0, squares[..., 0] / total, 1.0).clamp(max=1.0)


def redundancy(model: nn.Module) -> list[dict[str, Any]]:
    """Quartiles and histogram of the ratios of every full group convolution.

    Returns:
        A row for each layer after the lifting, in the order of the network.
    """
    return [
        {"layer": name, **_summary(first_component_ratios(module.weight).flatten())}
        for name, module in model.named_modules()
        if isinstance(module, GroupConv2d) and module.mixes_elements and module.window.size > 1
    ]


def _summary(ratios: Tensor) -> dict[str, Any]:
    quartiles = ratios.quantile(ratios.new_tensor([0.25, 0.5, 0.75])).tolist()
    counts = torch.histc(ratios, BINS, 0.0, 1.0)
    return {
        "mean": float(ratios.mean()),
        "quartiles": quartiles,
        "histogram": [int(count) for count in counts],
    }
