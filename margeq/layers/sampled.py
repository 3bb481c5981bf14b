"""The base of convolutions between maps on samples of a group: filters rendered at the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.curvature.io import InputRows, PositionSampler, Rule, bias_rows
from margeq.errors import ConfigError, DataError
from margeq.layers.convolution import patch_rows
from margeq.layers.kernel import ImplicitKernel, canonical_positions, disk, relative_elements
from margeq.layers.maps import default_init
from margeq.layers.samples import GroupSampler, GroupSamples
from margeq.layers.window import Window

__all__ = ["SAMPLED_RULE", "SampledConv"]


class SampledConv(nn.Module):
    """Base of convolutions with filters that are functions on the group, rendered at samples.

    Args:
        in_channels: ``I``.
        out_channels: ``O``.
        window: where filters are applied.
        outputs: elements of the map it writes.
        inputs: elements of the map it reads; ``None`` for a picture.
        bias: one per output channel.
        omega_0: initial frequency of the filters; by default ``(kernel_size - 1) / 2``.
        kernel: further arguments of :class:`~margeq.layers.kernel.ImplicitKernel`.

    Raises:
        ConfigError: for an argument out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: Window,
        outputs: GroupSampler,
        inputs: GroupSampler | None,
        bias: bool,
        omega_0: float | None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        self._require_usable(in_channels, out_channels, outputs, inputs)
        self.in_channels, self.out_channels, self.window = in_channels, out_channels, window
        self.outputs, self.inputs = outputs, inputs
        ends = [end.distribution for end in (outputs, inputs) if end is not None]
        self.has_rotations = any(end.has_rotations for end in ends)
        self.has_mirrors = any(end.has_mirrors for end in ends)
        on_group = inputs is not None
        n_coordinates = 2 * (window.size > 1) + on_group * (2 * self.has_rotations)
        n_coordinates += on_group * self.has_mirrors
        if not n_coordinates:
            raise ConfigError(
                f"{type(self).__name__}: kernel_size=1 and elements without rotations or mirrors "
                f"leave filters nothing to depend on; use an ordinary convolution"
            )
        frequency = max(1.0, (window.size - 1) / 2) if omega_0 is None else omega_0
        self.kernel = ImplicitKernel(n_coordinates, omega_0=frequency, **kernel)
        # follows from the arguments, so it is no state
        inside = disk(window.size).to(torch.get_default_device(), torch.get_default_dtype())
        self.mask = nn.Buffer(inside, persistent=False) if self.has_rotations else None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, self.kernel.n_features))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self._pinned: Tensor | None = None
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be computed again."""
        return self.__dict__ | {"_pinned": None}

    def _require_usable(
        self, in_channels: int, out_channels: int, outputs: Any, inputs: Any
    ) -> None:
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not is_count(value):
                raise ConfigError(f"{type(self).__name__}: {name}={value!r} must be at least 1")
        for name, value in (("outputs", outputs), ("inputs", inputs)):
            if not (isinstance(value, GroupSampler) or (name == "inputs" and value is None)):
                raise ConfigError(f"{type(self).__name__}: {name}={value!r}: use a GroupSampler")

    def reset_parameters(self) -> None:
        """Normal weights under which the filters have unit gain, zero biases."""
        if not self.weight.is_meta:
            default_init(self.weight, fan_in=self.fan_in("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def fan_in(self, name: str) -> float:
        """Output variance of unit-variance weights on white pixels that are alike at all elements.

        Outputs are integrals over the group, so it does not depend on the samples. It is the limit
        of filters that change slowly with the element; others have less gain.

        Returns:
            Channels times pixels, with rotations those of the disk.
        """
        n_pixels = self.window.size**2 if self.mask is None else int(disk(self.window.size).sum())
        return float(self.in_channels * n_pixels)

    def basis(self) -> Tensor:
        """Features of all filters, with the weights of the sum, ``[h, b, (g x)]``."""
        if self._pinned is not None:
            return self._pinned
        return self._rendered()

    @contextmanager
    def pinned(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The features computed once, and a leaf in their place while the context is open.

        Yields:
            The features with their graph, and the leaf.
        """
        psi = self._rendered()
        self._pinned = psi.detach().requires_grad_(psi.requires_grad)
        try:
            yield psi, self._pinned
        finally:
            self._pinned = None

    def _rendered(self) -> Tensor:
        outputs = self._elements(self.outputs)
        inputs = None if self.inputs is None else self._elements(self.inputs)
        features = self.kernel(self._coordinates(outputs, inputs))  # [h, g, x, b]
        if self.mask is not None:
            features = features * self.mask.to(features)[:, None]
        if inputs is not None:
            share = inputs.weights / inputs.weights.sum()
            features = features * share.to(features)[:, None, None]
        return features.flatten(1, 2).mT

    def _elements(self, sampler: GroupSampler) -> GroupSamples:
        # a distribution without parameters does not know the device
        return GroupSamples(*(values.to(self.weight.device) for values in sampler()))

    def _coordinates(self, outputs: GroupSamples, inputs: GroupSamples | None) -> Tensor:
        """``[h, g, x, d]``: a position in the frame of h, and h^-1 g."""
        size = self.window.size
        positions = canonical_positions(size, outputs)[:, None]
        if inputs is None:
            return positions
        relative = relative_elements(outputs, inputs, self.has_rotations, self.has_mirrors)
        relative = relative[:, :, None].expand(-1, -1, size**2, -1)
        if size == 1:
            return relative
        return torch.cat([positions.expand(-1, relative.shape[1], -1, -1), relative], -1)

    def filters(self) -> Tensor:
        """Filters between all channels and elements, ``[(o h), (i g), k, k]``."""
        filters = torch.einsum("oib,hbz->ohiz", self.weight, self.basis().to(self.weight.dtype))
        return filters.flatten(0, 1).unflatten(-1, (-1, *self.window.kernel_size)).flatten(1, 2)

    def convolve(self, x: Tensor) -> Tensor:
        """Maps ``[n, (i g), y, x]`` to ``[n, O, h, y', x']``."""
        filters = self.filters()
        if x.shape[1] != filters.shape[1]:
            raise DataError(
                f"{type(self).__name__} with {self.in_channels} channels takes "
                f"{filters.shape[1]} maps at the present samples, got {x.shape[1]}; does the layer "
                f"before write to the same GroupSampler?"
            )
        order = len(filters) // self.out_channels
        bias = None if self.bias is None else self.bias.repeat_interleave(order)
        return self.window.convolve(x, filters, bias).unflatten(1, (self.out_channels, order))

    def extra_repr(self) -> str:
        """Arguments, for ``print(model)``."""
        return f"{self.in_channels}, {self.out_channels}, {self.window.describe()}"


def _inputs(layer: SampledConv, x: Tensor, sampler: PositionSampler) -> Mapping[str, InputRows]:
    """Patches compared with the features of each output element, ``[n, (h t), 1, (i b)]``."""
    basis = layer.outputs.counted(layer.basis(), 0)
    if x.ndim == 5:  # without gradients the basis does without elements of weight 0
        x = x.narrow(2, 0, basis.shape[-1] // layer.window.size**2)
    patches, n_places = patch_rows(layer.window, x.flatten(1, -3), sampler)
    basis = basis.to(patches.dtype)
    by_channel = patches.unflatten(-1, (layer.in_channels, -1))
    rows = torch.einsum("ntaiz,hbz->nhtaib", by_channel, basis).flatten(1, 2).flatten(-2)
    n_frames = len(basis)
    n_positions = n_places * n_frames
    found = {"weight": InputRows(rows, n_positions, "boi", n_frames=n_frames)}
    if layer.bias is not None:
        found["bias"] = bias_rows(len(x), n_positions, 1, x)
    return found


def _output_grads(layer: SampledConv, x: Tensor, grad_y: Tensor) -> Mapping[str, Tensor]:
    grads = (
        layer.outputs.counted(grad_y, 3)
        .flatten(4)
        .permute(0, 1, 3, 4, 2)
        .flatten(2, 3)[:, :, :, None]
    )
    return {"weight": grads, "bias": grads}


SAMPLED_RULE = Rule(_inputs, _output_grads)
