"""Group convolutions as those of a subgroup, with the same outputs and more freedom.

The elements of H are those of K times representatives of the right cosets ``K r_c``. Maps of H are
maps of K on ``|H| / |K|`` times the channels, in the order of :class:`RestrictGroup`:

    f_K[(i,c), k] = f_H[i, k r_c]
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.groups.finite import FiniteGroup, require_group
from margeq.groups.planar import Z2, is_exact
from margeq.layers.expandable import Expandable
from margeq.layers.gate import GroupGate
from margeq.layers.group import GroupConv2d
from margeq.layers.lifting import LiftingConv2d
from margeq.layers.partial import PartialGroupConv2d, PartialLiftingConv2d
from margeq.layers.planar import PlanarConv
from margeq.layers.separable import PairSeparableConv2d, SeparableGroupConv2d

__all__ = ["expand_to", "to_conv2d"]


def expand_to(layer: nn.Module, subgroup: FiniteGroup) -> nn.Module:
    """The same function as a layer of a subgroup, whose weights are no longer tied by the rest.

        w_K[(o,c), (i,c'), k] = (filter of H from (i, k r_c') to (o, r_c))

    With ``restrict = RestrictGroup(H, K)`` the new layer maps ``restrict(x)`` to
    ``restrict(layer(x))``; one that lifts takes the same pictures as before. Weights are computed
    anew, so the layers share none, and the given one is left as it is. They are trainable where
    the given ones are: frozen weights stay frozen.

    Args:
        layer: :class:`LiftingConv2d`, :class:`GroupConv2d` of any separability (pointwise stays
            pointwise), :class:`PairSeparableConv2d` (becomes full), or
            :class:`SeparableGroupConv2d` (a chain, whose factors expand one by one).
        subgroup: ``K`` of quarter turns and mirrors; the group itself may be any of the plane.

    Returns:
        A :class:`LiftingConv2d`, a :class:`GroupConv2d`, or for a chain an ``nn.Sequential``, on
        the layer's device, in its dtype and its mode.

    Raises:
        ConfigError: for another layer, one with a gate, or a group that is no exact subgroup of the
            layer's.

    Example:
        >>> from margeq.groups import P4, P4M
        >>> layer = GroupConv2d(2, 3, 3, group=P4M)
        >>> expand_to(layer, P4)
        GroupConv2d(4, 6, kernel_size=3, group=P4)
        >>> layer.weight.numel(), expand_to(layer, P4).weight.numel()
        (432, 864)
    """
    require_group(subgroup, "subgroup")
    if isinstance(layer, PartialLiftingConv2d | PartialGroupConv2d):
        raise ConfigError(
            f"{type(layer).__name__} need not commute with {subgroup!r}; use to_conv2d, which "
            f"takes the gate along"
        )
    if isinstance(layer, SeparableGroupConv2d):
        factors = ((name, expand_to(factor, subgroup)) for name, factor in layer.named_children())
        return nn.Sequential(OrderedDict(factors)).train(layer.training)
    return _expanded(layer, subgroup)


def _expanded(layer: nn.Module, subgroup: FiniteGroup) -> PlanarConv:
    """The same for a single convolution; a gate is left behind."""
    if not isinstance(layer, LiftingConv2d | GroupConv2d | PairSeparableConv2d):
        raise ConfigError(
            f"{type(layer).__name__} cannot be expanded to {subgroup!r}; use a LiftingConv2d, a "
            f"GroupConv2d or one of its separable kinds"
        )
    if not is_exact(subgroup):
        raise ConfigError(
            f"{type(layer).__name__} on {layer.group!r} cannot be expanded to {subgroup!r}, which "
            f"moves pixels between pixels; use a subgroup of quarter turns and mirrors"
        )
    cosets = layer.group.cosets(subgroup).to(layer.weight.device)
    with torch.no_grad():
        weight = _free_weight(layer, cosets)
        with torch.random.fork_rng([]):  # the first weights of a new layer are random
            expanded = _new_layer(layer, subgroup, len(cosets))
    return _filled(expanded, layer, weight)


Expandable.expander = staticmethod(expand_to)


def to_conv2d(layer: nn.Module) -> nn.Module:
    """The same function as an ordinary convolution, on channels merged with elements.

        MergeGroup()(layer(x)) = to_conv2d(layer)(MergeGroup()(x))

    Filters of pointwise layers are zero between different elements. Frozen weights stay frozen.

    Args:
        layer: as in :func:`expand_to`, or a partial one, whose gate becomes part of the filters.

    Returns:
        An ``nn.Conv2d``, or for a chain an ``nn.Sequential`` of some.

    Raises:
        ConfigError: for another layer.

    Example:
        >>> from margeq.groups import P4
        >>> to_conv2d(LiftingConv2d(1, 5, 3, group=P4, padding=1))
        Conv2d(1, 20, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    if isinstance(layer, SeparableGroupConv2d):
        factors = ((name, to_conv2d(factor)) for name, factor in layer.named_children())
        return nn.Sequential(OrderedDict(factors)).train(layer.training)
    free = _expanded(layer, Z2)
    if isinstance(layer, PartialLiftingConv2d | PartialGroupConv2d):
        _absorb(layer.gate, free)
    window = free.window
    with torch.random.fork_rng([]):
        conv = nn.Conv2d(
            free.in_channels, free.out_channels, window.size, window.step, window.margin,
            window.spacing, window.groups, free.bias is not None, window.padding_mode,
        )  # fmt: skip
    return _filled(conv, free, free.weight)


@torch.no_grad()
def _absorb(gate: GroupGate, free: PlanarConv) -> None:
    """Multiply the filters and biases of each element by its factor."""
    for tensor in (free.weight, free.bias):
        if tensor is not None:
            by_element = tensor.unflatten(0, (-1, gate.group.order)).movedim(1, -1)
            by_element *= gate.factors().to(tensor)


def _free_weight(layer: PlanarConv, cosets: Tensor) -> Tensor:
    """Weights of the layer of the subgroup, ``[(o, c), (i, c'), ..., k, k]``."""
    leaders, order = cosets[:, 0], layer.order
    if isinstance(layer, LiftingConv2d):
        return layer.filters().unflatten(0, (-1, order))[:, leaders].flatten(0, 1)
    if isinstance(layer, PairSeparableConv2d):
        filters = layer.products()
    elif isinstance(layer, GroupConv2d) and layer.mixes_elements:
        filters = layer.filters().unflatten(1, (-1, order)).unflatten(0, (-1, order))
    else:
        by_coset = layer.filters()[:, leaders]  # [o, c, i, y, x]
        if _is_depthwise(layer):
            return by_coset.flatten(0, 1)
        eye = torch.eye(len(cosets), dtype=by_coset.dtype, device=by_coset.device)
        return torch.einsum("ociyx,cd->ocidyx", by_coset, eye).flatten(2, 3).flatten(0, 1)
    return filters[:, leaders][:, :, :, cosets].flatten(2, 3).flatten(0, 1)


def _new_layer(layer: PlanarConv, subgroup: FiniteGroup, n_cosets: int) -> PlanarConv:
    window, lifts = layer.window, isinstance(layer, LiftingConv2d)
    options: dict[str, Any] = {
        "stride": window.step, "padding": window.padding, "dilation": window.spacing,
        "padding_mode": window.padding_mode, "bias": layer.bias is not None, "filters": "pixels",
        "groups": window.groups * (n_cosets if _is_depthwise(layer) else 1),
    }  # fmt: skip
    if isinstance(layer, GroupConv2d):
        options["separability"] = layer.separability
    make = LiftingConv2d if lifts else GroupConv2d
    in_channels = layer.in_channels * (1 if lifts else n_cosets)
    return make(in_channels, layer.out_channels * n_cosets, window.size, group=subgroup, **options)


def _is_depthwise(layer: PlanarConv) -> bool:
    """Whether each channel is mapped to itself, at each element: so are then the cosets."""
    is_pointwise = isinstance(layer, GroupConv2d) and not layer.mixes_elements
    return is_pointwise and layer.window.groups == layer.in_channels == layer.out_channels


_Layer = TypeVar("_Layer", PlanarConv, nn.Conv2d)


def _filled(new: _Layer, layer: PlanarConv, weight: Tensor) -> _Layer:
    """A new layer with the given weights and the biases, where and how the old one is."""
    new = new.to(layer.weight).train(layer.training)
    trains = any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")
    new.weight.requires_grad_(trains)
    with torch.no_grad():
        new.weight.copy_(weight.reshape(new.weight.shape))
        if new.bias is not None and layer.bias is not None:
            new.bias.requires_grad_(layer.bias.requires_grad).copy_(
                layer.bias.repeat_interleave(len(new.bias) // len(layer.bias))
            )
    return new
