"""Sums of named candidate paths, of which the evidence keeps those that the data ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from margeq.curvature.io import rule_for
from margeq.errors import ConfigError

__all__ = ["ResidualPathways", "span_dimension"]


class ResidualPathways(nn.Module):
    """A layer that is the sum or the mean of named candidate paths (ELLA eq. 4).

        y = scale * sum_p path_p(x),   scale = 1 (sum) or 1 / number of declared paths (mean)

    A path that is switched off is not computed at all. The mean always divides by the number of
    *declared* paths, so switching one off leaves the function of the others as it is.

    Args:
        paths: name -> module; all map the same input to outputs of one shape.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        ConfigError: for no paths, an unknown reduction or path name, outputs of different shapes,
            or switching off the last path.

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
        self, paths: Mapping[str, nn.Module], reduction: Literal["mean", "sum"] = "mean"
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

    def less_constrained(self) -> tuple[str, ...]:
        """Paths that span more maps than the most constrained path of this layer."""
        spans = {name: span_dimension(path) for name, path in self.named_paths()}
        smallest = min(spans.values())
        return tuple(name for name, span in spans.items() if span > smallest)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled sum of the paths that are on."""
        total: Tensor | None = None
        for name in self.active:
            y = self.paths[name](x)
            if total is not None and total.shape != y.shape:
                raise ConfigError(
                    f"path {name!r} returns {tuple(y.shape)}, the paths before it "
                    f"{tuple(total.shape)}; all paths of a layer need one output shape"
                )
            total = y if total is None else total + y
        assert total is not None
        return total if self.scale == 1.0 else self.scale * total

    def get_extra_state(self) -> Tensor:
        """Which paths are on, one flag per declared path."""
        return torch.tensor([name not in self._off for name in self.paths], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore which paths are on."""
        flags = zip(self.paths, state.tolist(), strict=True)
        self._off = frozenset(name for name, on in flags if not on)

    def extra_repr(self) -> str:
        """Reduction and switched-off paths, for ``print(model)``."""
        return f"reduction={self.reduction!r}" + (f", off={sorted(self._off)}" if self._off else "")

    def _require(self, name: str) -> None:
        if name not in self.paths:
            raise ConfigError(f"no path {name!r}; this layer has {', '.join(self.paths)}")


def span_dimension(path: nn.Module) -> int:
    """Dimension of the linear span of the maps that a path can represent.

    A layer says so itself in ``span_dimension``; for a plain linear map it is the number of
    weights. In a composition the widest map counts.

    Returns:
        A number of dimensions, 0 for a path without weights.
    """
    own = getattr(path, "span_dimension", None)
    if own is not None:
        return int(own)
    weight = getattr(path, "weight", None)
    here = weight.numel() if isinstance(weight, Tensor) and rule_for(type(path)) else 0
    return max([here, *(span_dimension(child) for child in path.children())])
