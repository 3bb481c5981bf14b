"""Sixes upside down and mirrored (Romero & Lohit 2022, table 1 and figure 4).

Tasks: ``mnist6-180``, sixes turned by an angle uniform on the circle; ``mnist6-half``, by 0 or 180
degrees; ``mnist6-mirror``, mirrored or not. Networks with the whole symmetry can only guess. Sixes
are slanted, so that on the circle turns near 90 degrees are a guess for every network; only the
half turn has answers that can all be right.

Run with ``python -m experiments.partial_toy``.
"""

from __future__ import annotations

from typing import Any

import torch
import tyro
from torch import nn

from experiments.partial_data import turned_sixes
from experiments.partial_presets import PARTIAL_TOY
from experiments.partial_training import PartialOptions, run_partial
from experiments.records import Cell
from margeq.data import ImageTask

__all__ = ["main"]

_STEP = 15  # degrees


def main(options: PartialOptions) -> None:
    """Run what has no record yet."""
    settings = PARTIAL_TOY[options.preset]

    def observe(model: nn.Module, task: ImageTask, cell: Cell) -> dict[str, Any]:
        """How likely a six is upright by what the network says, turn by turn: figure 4."""
        if cell.task == "mnist6-mirror":
            return {}
        angles = torch.arange(-180.0, 181.0, _STEP)
        mean, deviation = task.train_images.mean(), task.train_images.std()
        pictures = (turned_sixes(settings, options.data_dir, angles) - mean) / deviation
        device = next(model.parameters()).device
        with torch.no_grad():
            said = [model(images.to(device)).softmax(1)[:, 1].mean().item() for images in pictures]
        return {"upright": [[a, p] for a, p in zip(angles.tolist(), said, strict=True)]}

    run_partial("partial_toy", settings, options, observe)


if __name__ == "__main__":
    main(tyro.cli(PartialOptions, description=__doc__))
