"""How many multiplications a network takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from margeq.curvature.capture import eval_mode
from margeq.errors import ConfigError, UnsupportedLayerError
from margeq.layers import (
    FactoredLinear2d,
    GroupConv2d,
    IrrepGroupConv2d,
    LiftingConv2d,
    Linear2d,
    PairSeparableConv2d,
    SeparableGroupConv2d,
    SparseConv2d,
    SparseFactoredLinear2d,
    SparseGroupConv2d,
)
from margeq.layers.basis import AnchorBasis
from margeq.layers.planar import PlanarConv
from margeq.models.planar_layers import SeparableConv2d

__all__ = ["count_macs"]

_Calls = list[tuple[torch.Size, torch.Size]]
_WHOLES = (SeparableGroupConv2d, SeparableConv2d)


def count_macs(
    model: nn.Module,
    input_shape: tuple[int, ...],
    convention: Literal["paper", "rearranged"] = "rearranged",
) -> int:
    """Multiply-accumulate operations of one datum in the layers with weights.

    Biases, normalisation, rectifiers and pooling count nothing, nor does turning the filters, which
    is done once for a batch.

    Args:
        model: a network of dense layers, convolutions and group convolutions; it is run once.
        input_shape: shape of one datum.
        convention: where separable convolutions mix channels and elements before they filter.
            ``"rearranged"``: at the size of the map that they get, which is what it takes; or
            ``"paper"``: at the size of the result, as published, too few where nothing is padded
            or a stride follows. Kind ``"g"`` counts as one factor after the other too, although
            :class:`margeq.layers.PairSeparableConv2d` convolves with their products, at the count
            of kind ``"full"``, because that is faster.

    Returns:
        Their number.

    Raises:
        ConfigError: for an unknown convention.
        UnsupportedLayerError: for a layer with weights whose cost it does not know.

    Reference:
        Lengyel & van Gemert 2021, table 1.

    Example:
        >>> from margeq.models import rotmnist_cnn
        >>> model = rotmnist_cnn("gc-p4", width=10)
        >>> count_macs(model, (1, 28, 28), "paper"), count_macs(model, (1, 28, 28))
        (1798020, 2186820)
    """
    if convention not in ("paper", "rearranged"):
        raise ConfigError(f"convention={convention!r}: use 'paper' or 'rearranged'")
    shapes = _shapes(model, input_shape)
    results = _results_of_wholes(shapes) if convention == "paper" else {}
    total = 0
    for layer, calls in shapes.items():
        if isinstance(layer, _WHOLES):
            continue  # its factors count
        cost = _RULES[type(layer)](layer)
        outputs = results.get(layer) or [y for _, y in calls]
        inputs = outputs if convention == "paper" else [x for x, _ in calls]
        for x, y in zip(inputs, outputs, strict=True):
            total += cost.mixing * cost.positions(x) + cost.filtering * cost.positions(y)
    return total


@dataclass(frozen=True)
class _Cost:
    """Of one layer: mixing at each position of its input, filtering at each of its output."""

    filtering: int
    mixing: int = 0
    axes: tuple[int, int | None] = (2, None)

    def positions(self, shape: torch.Size) -> int:
        """Number of positions in a batch of one."""
        return shape[slice(*self.axes)].numel()


_PLANE = (3, None)
"""The positions of a map on a group ``[n, c, g, y, x]``."""


def _of_weight(layer: Any) -> _Cost:
    return _Cost(layer.weight.numel())


def _of_dense(layer: nn.Linear) -> _Cost:
    return _Cost(layer.weight.numel(), axes=(1, -1))


def _of_whole_maps(layer: Linear2d | FactoredLinear2d) -> _Cost:
    factors = [p for name, p in layer.named_parameters() if name.startswith("weight")]
    return _Cost(sum(factor.numel() for factor in factors), axes=(0, 0))


def _of_transposed(layer: Any) -> _Cost:
    return _Cost(0, mixing=layer.weight.numel())


def _of_sparse_conv(layer: SparseConv2d) -> _Cost:
    rows, columns = layer.kernel_size
    return _Cost(layer.weight.shape[:2].numel() * rows * columns)


def _of_sparse_maps(layer: SparseFactoredLinear2d) -> _Cost:
    """Projections onto the anchors and back, and the factors between them."""
    before = layer.in_channels * layer.basis_u.n_filters * layer.in_shape.numel()
    after = layer.out_channels * layer.out_shape.numel()
    projecting = before * layer.basis_u.n_anchors + after * layer.basis_v.n_anchors
    return _Cost(projecting + layer.weight_u.numel() + layer.weight_v.numel(), axes=(0, 0))


def _of_lifting(layer: LiftingConv2d) -> _Cost:
    return _Cost(_per_element(layer) * layer.window.size**2, axes=_PLANE)


def _of_group_conv(layer: GroupConv2d) -> _Cost:
    elements = layer.order if layer.mixes_elements else 1
    return _Cost(_per_element(layer) * elements * layer.window.size**2, axes=_PLANE)


def _of_pairs(layer: PairSeparableConv2d) -> _Cost:
    outputs = _per_element(layer)
    return _Cost(outputs * layer.window.size**2, mixing=outputs * layer.order, axes=_PLANE)


def _per_element(layer: PlanarConv) -> int:
    """Filters over the plane, of all output elements and one input element."""
    return layer.out_channels * layer.in_channels // layer.window.groups * layer.order


def _of_none(layer: nn.Module) -> _Cost:
    return _Cost(0)


_RULES: Mapping[type[nn.Module], Callable[[Any], _Cost]] = {
    nn.Linear: _of_dense,
    nn.Conv1d: _of_weight,
    nn.Conv2d: _of_weight,
    nn.Conv3d: _of_weight,
    Linear2d: _of_whole_maps,
    FactoredLinear2d: _of_whole_maps,
    LiftingConv2d: _of_lifting,
    GroupConv2d: _of_group_conv,
    SparseGroupConv2d: _of_group_conv,
    IrrepGroupConv2d: _of_group_conv,
    PairSeparableConv2d: _of_pairs,
    SparseConv2d: _of_sparse_conv,
    SparseFactoredLinear2d: _of_sparse_maps,
    AnchorBasis: _of_none,
    nn.ConvTranspose1d: _of_transposed,
    nn.ConvTranspose2d: _of_transposed,
    nn.ConvTranspose3d: _of_transposed,
    nn.GroupNorm: _of_none,
    nn.LayerNorm: _of_none,
    nn.BatchNorm1d: _of_none,
    nn.BatchNorm2d: _of_none,
    nn.BatchNorm3d: _of_none,
}


def _shapes(model: nn.Module, input_shape: tuple[int, ...]) -> dict[nn.Module, _Calls]:
    """Input and output shapes of each call of the layers with weights and of the wholes."""
    found: dict[nn.Module, _Calls] = defaultdict(list)

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        found[module].append((args[0].shape, y.shape))

    handles = []
    for name, module in model.named_modules():
        weighs = next(module.parameters(recurse=False), None) is not None
        if weighs and type(module) not in _RULES:
            raise UnsupportedLayerError(
                f"count_macs: no cost is known of {name or 'the model itself'} "
                f"({type(module).__name__}); count a network without it"
            )
        costs = weighs and _RULES[type(module)] is not _of_none
        if costs or isinstance(module, _WHOLES):
            handles.append(module.register_forward_hook(hook))
    with eval_mode(model), torch.no_grad():
        try:
            model(next(model.parameters(), torch.empty(0)).new_zeros(1, *input_shape))
        finally:
            for handle in handles:
                handle.remove()
    return found


def _results_of_wholes(shapes: Mapping[nn.Module, _Calls]) -> dict[nn.Module, list[torch.Size]]:
    """Output shapes of the separable convolution that a factor belongs to."""
    wholes = [module for module in shapes if isinstance(module, _WHOLES)]
    return {
        factor: [y for _, y in shapes[whole]] for whole in wholes for factor in whole.children()
    }
