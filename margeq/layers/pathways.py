"""Sums of named candidate paths, of which the evidence keeps those that the data ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from margeq.curvature.io import rule_for
from margeq.errors import ConfigError
from margeq.paths import Shapes

__all__ = ["ResidualPathways", "span_dimension"]


NO_SHAPES: Shapes = MappingProxyType({})


class ResidualPathways(nn.Module):
    """A layer that is the sum or the mean of named candidate paths (ELLA eq. 4).

        y = scale * sum_p path_p(x),   scale = 1 (sum) or 1 / number of declared paths (mean)

    A path that is switched off is not computed at all. The mean always divides by the number of
    *declared* paths, so switching one off leaves the function of the others as it is.

    Paths at full resolution can be subsampled together: paths that each choose a phase for
    themselves would mix their phases in the sum, which then no longer moves with the input.

        y = scale * (subsample(sum_{p in before} path_p(x)) + sum_{other p} path_p(x))

    Args:
        paths: name -> module; all map the same input to outputs of one shape.
        reduction: ``"mean"`` or ``"sum"``.
        subsample: module without weights for the sum of the paths in ``before``, such as
            :class:`PolyphaseSubsample`; if none of them is on, it is not called.
        before: names of the paths that ``subsample`` follows; the others map to its output's size.

    Raises:
        ConfigError: for no paths, an unknown reduction or path name, outputs of different shapes,
            ``subsample`` without ``before`` or the reverse, or switching off the last path.

    Reference:
        Finzi, Benton & Wilson 2021 (residual pathway priors); ELLA 5.1.

    Example:
        >>> import torch
        >>> layer = ResidualPathways({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
        >>> layer.switch_off("b")
        >>> layer.active
        ('a',)
        >>> layer(torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        paths: Mapping[str, nn.Module],
        reduction: Literal["mean", "sum"] = "mean",
        subsample: nn.Module | None = None,
        before: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not paths:
            raise ConfigError("ResidualPathways needs at least one path")
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction={reduction!r}: use 'mean' or 'sum'")
        try:
            self.paths = nn.ModuleDict(dict(paths))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"paths {list(paths)}: names must be plain words without dots that nn.ModuleDict "
                f"takes, values must be modules ({error})"
            ) from error
        self.reduction = reduction
        self.subsample = subsample
        self.before = self._in_paths(before)
        self._off: frozenset[str] = frozenset()

    @property
    def scale(self) -> float:
        """Factor on each path's output."""
        return 1.0 / len(self.paths) if self.reduction == "mean" else 1.0

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the paths that are computed, in the declared order."""
        return tuple(name for name in self.paths if name not in self._off)

    def switch_off(self, name: str) -> None:
        """Stop computing a path."""
        self._require(name)
        if self.active == (name,):
            raise ConfigError(f"path {name!r} is the last one on; a layer needs at least one path")
        self._off |= {name}

    def switch_on(self, name: str) -> None:
        """Compute a path again."""
        self._require(name)
        self._off -= {name}

    def named_paths(self) -> Iterator[tuple[str, nn.Module]]:
        """Every declared path, on or off."""
        yield from self.paths.items()

    def less_constrained(self, shapes: Shapes = NO_SHAPES) -> tuple[str, ...]:
        """Paths that span more maps than the most constrained path of this layer.

        Among paths that span equally many, those are less constrained that span a larger part of
        all maps between their input and their output.

        Args:
            shapes: input and output shape ``[c, ...]`` of the maps inside, where they are known.

        Returns:
            Names, in the declared order.
        """
        spans = {name: _freedom(path, shapes) for name, path in self.named_paths()}
        smallest = min(spans.values())
        return tuple(name for name, span in spans.items() if span > smallest)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled sum of the paths that are on."""
        total = self._added(None, [name for name in self.active if name in self.before], x)
        if total is not None and self.subsample is not None:
            total = self.subsample(total)
        total = self._added(total, [name for name in self.active if name not in self.before], x)
        assert total is not None
        return total if self.scale == 1.0 else self.scale * total

    def contributions(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each path adds to the sum, before the factor ``scale``.

        A path in ``before`` adds the derivative of the subsampling, at the sum of these paths, in
        the direction of its own output: for a phase that the sum has chosen, its output there.

        Args:
            outputs: path name -> output, of the paths that are on.

        Returns:
            path name -> tensor of the shape of the layer's output.
        """
        found = dict(outputs)
        early = {name: outputs[name] for name in self.before if name in outputs}
        if early and self.subsample is not None:
            total = torch.stack(list(early.values())).sum(0)
            for name, y in early.items():
                found[name] = torch.func.jvp(self.subsample, (total,), (y,))[1]
        return found

    def get_extra_state(self) -> Tensor:
        """Which paths are on, one flag per declared path."""
        return torch.tensor([name not in self._off for name in self.paths], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore which paths are on."""
        flags = zip(self.paths, state.tolist(), strict=True)
        self._off = frozenset(name for name, on in flags if not on)

    def extra_repr(self) -> str:
        """Reduction, subsampled and switched-off paths, for ``print(model)``."""
        before = f", before={self.before}" if self.before else ""
        off = f", off={sorted(self._off)}" if self._off else ""
        return f"reduction={self.reduction!r}{before}{off}"

    def _in_paths(self, before: Sequence[str]) -> tuple[str, ...]:
        """The names in ``before``, in the declared order."""
        if isinstance(before, str):
            raise ConfigError(f"before={before!r}: use a tuple of path names, ({before!r},)")
        if (self.subsample is None) != (not before):
            raise ConfigError(
                f"subsample={self.subsample}, before={tuple(before)}: give both, the module and "
                f"the names of the paths that it follows, or neither"
            )
        for name in before:
            self._require(name)
        return tuple(name for name in self.paths if name in before)

    def _added(self, total: Tensor | None, names: Sequence[str], x: Tensor) -> Tensor | None:
        for name in names:
            y = self.paths[name](x)
            if total is not None and total.shape != y.shape:
                rest = f"; before={self.before} are subsampled, no other" if self.before else ""
                raise ConfigError(
                    f"path {name!r} returns {tuple(y.shape)}, the paths before it "
                    f"{tuple(total.shape)}; all paths of a layer need one output shape{rest}"
                )
            total = y if total is None else total + y
        return total

    def _require(self, name: str) -> None:
        if name not in self.paths:
            raise ConfigError(f"no path {name!r}; this layer has {', '.join(self.paths)}")


def span_dimension(path: nn.Module, shapes: Shapes = NO_SHAPES) -> int:
    """Dimension of the linear span of the maps that a path can represent.

    A layer says so itself in ``span_dimension``; for a plain linear map it is the number of
    weights, of which a convolution on a map smaller than its kernel has fewer that differ. In a
    composition the widest map counts.

    Args:
        path: any module.
        shapes: input and output shape ``[c, ...]`` of the maps inside, where they are known.

    Returns:
        A number of dimensions, 0 for a path without weights.
    """
    return max((_own_span(module, shapes) for module in _maps(path)), default=0)


def _freedom(path: nn.Module, shapes: Shapes) -> tuple[int, float]:
    """The span's dimension, and its share of all maps between the same inputs and outputs."""
    of_all = [
        _own_span(module, shapes) / math.prod(shape.numel() for shape in shapes[module])
        for module in _maps(path)
        if module in shapes
    ]
    return span_dimension(path, shapes), max(of_all, default=0.0)


def _maps(path: nn.Module) -> list[nn.Module]:
    """The modules of a path that are maps by themselves."""
    if hasattr(path, "span_dimension"):
        return [path]
    is_map = isinstance(getattr(path, "weight", None), Tensor) and rule_for(type(path))
    inside = [module for child in path.children() for module in _maps(child)]
    return [path, *inside] if is_map else inside


def _own_span(module: nn.Module, shapes: Shapes) -> int:
    declared = getattr(module, "span_dimension", None)
    if declared is not None:
        return int(declared)
    weight = cast(Tensor, module.weight)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module in shapes:
        pairs = weight.shape[:2].numel()  # of channels
        return min(weight.numel(), pairs * _taps(module, shapes[module][0][1:]))
    return weight.numel()


def _taps(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, extents: torch.Size) -> int:
    """Number of offsets between pixels of a map, of those that the kernel has."""
    circular = conv.padding_mode == "circular"  # offsets that differ by the extent are the same
    offsets = (extent if circular else 2 * extent - 1 for extent in extents)
    return math.prod(map(min, conv.kernel_size, offsets))
