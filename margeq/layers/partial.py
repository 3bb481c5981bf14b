"""Convolutions that keep a learned part of a group's symmetry (Romero & Lohit 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from margeq.curvature.frames import BasisFrames, Frames, PixelFrames
from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    register_split_rule,
    rule_for,
)
from margeq.errors import ConfigError, DataError
from margeq.groups.finite import FiniteGroup
from margeq.layers.elements import place_elements, take_elements
from margeq.layers.gate import GateScale, GroupGate, TrainedBy
from margeq.layers.group import GroupConv2d
from margeq.layers.lifting import LiftingConv2d
from margeq.layers.planar import PlanarConv
from margeq.layers.window import PaddingMode

__all__ = ["PartialGroupConv2d", "PartialLiftingConv2d"]


class PartialLiftingConv2d(LiftingConv2d):
    """Lifting convolution with a gate on its output elements.

        y[n,o,h] = (w_h / s) (sum_i x[n,i] * T_h K[o,i] + b[o])

    Elements with weight zero are not computed. See :class:`~margeq.layers.GroupGate` for ``w`` and
    ``s``, which a width moves; at width 1 it is a :class:`LiftingConv2d`, at its smallest, without
    mirror, an ordinary convolution (times ``1 / s``) at the identity and zero elsewhere.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: ``C(n)`` or ``D(n)``.
        width: share of the rotations at the start, as in :class:`~margeq.layers.GroupGate`.
        mirror: see there.
        trained_by: see there.
        scale: see there.
        gate: one of another layer, to share; width, mirror, trained_by and scale are then its own.
        **options: stride, padding, dilation, groups, bias, padding_mode, filters of a
            :class:`LiftingConv2d`.

    Shapes:
        ``[n, I, y, x] -> [n, O, |H|, y', x']``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no picture with ``I`` channels.

    Reference:
        Romero & Lohit 2022.

    Example:
        >>> from margeq.groups import P4
        >>> layer = PartialLiftingConv2d(1, 2, 3, group=P4, width=0.25)
        >>> layer(torch.ones(1, 1, 3, 3))[0, 0, :, 0, 0].abs() > 1e-9
        tensor([ True, False, False, False])
    """

    gate: GroupGate

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        width: float = 0.8,
        mirror: float = 0.8,
        trained_by: TrainedBy = "evidence",
        scale: GateScale = "variance",
        gate: GroupGate | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, group=group, **options)
        self.gate = _gate_of(self, gate, width, mirror, trained_by, scale)

    @property
    def span_dimension(self) -> int:
        """Dimension of the span of its maps at all gates; of a gate at the whole group, there."""
        return _span(self, self.gate)

    def live_filters(self, live: Tensor) -> Tensor:
        """Filters of some output elements, ``[O * l, I / groups, k, k]``."""

        def expand() -> Tensor:
            basis = self.basis[live.to(self.basis.device)].to(self.weight.dtype)
            turned = torch.einsum("oim,hmx->ohix", self.weight, basis)
            return turned.flatten(0, 1).unflatten(-1, self.window.kernel_size)

        return self._remembered.of(expand, _behind_filters(self, self.gate))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, y, x]`` to ``[n, O, |H|, y', x']``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise DataError(
                f"PartialLiftingConv2d takes pictures [n, {self.in_channels}, y, x], got "
                f"{tuple(x.shape)}"
            )
        live = self.gate.live()
        return _gated(self, x, self.live_filters(live), live)


class PartialGroupConv2d(GroupConv2d):
    """Group convolution with a gate on its output elements.

        y[n,o,h] = (w_h / s) (sum_(i,g) x[n,i,g] * T_h K[o,i,h^-1 g] + b[o])

    Elements with weight zero are not computed, of the output and, if the gate of the input is
    given, of the input: the filters between live elements are all that is convolved. See
    :class:`~margeq.layers.GroupGate` for ``w`` and ``s``, which a width moves; at width 1 it is a
    :class:`GroupConv2d`, and between maps of the smallest width, without mirror, an ordinary
    convolution (times ``1 / s``) of the identity.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters, odd or even.
        group: ``C(n)`` or ``D(n)``.
        width: share of the rotations at the start, as in :class:`~margeq.layers.GroupGate`.
        mirror: see there.
        trained_by: see there.
        scale: see there.
        gate: one of another layer, to share; width, mirror, trained_by and scale are then its own.
        input_gate: the gate through which the input came, with nothing behind it that fills
            elements that are off. It is read, never moved or stored with the layer.
        **options: stride, padding, dilation, groups, bias, padding_mode, filters of a
            :class:`GroupConv2d` of the full kind.

    Shapes:
        ``[n, I, |H|, y, x] -> [n, O, |H|, y', x']``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for an input that is no map on the group with ``I`` channels.

    Reference:
        Romero & Lohit 2022.

    Example:
        >>> from margeq.groups import P4
        >>> first = PartialLiftingConv2d(1, 2, 3, group=P4, width=0.5, padding=1)
        >>> layer = PartialGroupConv2d(2, 3, 3, group=P4, input_gate=first.gate, padding=1)
        >>> layer(first(torch.zeros(1, 1, 5, 5))).shape
        torch.Size([1, 3, 4, 5, 5])
    """

    gate: GroupGate

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Never a separable kind."""
        return nn.Module.__new__(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        group: FiniteGroup,
        width: float = 0.8,
        mirror: float = 0.8,
        trained_by: TrainedBy = "evidence",
        scale: GateScale = "variance",
        gate: GroupGate | None = None,
        input_gate: GroupGate | None = None,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        filters: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, group=group, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode,
            filters=filters,
        )  # fmt: skip
        self.gate = _gate_of(self, gate, width, mirror, trained_by, scale)
        _require_group("input_gate", input_gate, self)
        self._input_gate = (input_gate,)  # in a tuple, so that it is no module of this one

    @property
    def span_dimension(self) -> int:
        """Dimension of the span of its maps at all gates; of a gate at the whole group, there."""
        return _span(self, self.gate)

    @property
    def input_gate(self) -> GroupGate | None:
        """The gate through which the input came."""
        return self._input_gate[0]

    def seen(self) -> Tensor:
        """Indices of the input's elements that can be other than zero."""
        if self.input_gate is None:
            return torch.arange(self.order, device=self.weight.device)
        return self.input_gate.live()

    def live_filters(self, live: Tensor, seen: Tensor) -> Tensor:
        """Filters between some elements, ``[O * l, I / groups * s, k, k]``."""

        def expand() -> Tensor:
            device = self.weight.device
            pairs = live.to(device)[:, None], seen.to(device)
            if self.filter_kind == "pixels":
                turned = self.weight.flatten(2)[..., self._gather_index()[pairs]]
            else:
                shifted = self.weight[:, :, self.group.relative.to(device)[pairs]]
                basis = self.basis[live.to(device)].to(self.weight.dtype)
                turned = torch.einsum("oihgm,hmx->oihgx", shifted, basis)
            merged = turned.transpose(1, 2).flatten(2, 3).flatten(0, 1)
            return merged.unflatten(-1, self.window.kernel_size)

        gates = [self.gate] if self.input_gate is None else [self.gate, self.input_gate]
        return self._remembered.of(expand, _behind_filters(self, *gates))

    def dense_filters(self) -> Tensor:
        """Filters between all channels and elements, gate included, ``[O, |H|, I, |H|, k, k]``."""
        filters = super().dense_filters()
        sees = filters.new_zeros(self.order).index_fill(0, self.seen(), 1.0)
        factors = self.gate.factors().to(filters)
        return torch.einsum("ohigyx,h,g->ohigyx", filters, factors, sees)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, I, |H|, y, x]`` to ``[n, O, |H|, y', x']``."""
        self.check_map(x)
        live, seen = self.gate.live(), self.seen()
        some = take_elements(x, seen).flatten(1, 2)
        return _gated(self, some, self.live_filters(live, seen), live)


def _gate_of(
    layer: PlanarConv,
    gate: GroupGate | None,
    width: float,
    mirror: float,
    trained_by: TrainedBy,
    scale: GateScale,
) -> GroupGate:
    """The given gate, or a new one."""
    if gate is None:
        return GroupGate(layer.group, width, mirror, trained_by=trained_by, scale=scale)
    _require_group("gate", gate, layer)
    return gate


def _require_group(name: str, gate: GroupGate | None, layer: PlanarConv) -> None:
    if gate is not None and gate.group != layer.group:
        raise ConfigError(
            f"{type(layer).__name__}: {name} is a gate on {gate.group!r}, the layer lies on "
            f"{layer.group!r}"
        )


def _span(layer: PlanarConv, gate: GroupGate) -> int:
    """More than that of the symmetric layer as soon as elements count differently."""
    return layer.weight.numel() * (1 if gate.is_whole else gate.n_profiles)


def _behind_filters(layer: PlanarConv, *gates: GroupGate) -> list[Tensor]:
    """All that the filters of live elements follow from."""
    return [layer.weight, layer.basis, *(p for gate in gates for p in gate.parameters())]


def _gated(
    layer: PartialLiftingConv2d | PartialGroupConv2d, x: Tensor, filters: Tensor, live: Tensor
) -> Tensor:
    """Convolve with the filters of live elements, weighted, and fill up with zeros."""
    # filters and biases are smaller than maps
    factors = layer.gate.live_factors(live).to(filters)
    weighted = filters.unflatten(0, (layer.out_channels, -1)) * factors[:, None, None, None]
    bias = None if layer.bias is None else (layer.bias[:, None] * factors).flatten()
    y = layer.window.convolve(x, weighted.flatten(0, 1), bias)
    live_maps = y.unflatten(1, (layer.out_channels, len(live)))
    return place_elements(live_maps, live, layer.order)


def _live_rows(
    layer: PartialLiftingConv2d | PartialGroupConv2d, x: Tensor, found: InputRows
) -> Mapping[str, InputRows]:
    """Rows of some frames alone, of which each counts by its weight."""
    # passes that want gradients and passes that do not have to see the same frames
    live = layer.gate.touched().to(x.device)
    weights = layer.gate.live_factors(live).to(x)
    assert found.frames is not None
    frames = _some(found.frames, live)
    by_frame = frames.apply(found.rows).unflatten(1, (len(live), -1))
    rows = (by_frame * weights.sqrt()[:, None, None, None]).flatten(1, 2)
    n_positions = found.n_positions // layer.order * len(live)
    weight = replace(
        found, rows=rows, n_positions=n_positions, n_frames=len(live), frames=None,
        frame_weights=weights,
    )  # fmt: skip
    return {"weight": weight, **layer.bias_inputs(x, n_positions)}


def _some(frames: Frames, live: Tensor) -> Frames:
    """Some of the frames."""
    if isinstance(frames, PixelFrames):
        return PixelFrames(frames.index[live])
    assert isinstance(frames, BasisFrames)
    return BasisFrames(frames.source[live], frames.basis[live])


_LIFTING, _GROUP_CONV = (cast(Rule, rule_for(kind)) for kind in (LiftingConv2d, GroupConv2d))


def _lifting_inputs(
    layer: PartialLiftingConv2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    return _live_rows(layer, x, _LIFTING.inputs(layer, x, sampler)["weight"])


def _group_inputs(
    layer: PartialGroupConv2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    seen = layer.seen().to(x.device)
    x = place_elements(take_elements(x, seen), seen, layer.order)
    return _live_rows(layer, x, _GROUP_CONV.inputs(layer, x, sampler)["weight"])


def _output_grads(
    layer: PartialLiftingConv2d | PartialGroupConv2d, x: Tensor, grad_y: Tensor
) -> Mapping[str, Tensor]:
    live = layer.gate.touched().to(grad_y.device)
    weights = layer.gate.live_factors(live).to(grad_y)[:, None, None]
    grads = grad_y.index_select(3, live)
    return {
        "weight": layer.output_grads(grads * weights.sqrt())["weight"],
        "bias": layer.output_grads(grads * weights)["bias"],
    }


register_split_rule(PartialLiftingConv2d, rule=Rule(_lifting_inputs, _output_grads))
register_split_rule(PartialGroupConv2d, rule=Rule(_group_inputs, _output_grads))
