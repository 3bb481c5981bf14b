"""Sparsified factored fully connected path (S-FC, ELLA eq. 7): both factors from few anchors.

The chain rule puts one basis in front of a plain factored map and one behind it, so the curvature
is that of the map between anchors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from margeq.bases import Anchors
from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
)
from margeq.errors import ConfigError
from margeq.groups import FiniteGroup
from margeq.layers.basis import AnchorBasis, lengthscale_penalty
from margeq.layers.factored import FactoredLinear2d
from margeq.layers.maps import MapLayer, Shape

__all__ = ["SparseFactoredLinear2d"]


class SparseFactoredLinear2d(MapLayer):
    """Sparsified factored fully connected map (S-FC, ELLA eq. 7).

        h[n,d,c] = sum_m U[d,c,m] (Psi_U x)[n,c,m] + bU[d]
        y[n,d,y] = sum_m Psi_V[m,y] sum_c V[m,d,c] h[n,d,c]

    Computed as project, factored map between anchors, project: no weight of the size of the maps
    is ever formed.

    On maps of a group both factors are smooth functions of position and group element, under
    lengthscales along each (ELLA eq. 25).

    Args:
        in_channels: ``C``.
        out_channels: ``D``.
        in_shape: spatial size of the input map, ``X`` positions.
        out_shape: spatial size of the output map, ``Y`` positions.
        bias: ``bU [D]``.
        group: ``H``, of maps with ``in_shape=(|H|, y, x)``, the same for ``out_shape``. One of the
            two may lie in the plane alone, ``(y, x)``.
        anchors: as in :class:`SparseConv2d`; positions ``[M, d]`` need a pair (input, output).
        learn_anchors: as there, like the next five.
        basis: see there.
        lengthscale: see there.
        per_filter: one lengthscale per output channel, in each factor.
        lengthscale_spread: see there.
        seed: see there.

    Shapes:
        ``[n, C, *in_shape] -> [n, D, *out_shape]``; ``weight_u [D, C, M_u]``,
        ``weight_v [M_v, D, C]``.

    Raises:
        ConfigError: if an argument is out of range.
        DataError: if an input has another shape.

    Example:
        >>> from margeq.groups import P4
        >>> layer = SparseFactoredLinear2d(2, 3, (4, 5, 5), (4, 3, 3), group=P4)
        >>> layer(torch.zeros(1, 2, 4, 5, 5)).shape, layer.weight_u.shape
        (torch.Size([1, 3, 4, 3, 3]), torch.Size([3, 2, 50]))
    """

    first_factors: ClassVar[tuple[str, ...]] = ("weight_u", "bias_u")
    tied_factors: ClassVar[tuple[tuple[str, ...], ...]] = (("weight_u", "weight_v"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_shape: int | Shape,
        out_shape: int | Shape,
        bias: bool = True,
        *,
        group: FiniteGroup | None = None,
        anchors: Anchors | tuple[Anchors, Anchors] = 0.5,
        learn_anchors: bool = False,
        basis: str = "rbf",
        lengthscale: float = 1.0,
        per_filter: bool = False,
        lengthscale_spread: float | str | None = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, in_shape, out_shape)
        pair = anchors if isinstance(anchors, tuple) else (anchors, anchors)
        if len(pair) != 2:
            raise ConfigError(f"anchors={anchors!r}: a tuple is a pair (input, output)")
        anchors_u, anchors_v = pair
        options: dict[str, Any] = {
            "learn_anchors": learn_anchors,
            "kernel": basis,
            "lengthscale": lengthscale,
            "n_filters": out_channels if per_filter else 1,
            "lengthscale_spread": lengthscale_penalty(lengthscale_spread, per_filter),
        }
        _require_group_maps(group, self.in_shape, self.out_shape)
        on_u, on_v = (_domain(group, shape) for shape in (self.in_shape, self.out_shape))
        self.basis_u = AnchorBasis(**on_u, anchors=anchors_u, seed=2 * seed, **options)
        self.basis_v = AnchorBasis(**on_v, anchors=anchors_v, seed=2 * seed + 1, **options)
        self.weight_u = nn.Parameter(torch.empty(out_channels, in_channels, self.basis_u.n_anchors))
        self.weight_v = nn.Parameter(torch.empty(self.basis_v.n_anchors, out_channels, in_channels))
        self.bias_u = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_factored(cls, dense: FactoredLinear2d, **options: Any) -> SparseFactoredLinear2d:
        """The sparsified layer whose factors come closest to those of a factored one.

        A bias per output position (``bV``) has no counterpart and is dropped.

        Args:
            dense: a factored layer, left as it is.
            **options: anchors, basis, lengthscale, ... of the new layer.

        Returns:
            A new layer on the same device, in the same dtype.

        Raises:
            ConfigError: for anything but a ``FactoredLinear2d``, or an option out of range.
        """
        if not isinstance(dense, FactoredLinear2d):
            raise ConfigError(f"from_factored takes a FactoredLinear2d, not {type(dense).__name__}")
        layer = cls(
            dense.in_channels, dense.out_channels, tuple(dense.in_shape), tuple(dense.out_shape),
            dense.bias_u is not None, **options,
        ).to(dense.weight_u)  # fmt: skip
        with torch.no_grad():
            layer.weight_u.copy_(_fitted(layer.basis_u, dense.weight_u))
            by_output = _fitted(layer.basis_v, dense.weight_v.permute(1, 2, 0))
            layer.weight_v.copy_(by_output.permute(2, 0, 1))
            if dense.bias_u is not None and layer.bias_u is not None:
                layer.bias_u.copy_(dense.bias_u)
        return layer

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent."""
        return self.weight_u.numel() * len(self.weight_v)

    def reset_parameters(self) -> None:
        """Normal factors under which each has unit gain, zero biases."""
        if self.weight_u.is_meta:
            return  # nothing to write to, and no basis to read
        for name in ("weight_u", "weight_v"):
            with torch.no_grad():
                getattr(self, name).normal_(0.0, self.fan_in(name) ** -0.5)
        if self.bias_u is not None:
            nn.init.zeros_(self.bias_u)

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white inputs: the function scale."""
        if name == "weight_u":
            return self.basis_u.square_norm()
        return self.in_channels * self.basis_v.square_norm() / self.out_shape.numel()

    def bases(self) -> dict[str, tuple[str, AnchorBasis]]:
        """Weight -> on which side of it a basis stands, and that basis."""
        return {"weight_u": ("input", self.basis_u), "weight_v": ("output", self.basis_v)}

    def projected(self, x: Tensor) -> Tensor:
        """The input at the anchors, ``[n, G, c, m]``; ``G`` is 1 or ``D``."""
        maps = x.reshape(len(x), self.in_channels, -1)
        return torch.einsum("ncx,gmx->ngcm", maps, self.basis_u().to(x.dtype))

    def hidden(self, projected: Tensor) -> Tensor:
        """The bottleneck ``h[n, d, c]`` from the input at the anchors."""
        # a basis of all outputs has d = 1, which einsum broadcasts without a copy per output
        h = torch.einsum("ndcm,dcm->ndc", projected, self.weight_u)
        return h if self.bias_u is None else h + self.bias_u[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, C, *in_shape]`` to ``[n, D, *out_shape]``."""
        self.check_input(x)
        values = torch.einsum("ndc,mdc->ndm", self.hidden(self.projected(x)), self.weight_v)
        y = torch.einsum("ndm,dmy->ndy", values, self.basis_v().to(x.dtype))
        return y.reshape(len(x), self.out_channels, *self.out_shape)

    def induced_weight(self) -> Tensor:
        """The map as a matrix ``[D * Y, C * X]``; materialised, for reports and tests."""
        u = torch.einsum("dcm,dmx->dcx", self.weight_u, self.basis_u())
        v = torch.einsum("mdc,dmy->dyc", self.weight_v, self.basis_v())
        return torch.einsum("dyc,dcx->dycx", v, u).flatten(2).flatten(0, 1)


def _require_group_maps(group: FiniteGroup | None, *shapes: torch.Size) -> None:
    if group is None:
        return
    on_group = [shape for shape in shapes if len(shape) == 3 and shape[0] == group.order]
    rest = [shape for shape in shapes if len(shape) != 2 and shape not in on_group]
    if rest or not on_group:
        raise ConfigError(
            f"SparseFactoredLinear2d: maps of shapes {[tuple(shape) for shape in shapes]} with "
            f"group={group!r}: use ({group.order}, y, x), and at most one (y, x)"
        )


def _domain(group: FiniteGroup | None, shape: torch.Size) -> dict[str, Any]:
    """Where the filters of a factor live: the plane, or the plane for each element."""
    if group is None or len(shape) == 2:
        return {"shape": shape}
    return {"shape": shape[1:], "group": group}


def _fitted(basis: AnchorBasis, filters: Tensor) -> Tensor:
    """Least-squares values ``[D, ..., M]`` for filters ``[D, ..., X]``."""
    if basis.n_filters > 1:
        return basis.fit(filters)
    return basis.fit(filters[None])[0]


def _inputs(
    layer: SparseFactoredLinear2d, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    projected = layer.projected(x)
    hidden = layer.hidden(projected)[:, None]
    found = {
        "weight_u": _first_factor_rows(layer, projected),
        "weight_v": InputRows(hidden, 1),
    }
    if layer.bias_u is not None:
        found["bias_u"] = bias_rows(len(x), layer.in_channels, 1, x)
    return found


def _first_factor_rows(layer: SparseFactoredLinear2d, projected: Tensor) -> InputRows:
    if layer.basis_u.n_filters > 1:
        return InputRows(projected.flatten(1, 2)[:, None], 1, "boi")
    return InputRows(projected, 1)


def _grads(layer: SparseFactoredLinear2d, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    grads = grad_y.reshape(*grad_y.shape[:3], -1)
    psi_v = layer.basis_v().to(grads.dtype)
    grad_v = torch.einsum("vndy,dmy->vndm", grads, psi_v)[:, :, None]
    grad_u = torch.einsum("vntdm,mdc->vntcd", grad_v, layer.weight_v)
    own = layer.basis_u.n_filters > 1
    return {
        "weight_u": grad_u.transpose(3, 4).flatten(3)[..., None] if own else grad_u,
        "bias_u": grad_u.transpose(2, 3),
        "weight_v": grad_v,
    }


register_split_rule(SparseFactoredLinear2d, rule=Rule(_inputs, _grads))
