"""What the inputs of a call add to an input covariance, per place and frame or in the mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from margeq.curvature.fourier import GroupCirculant
from margeq.curvature.frames import Frames
from margeq.curvature.io import InputRows
from margeq.linalg import gram

__all__ = ["InputTerm", "input_term", "promoted", "reduced_positions", "summed_rows", "times_roots"]


@dataclass(frozen=True)
class InputTerm:
    """What one batch adds to an input covariance: ``scale * gram(rows)``, summed over frames."""

    name: str
    rows: Tensor
    scale: float
    n_shared: int
    frames: Frames | None = None
    symmetry: GroupCirculant | None = None

    def expanded_rows(self) -> Tensor:
        """Rows that run over the frames."""
        return self.rows if self.frames is None else self.frames.apply(self.rows)

    def gram(self) -> Tensor:
        """The covariance, through that of the rows alone."""
        cov = gram(self.rows)
        cov = cov if self.frames is None else self.frames.conjugate(cov)
        return cov if self.scale == 1.0 else cov * self.scale


def summed_rows(rows: InputRows) -> Tensor:
    """Rows summed over all positions, ``[n, 1, b, i]``."""
    total = _evened(promoted(rows.rows), rows, reduced=True).sum(1, keepdim=True)
    return total if rows.frames is None else rows.frames.apply(total).sum(1, keepdim=True)


def input_term(name: str, rows: InputRows, places: bool, frames: bool) -> InputTerm:
    """A covariance over the axes of the shared positions that are not reduced to their means."""
    n_data, n_positions = len(rows.rows), rows.n_positions
    # means over the frames have another structure
    symmetry = None if frames or rows.frames is None else rows.frames.symmetry
    if not (places or frames):
        values = _evened(promoted(rows.rows), rows, reduced=False)
        n_sampled = values.shape[1] * (rows.n_frames if rows.frames else 1)
        scale = n_positions / n_sampled
        return InputTerm(name, values, scale, n_data * n_positions, rows.frames, symmetry)
    values = _evened(promoted(rows.expanded().rows), rows, reduced=frames)
    n_places = n_positions // rows.n_frames
    reduced = reduced_positions(values, rows.n_frames, places, frames) / (
        n_places if places else rows.n_frames
    )
    n_shared = rows.n_frames if places else n_places
    scale = n_shared / reduced.shape[1]
    return InputTerm(name, reduced, scale, n_data * n_shared, symmetry=symmetry)


def _evened(values: Tensor, rows: InputRows, *, reduced: bool) -> Tensor:
    # sum_h w^2 aa^T (x) gg^T ~ (sum_h w aa^T) (x) (sum_h w gg^T) (sum_h w^2) / (sum_h w)^2, and a
    # mean over frames is sum_h w a / sum_h w. Rows carry sqrt(w), and whatever comes of them is
    # divided by the number of frames, which is right where all weigh the same.
    weights = rows.frame_weights
    if weights is None:
        return values
    if reduced:
        return times_roots(values, weights / weights.mean() ** 2)
    return values * (weights.square().mean().sqrt() / weights.mean()).to(values)


def times_roots(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values ``[n, (h t), b, .]`` times the root of each frame's weight."""
    if weights is None:
        return values
    by_frame = values.unflatten(1, (len(weights), -1))
    return (by_frame * weights.to(values).sqrt()[:, None, None, None]).flatten(1, 2)


def reduced_positions(values: Tensor, n_frames: int, places: bool, frames: bool) -> Tensor:
    """Sums over places and frames of values ``[n, (h t), b, .]``."""
    if values.shape[1] == 1 or not (places or frames):
        return values
    if places and frames:
        return values.sum(1, keepdim=True)
    by_frame = values.unflatten(1, (n_frames, -1))
    return by_frame.sum(2) if places else by_frame.sum(1)


def promoted(values: Tensor) -> Tensor:
    """Half precision as float32, the least that factors are formed in."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values
