"""Linear maps that commute with two given representations (ELLA eq. 28, Finzi et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from margeq.curvature.io import (
    InputRows,
    PositionSampler,
    Rule,
    bias_rows,
    register_split_rule,
    sampled_rows,
)
from margeq.errors import ConfigError
from margeq.groups.intertwiners import intertwiners, invariants
from margeq.groups.representations import LieRepresentation, Representation
from margeq.layers.maps import MapLayer

__all__ = ["EquivariantLinear"]

AnyRepresentation = Representation | LieRepresentation


class EquivariantLinear(MapLayer):
    """All linear maps that commute with a group, given by its representations (ELLA eq. 28).

        y[n,o,r] = sum_(i,b,s) u[o,i,b] Psi[b,r,s] x[n,i,s] + sum_b v[o,b] psi[b,r]
        Psi[b] rho_in(g) = rho_out(g) Psi[b],   psi[b] = rho_out(g) psi[b]   for all g

    ``Psi`` is an orthonormal basis of such maps; ``psi`` is an orthogonal basis of the vectors
    that do not move, of unit mean square, so that for permutations it is the usual bias.

    Args:
        rep_in: how the group acts on the inputs.
        rep_out: how it acts on the outputs; a representation of the same group or Lie algebra.
        in_channels: number of input vectors ``i``.
        out_channels: number of output vectors ``o``.
        bias: ``v``; left out if every vector of ``rep_out`` moves.

    Shapes:
        ``[n, in_channels, d_in] -> [n, out_channels, d_out]``; ``weight [o, i, b]``,
        ``bias [o, b]``.

    Raises:
        ConfigError: for arguments that are no representations of one group, a size that is not
            positive, or representations between which only the zero map commutes.
        DataError: if an input has another shape.

    Reference:
        Finzi, Welling & Wilson 2021.

    Example:
        >>> from margeq.groups import S, standard
        >>> items = standard(S(4))
        >>> layer = EquivariantLinear(items, items, in_channels=2, out_channels=3)
        >>> layer.weight.shape, layer.bias.shape, layer(torch.zeros(1, 2, 4)).shape
        (torch.Size([3, 2, 2]), torch.Size([3, 1]), torch.Size([1, 3, 4]))
    """

    def __init__(
        self,
        rep_in: AnyRepresentation,
        rep_out: AnyRepresentation,
        in_channels: int = 1,
        out_channels: int = 1,
        bias: bool = True,
    ) -> None:
        for name, rep in (("rep_in", rep_in), ("rep_out", rep_out)):
            if not isinstance(rep, AnyRepresentation):
                raise ConfigError(
                    f"{name}={rep!r:.80}: use a Representation or a LieRepresentation, such as "
                    f"margeq.groups.standard(group)"
                )
        super().__init__(in_channels, out_channels, rep_in.dim, rep_out.dim)
        self.rep_in, self.rep_out = rep_in, rep_out
        self._maps = intertwiners(rep_in, rep_out)
        self._vectors = invariants(rep_out) * rep_out.dim**0.5
        if not len(self._maps):
            raise ConfigError(
                f"EquivariantLinear: only the zero map commutes with {rep_in!r} and {rep_out!r}; "
                f"use representations with a part in common"
            )
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, len(self._maps)))
        has_bias = bias and len(self._vectors) > 0
        self.bias = (
            nn.Parameter(torch.empty(out_channels, len(self._vectors))) if has_bias else None
        )
        # not in the state: the representations determine them
        self.basis = nn.Buffer(self._maps.to(self.weight), persistent=False)
        self.bias_basis = nn.Buffer(self._vectors.to(self.weight), persistent=False)
        # with assign=True the weight comes from elsewhere
        self.register_load_state_dict_post_hook(_follow_weight)
        self.reset_parameters()

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent: its weights."""
        return self.weight.numel()

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white inputs, the mean over entries."""
        return self.in_channels * len(self._maps) / self.out_shape.numel()

    def reset_parameters(self) -> None:
        """Normal weights under which outputs have unit gain, zero biases."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.fan_in("weight") ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, in_channels, d_in]`` to ``[n, out_channels, d_out]``."""
        self.check_input(x)
        maps = torch.einsum("oib,brs->oris", self.weight, self.basis)
        y = torch.einsum("nis,oris->nor", self.vectors(x), maps)
        return y if self.bias is None else y + self.bias @ self.bias_basis

    def vectors(self, x: Tensor) -> Tensor:
        """Inputs as ``[n, in_channels, d_in]``."""
        return x.reshape(len(x), self.in_channels, self.rep_in.dim)

    def induced_weight(self) -> Tensor:
        """The map as a matrix, ``[out_channels * d_out, in_channels * d_in]``."""
        maps = torch.einsum("oib,brs->oris", self.weight, self.basis)
        return maps.flatten(2).flatten(0, 1)

    def extra_repr(self) -> str:
        """Representations and channels, for ``print(model)``."""
        return f"{self.rep_in}, {self.rep_out}, {self.in_channels}, {self.out_channels}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.follow_weight()
        return self

    def follow_weight(self) -> None:
        """Make the bases again, where and as precise as the weight is."""
        # a basis that was rounded to single precision would not commute in double precision
        self.basis = self._maps.to(self.weight)
        self.bias_basis = self._vectors.to(self.weight)


def _follow_weight(layer: EquivariantLinear, _: Any) -> None:
    layer.follow_weight()


def _inputs(
    layer: EquivariantLinear, x: Tensor, sampler: PositionSampler
) -> Mapping[str, InputRows]:
    rows = torch.einsum("brs,nis->nrib", layer.basis, layer.vectors(x)).flatten(2)[:, :, None]
    found = {"weight": InputRows(sampled_rows(rows, sampler), rows.shape[1])}
    if layer.bias is not None:
        found["bias"] = bias_rows(len(x), 1, 1, rows)
    return found


def _output_grads(layer: EquivariantLinear, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    found = {"weight": grad_y.transpose(2, 3)[:, :, :, None]}
    if layer.bias is not None:
        # one bias per (o, b), at one position: exact for any basis of invariant vectors
        found["bias"] = (grad_y @ layer.bias_basis.mT).flatten(2)[:, :, None, None]
    return found


register_split_rule(EquivariantLinear, rule=Rule(_inputs, _output_grads))
