"""Learned input augmentation: a whole network is averaged over a learned range of affine maps.

The alternative to symmetries of layers: one symmetry, of the function as a whole, at the cost of
several passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from margeq.counts import is_count
from margeq.curvature.copies import one_copy
from margeq.data.geometry import PADDINGS, warped
from margeq.errors import ConfigError, DataError

__all__ = ["AFFINE", "AugmentedInputs", "TrainedBy"]

TrainedBy = Literal["evidence", "loss"]

AFFINE = ("rotation", "shift_x", "shift_y", "scale_x", "scale_y", "shear")
"""The six generators of affine maps of the plane."""

_MIRROR = "mirror"
# largest widths: half a circle to each side, half a picture, a factor of 2, a shear by 1
_LIMITS = {
    "rotation": math.pi, "shift_x": 1.0, "shift_y": 1.0, "scale_x": math.log(2.0),
    "scale_y": math.log(2.0), "shear": 1.0, _MIRROR: 0.5,
}  # fmt: skip
# homogeneous coordinates (x to the right, y down, 1): entries of each generator that are not zero
_ENTRIES = {
    "rotation": {(0, 1): -1.0, (1, 0): 1.0},
    "shift_x": {(0, 2): 1.0},
    "shift_y": {(1, 2): 1.0},
    "scale_x": {(0, 0): 1.0},
    "scale_y": {(1, 1): 1.0},
    "shear": {(0, 1): 1.0, (1, 0): 1.0},
}
_START = 0.25  # of the limit
_END = 40.0
"""Logit whose sigmoid is 1 to the last bit of float64, and 4e-18 with the other sign."""


class AugmentedInputs(nn.Module):
    """Any network on pictures, averaged over random affine changes of its input.

        f(x) = 1/S sum_s f_theta(T_s x),   T_s = exp(sum_k eta_k eps_sk G_k),  eps_sk ~ U[-1, 1]

    The outputs (logits) are averaged. In training mode every picture has fresh draws. In
    evaluation mode, and so in curvature passes, all pictures share ``S`` fixed points that are
    equally spaced along each generator: outputs repeat and do not depend on the batch. With one
    generator, the rotation, at its full width, the points are ``S`` equal turns: the average over
    a group. The generator ``"mirror"`` adds the mirrored pictures, whose share of the average is
    its width.

    Each width is ``limit * sigmoid(logit)``. Limits: rotation π, shifts 1 (half a side), log scales
    log 2, shear 1, mirror ½. A width that begins at 0 or at its limit stays there.

    With ``trained_by="evidence"`` the widths are hyperparameters that
    :func:`margeq.optimize_marglik` moves. With ``"loss"`` they are ordinary parameters for a
    training loop of one's own, whose loss :meth:`bonus` completes (Augerino); without it a loss
    has no reason to widen them.

    Cost: ``S`` passes through the network (``2 S`` with ``"mirror"``), in training, prediction and
    curvature alike, one after the other; graphs and recorded inputs of all of them are in memory
    at once. The curvature takes the copies of a datum as one call of each weight: at width 0 the
    evidence is that of the bare network.

    Args:
        model: the network, ``[n, channels, height, width]`` in, one tensor out.
        n_samples: ``S``.
        widths: initial widths by generator, or one share of the limit for all of them.
        generators: any of :data:`AFFINE` and ``"mirror"``.
        trained_by: ``"evidence"`` or ``"loss"``.
        padding: what lies outside of the pictures: ``"zeros"``, ``"border"`` or ``"reflection"``.
        generator: of the draws in training mode; by default torch's global random state, which
            :func:`margeq.optimize_marglik` seeds.

    Shapes:
        As the network; ``logit_widths [len(generators)]``.

    Raises:
        ConfigError: for an argument out of range.
        DataError: for inputs that are no pictures.

    Reference:
        Benton et al. 2020 (Augerino); Immer et al. 2022 (by the evidence).

    Example:
        >>> turned = AugmentedInputs(nn.Flatten(), n_samples=4, widths={"rotation": math.pi},
        ...                          generators=["rotation"]).eval()
        >>> x = torch.rand(1, 1, 5, 5)
        >>> torch.allclose(turned(x), turned(x.rot90(1, (2, 3))), atol=1e-5)
        True
    """

    limits: Tensor
    points: Tensor
    matrices: Tensor

    def __init__(
        self,
        model: nn.Module,
        n_samples: int = 4,
        *,
        widths: float | Mapping[str, float] = _START,
        generators: Sequence[str] = AFFINE,
        trained_by: TrainedBy = "evidence",
        padding: str = "zeros",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(n_samples, generators, trained_by, padding)
        self.model, self.n_samples = model, n_samples
        self.generators, self.trained_by = tuple(generators), trained_by
        self.padding, self.generator = padding, generator
        self.hyperparameter_names = ("logit_widths",) if trained_by == "evidence" else ()
        affine = [name for name in self.generators if name != _MIRROR]
        self.logit_widths = nn.Parameter(_logits(widths, self.generators))
        limits = torch.tensor([_LIMITS[name] for name in self.generators], dtype=torch.float64)
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("points", _points(n_samples, len(affine)), persistent=False)
        self.register_buffer("matrices", _matrices(affine), persistent=False)

    @property
    def widths(self) -> Tensor:
        """One per generator, in natural units: radians, half sides, logs of factors, shares."""
        return self.logit_widths.sigmoid() * self.limits.to(self.logit_widths)

    def named_widths(self) -> dict[str, float]:
        """Generator -> width."""
        return dict(zip(self.generators, self.widths.tolist(), strict=True))

    def bonus(self, strength: float = 0.01) -> Tensor:
        """Augerino's reward of wide augmentations, to be added to the training loss.

            - strength * |eta|

        Args:
            strength: in nats per unit of width; the published runs used 0.01 to 0.1.

        Returns:
            A scalar that is zero or less, differentiable in the widths.
        """
        return -strength * self.widths.norm()

    def forward(self, images: Tensor) -> Tensor:
        """Average of the network's outputs over the copies of each picture."""
        if images.ndim != 4:
            raise DataError(
                f"AugmentedInputs got {tuple(images.shape)}; it changes pictures, "
                f"[n, channels, height, width]"
            )
        average = object()
        total: Tensor | None = None
        for copy, share in self._copies(images):
            with one_copy(average, share):
                output = self.model(copy)
            total = output * share if total is None else total + output * share
        assert total is not None
        return total

    def _copies(self, images: Tensor) -> Iterator[tuple[Tensor, float | Tensor]]:
        """The changed pictures, and their shares of the average, one sample after the other."""
        widths, has_mirror = self.widths, _MIRROR in self.generators
        mirrored = widths[self.generators.index(_MIRROR)] if has_mirror else 0.0
        for maps in self._maps(images, widths):
            yield warped(images, maps, self.padding), (1.0 - mirrored) / self.n_samples
            if has_mirror:
                yield warped(images.flip(-1), maps, self.padding), mirrored / self.n_samples

    def _maps(self, images: Tensor, widths: Tensor) -> Tensor:
        """``[S, n, 2, 3]``, from output to input coordinates that run from -1 to 1."""
        n_data, _, height, width = images.shape
        affine = [i for i, name in enumerate(self.generators) if name != _MIRROR]
        draws = self.points[:, None].to(widths)
        if self.training:
            uniform = torch.rand(
                self.n_samples, n_data, len(affine), generator=self.generator,
                dtype=widths.dtype, device=None if self.generator else widths.device,
            )  # fmt: skip
            draws = 2.0 * uniform.to(widths) - 1.0
        algebra = torch.einsum("snk,k,kij->snij", draws, widths[affine], self.matrices.to(widths))
        maps = torch.linalg.matrix_exp(algebra)[:, :, :2]
        # the generators act on squares: a turn of an oblong picture is one in pixels too
        aspect = maps.new_tensor([[1.0, height / width, 1.0], [width / height, 1.0, 1.0]])
        return (maps * aspect).expand(-1, n_data, -1, -1)

    def extra_repr(self) -> str:
        """Generators and who moves them, for ``print(model)``."""
        return (
            f"n_samples={self.n_samples}, generators={self.generators}, "
            f"trained_by={self.trained_by!r}"
        )


def _check(n_samples: int, generators: Sequence[str], trained_by: str, padding: str) -> None:
    if trained_by not in get_args(TrainedBy):
        raise ConfigError(f"trained_by={trained_by!r}; choose one of {get_args(TrainedBy)}")
    least = 2 if trained_by == "evidence" and tuple(generators) != (_MIRROR,) else 1
    if not (is_count(n_samples) and n_samples >= least):
        raise ConfigError(
            f"n_samples={n_samples!r}; use a whole number of at least {least}: in evaluation mode "
            f"a single sample is the picture itself, whatever the widths"
        )
    names = set(generators)
    if isinstance(generators, str) or not names or len(names) < len(generators):
        raise ConfigError(f"generators={generators!r}; use a list of different names")
    if not names <= _LIMITS.keys():
        raise ConfigError(f"generators={generators!r}; choose among {tuple(_LIMITS)}")
    if padding not in PADDINGS:
        raise ConfigError(f"padding={padding!r}; choose one of {PADDINGS}")


def _logits(widths: float | Mapping[str, float], generators: Sequence[str]) -> Tensor:
    """Logits of the initial widths in units of their limits."""
    if isinstance(widths, Mapping):
        if set(widths) != set(generators):
            raise ConfigError(
                f"widths for {sorted(widths)}, generators {sorted(generators)}; give one width to "
                f"each of them"
            )
        shares = [widths[name] / _LIMITS[name] for name in generators]
    else:
        shares = [widths] * len(generators)
    for name, share in zip(generators, shares, strict=True):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(
                f"the width of {name!r} is {share:.4g} times its limit {_LIMITS[name]:.4g}; use 0 "
                f"to 1 times"
            )
    logits = torch.tensor(shares, dtype=torch.float64).logit().clamp(-_END, _END)
    return logits.to(torch.get_default_dtype())


def _points(n_samples: int, n_generators: int) -> Tensor:
    """Draws ``[S, K]`` in (-1, 1): every column holds the middles of ``S`` equal intervals."""
    middles = (2.0 * torch.arange(n_samples, dtype=torch.float64) + 1.0) / n_samples - 1.0
    columns = [middles]
    for seed in range(1, n_generators):
        order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
        columns.append(middles[order])
    return torch.stack(columns, dim=1)[:, :n_generators]


def _matrices(generators: Sequence[str]) -> Tensor:
    """``[K, 3, 3]``."""
    matrices = torch.zeros(len(generators), 3, 3, dtype=torch.float64)
    for matrix, name in zip(matrices, generators, strict=True):
        for place, value in _ENTRIES[name].items():
            matrix[place] = value
    return matrices
