"""What lifting and group convolutions share: filters that are turned, and the window they slide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.curvature.io import InputRows, bias_rows
from margeq.errors import ConfigError, DataError
from margeq.filters import rotated_basis
from margeq.groups import FiniteGroup
from margeq.groups.planar import is_exact, stencil
from margeq.layers.expandable import Expandable
from margeq.layers.maps import default_init
from margeq.layers.remembered import Remembered
from margeq.layers.window import PaddingMode, Window

__all__ = ["PlanarConv", "resolve_filters"]


class PlanarConv(Expandable):
    """Base of convolutions whose filters are moved by each element of a group of the plane.

        (T_h w)(x) = sum_m w_m psi_m(h^-1 x)

    Subclasses add the weight, whose last axis runs over the functions ``psi_m``, and the map.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        kernel_size: extent of the filters.
        group: rotations and reflections ``H``.
        stride: as in ``torch.nn.Conv2d``.
        padding: pixels on each side, or ``"same"``.
        dilation: as in ``torch.nn.Conv2d``.
        groups: independent blocks of channels, as in ``torch.nn.Conv2d``.
        padding_mode: as in ``torch.nn.Conv2d``.
        filters: see :func:`margeq.filters.rotated_basis`; ``"auto"`` is ``"pixels"`` where the
            group maps pixels to pixels and ``"band-limited"`` elsewhere.

    Raises:
        ConfigError: for an argument out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    basis: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        group: FiniteGroup,
        stride: int,
        padding: int | str,
        dilation: int,
        groups: int,
        padding_mode: PaddingMode,
        filters: str,
    ) -> None:
        super().__init__()
        self.window = Window(kernel_size, stride, padding, dilation, padding_mode, groups)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not is_count(value) or value % groups:
                raise ConfigError(
                    f"{type(self).__name__}: {name}={value!r} must be a positive multiple of "
                    f"groups={groups}"
                )
        self.in_channels, self.out_channels, self.group = in_channels, out_channels, group
        self.filter_kind = resolve_filters(filters, group)
        self._exact_basis = rotated_basis(group, kernel_size, self.filter_kind)
        place = torch.get_default_device(), torch.get_default_dtype()
        # it follows from the arguments, so it is no state
        self.basis = nn.Buffer(self._exact_basis.to(*place), persistent=False)
        self._remembered = Remembered()
        # with assign=True the weight comes from elsewhere
        self.register_load_state_dict_post_hook(_follow_weights)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.follow_weights()
        return self

    def follow_weights(self) -> None:
        """Put what follows from the arguments where the weights are, exact again if it was not."""
        self.basis = self._exact_basis.to(next(self.parameters()))

    @property
    def order(self) -> int:
        """Number of elements of the group."""
        return self.group.order

    @property
    def n_functions(self) -> int:
        """Number of functions ``psi_m`` that span the filters."""
        return self.basis.shape[1]

    def add_parameters(self, *inner: int, bias: bool) -> None:
        """Give the layer its weight ``[O, *inner]`` and its bias ``[O]``."""
        self.weight = nn.Parameter(torch.empty(self.out_channels, *inner))
        self.bias = nn.Parameter(torch.empty(self.out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights under which the filters have unit gain, zero biases."""
        if not self.weight.is_meta:
            default_init(self.weight, fan_in=self.fan_in("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white inputs: the function scale."""
        copies = self.weight[0].numel() // self.n_functions
        return copies * float(self._exact_basis.square().sum()) / self.order

    @property
    def span_dimension(self) -> int:
        """Dimension of the linear span of all maps it can represent."""
        return self.weight.numel()

    def expanded_bias(self) -> Tensor | None:
        """The bias of each output channel at every group element, ``[O * |H|]``."""
        return None if self.bias is None else self.bias.repeat_interleave(self.order)

    def filters(self) -> Tensor:
        """The filters of all elements, for callers to keep."""
        return self.kept_filters().clone()

    def kept_filters(self) -> Tensor:
        """The filters of all elements, made anew only when the weight has changed; read only."""
        return self._remembered.of(self.expand, [self.weight, self.basis])

    def expand(self) -> Tensor:
        """The filters of all elements, as the convolution takes them."""
        raise NotImplementedError

    def check_map(self, x: Tensor) -> None:
        """Refuse what is no map on the group.

        Raises:
            DataError: naming both shapes.
        """
        if x.ndim != 5 or x.shape[1:3] != (self.in_channels, self.order):
            raise DataError(
                f"{type(self).__name__} takes maps [n, {self.in_channels}, {self.order}, y, x] on "
                f"{self.group!r}, got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Arguments, for ``print(model)``."""
        shown = f"{self.in_channels}, {self.out_channels}, {self.window.describe()}"
        kind = "" if self.filter_kind == "pixels" else f", filters={self.filter_kind!r}"
        return f"{shown}, group={self.group!r}{kind}"

    def pixel_index(self) -> Tensor:
        """``[h, x]``, the pixel at which the filter of element h shows the base filter's x."""
        size = self.window.size
        return stencil(self.group, size, size)[self.group.inverse].to(self.weight.device)

    def bias_inputs(self, x: Tensor, n_positions: int) -> dict[str, InputRows]:
        """Inputs of the bias, if there is one."""
        return {} if self.bias is None else {"bias": bias_rows(len(x), n_positions, 1, x)}

    def output_grads(self, grad_y: Tensor) -> dict[str, Tensor]:
        """Gradients ``[v, n, (h t), b, o]`` of an output ``[v, n, O, h, y, x]``."""
        blocks = self.window.groups
        grads = grad_y.flatten(4).unflatten(2, (blocks, -1)).permute(0, 1, 4, 5, 2, 3).flatten(2, 3)
        return {"weight": grads, "bias": grads.flatten(3)[:, :, :, None]}


def _follow_weights(layer: PlanarConv, incompatible_keys: object) -> None:
    layer.follow_weights()


def resolve_filters(filters: str, group: FiniteGroup) -> str:
    """The kind of filters that ``"auto"`` means for a group."""
    if filters != "auto":
        return filters
    return "pixels" if is_exact(group) else "band-limited"
