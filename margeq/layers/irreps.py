"""Group convolutions with one weight, so one prior precision, per irreducible representation.

Filters on the group, moved by it, split into spaces that it does not mix. The input factor commutes
with the group, so it has no entries between those spaces, and neither has the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from margeq.curvature.fourier import harmonics
from margeq.curvature.io import InputRows, PositionSampler, Rule, register_split_rule, rule_for
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.groups.planar import stencil
from margeq.layers.group import GroupConv2d
from margeq.layers.maps import default_init
from margeq.layers.window import PaddingMode

__all__ = ["IrrepGroupConv2d"]


class IrrepGroupConv2d(GroupConv2d):
    """Group convolution whose filters are sums of one part per irreducible representation.

        w[o,i,(h,h x)] = sum_r sum_m Q_r[h,m] w_r[o,i,m,x],   sum_r Q_r Q_r^T = I

    An orthonormal change of basis of the weight of :class:`GroupConv2d`, so the function, and under
    equal precisions the evidence, is the same. The columns of ``Q_r`` span the functions on the
    group that belong to the r-th real representation: ``weight_0`` is the mean over the moved
    copies of a filter, to which symmetric patterns belong; the others are what a mean loses.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: rotations and reflections ``H`` that map pixels to pixels.
        stride: as in :class:`GroupConv2d`, like the rest.
        padding: see there.
        dilation: see there.
        groups: see there.
        bias: see there.
        padding_mode: see there.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``; ``weight_r [O, I / groups, M_r, k * k]`` with
        ``M_r`` the columns of ``Q_r``, ``|H|`` over all r.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Example:
        >>> from margeq.groups import P4
        >>> layer = IrrepGroupConv2d(2, 3, 3, group=P4)
        >>> {name: tuple(part.shape[1:]) for name, part in layer.parts.items()}
        {'weight_0': (2, 1, 9), 'weight_1': (2, 1, 9), 'weight_2': (2, 2, 9)}
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, group=group, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
            filters="pixels",
        )  # fmt: skip

    @classmethod
    def from_full(cls, conv: GroupConv2d) -> IrrepGroupConv2d:
        """The same function, with weights of its own.

        Args:
            conv: a group convolution of the full kind with filters in pixels, left as it is.

        Returns:
            A new layer on the convolution's device, in its dtype and its mode.

        Raises:
            ConfigError: for anything else.
        """
        if type(conv) is not GroupConv2d or not conv.mixes_elements or conv.filter_kind != "pixels":
            raise ConfigError(
                f"from_full takes a GroupConv2d with separability='full' and filters='pixels', "
                f"not {conv}"
            )
        layer = cls(*_sizes(conv), **_options(conv)).to(conv.weight).train(conv.training)
        with torch.no_grad():
            for name, values in layer.project(conv.weight.flatten(2)).items():
                layer.parts[name].copy_(values)
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    def as_full(self) -> GroupConv2d:
        """The same function as a :class:`GroupConv2d` with weights of its own."""
        conv = GroupConv2d(*_sizes(self), **_options(self)).to(self.weight).train(self.training)
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """The weights, in the order of the representations."""
        return {name: getattr(self, name) for name in self._spaces()}

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of a :class:`GroupConv2d` with the same function, ``[O, I, |H|, k^2]``."""
        parts = torch.cat(list(self.parts.values()), dim=2)
        change = torch.cat(list(self._spaces().values()), dim=1).to(parts)
        by_orbit = torch.einsum("hm,oimx->oihx", change, parts)
        return by_orbit.flatten(2)[..., self.orbits.flatten().argsort()].view_as(by_orbit)

    def project(self, values: Tensor) -> dict[str, Tensor]:
        """Parts ``[..., M_r, k^2]`` of values on the places of a filter ``[..., |H| * k^2]``."""
        by_orbit = values[..., self.orbits]
        return {
            name: torch.einsum("hm,...hx->...mx", space.to(values), by_orbit)
            for name, space in self._spaces().items()
        }

    def add_parameters(self, *inner: int, bias: bool) -> None:
        """Give the layer a weight for each representation and its bias ``[O]``."""
        size = self.window.size
        pixels = stencil(self.group, size, size)[self.group.inverse]
        offsets = torch.arange(self.order, device="cpu")[:, None] * self.n_functions
        self._exact_orbits = offsets + pixels  # [h, x]: where (e, x) goes
        place = torch.get_default_device()
        self.orbits = nn.Buffer(self._exact_orbits.to(place), persistent=False)
        for name, space in self._spaces().items():
            shape = (self.out_channels, inner[0], space.shape[1], self.n_functions)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.bias = nn.Parameter(torch.empty(self.out_channels)) if bias else None
        self.reset_parameters()

    def follow_weights(self) -> None:
        """Put what follows from the arguments where the weights are."""
        super().follow_weights()
        self.orbits = self._exact_orbits.to(next(self.parameters()).device)

    def reset_parameters(self) -> None:
        """Normal weights under which the filters have unit gain, zero biases."""
        for name, part in self.parts.items():
            if not part.is_meta:
                default_init(part, fan_in=self.fan_in(name))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def fan_in(self, name: str) -> float:
        """That of the whole weight: at function scale all parts have the same variance."""
        return float(sum(part[0].numel() for part in self.parts.values()))

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent."""
        return sum(part.numel() for part in self.parts.values())

    def kept_filters(self) -> Tensor:
        """The filters of all elements, made anew only when a weight has changed; read only."""
        return self._remembered.of(self.expand, list(self.parts.values()))

    def _spaces(self) -> dict[str, Tensor]:
        return {f"weight_{r}": space for r, space in enumerate(_isotypic_spaces(self.group))}


def _sizes(layer: GroupConv2d) -> tuple[int, int, int]:
    return layer.in_channels, layer.out_channels, layer.window.size


def _options(layer: GroupConv2d) -> dict[str, Any]:
    window = layer.window
    return {
        "group": layer.group, "stride": window.step, "padding": window.padding,
        "dilation": window.spacing, "groups": window.groups, "bias": layer.bias is not None,
        "padding_mode": window.padding_mode,
    }  # fmt: skip


@cache
def _isotypic_spaces(group: FiniteGroup) -> tuple[Tensor, ...]:
    """Orthonormal functions ``[order, M_r]`` of each real representation, in a canonical order."""
    found = []
    for rho, times in harmonics(group):
        character = rho.diagonal(dim1=1, dim2=2).sum(-1).real
        key = (rho.shape[-1], times, [-round(value, 6) for value in character.tolist()])
        found.append((key, _first_columns(character[group.relative])))
    return tuple(space for _, space in sorted(found, key=lambda pair: pair[0]))


def _first_columns(matrix: Tensor) -> Tensor:
    """Orthonormal basis of a matrix's image, from its first independent columns."""
    basis = matrix[:, :0]
    for column in matrix.mT:
        rest = column - basis @ (basis.mT @ column)
        if float(rest.norm()) > 1e-6:
            rest = rest - basis @ (basis.mT @ rest)
            basis = torch.cat([basis, (rest / rest.norm())[:, None]], 1)
    return basis


_GROUP_CONV = cast(Rule, rule_for(GroupConv2d))


def _inputs(
    layer: IrrepGroupConv2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    found = dict(_GROUP_CONV.inputs(layer, x, sampler))
    whole = found.pop("weight").expanded()
    by_channel = whole.rows.unflatten(-1, (-1, layer.orbits.numel()))
    parts = {
        name: replace(whole, rows=rows.flatten(-3))
        for name, rows in layer.project(by_channel).items()
    }
    return {**parts, **found}


def _output_grads(layer: IrrepGroupConv2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    found = layer.output_grads(grad_y)
    return {**dict.fromkeys(layer.parts, found["weight"]), "bias": found["bias"]}


register_split_rule(IrrepGroupConv2d, rule=Rule(_inputs, _output_grads))
