"""GLM predictives of the LeNet: time and peak memory against laplace-torch's own.

    python -m benchmarks.predictive [--images 32 64] [--write docs/predictive.md]

Both posteriors are fitted on the embedded digits with one meaning (expand, also for biases), then
predict other images, each number of images in a process of its own: processor time of one call on
one core, and growth of the resident set meanwhile. laplace-torch needs 11 GB for 128 images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import Sampler
from benchmarks.networks import Batches, digits, epoch, lenet, optimizer_for
from benchmarks.peers import import_laplace
from margeq.curvature.options import KfacOptions
from margeq.integrations.laplace_torch import to_laplace
from margeq.likelihoods import Categorical
from margeq.priors import GaussianPrior

__all__ = ["PredictiveRow", "predictive_rows", "predictive_table"]

_LIBRARIES = ("margeq", "laplace-torch")
_TARGET_TIME, _TARGET_MEMORY = 50, 20
_N_TRAIN = 512


@dataclass(frozen=True)
class PredictiveRow:
    """One call on ``images`` pictures."""

    library: str
    images: int
    seconds: float
    mib: float


def predictive_rows(
    images: Sequence[int], libraries: Sequence[str] = _LIBRARIES
) -> list[PredictiveRow]:
    """Each library on each number of images, in a process of its own."""
    rows = []
    for count in images:
        for library in libraries:
            command = [sys.executable, "-m", "benchmarks.predictive", "--one", library, str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, mib = map(float, done.stdout.split())
            rows.append(PredictiveRow(library, count, seconds, mib))
    return rows


def predictive_table(rows: Sequence[PredictiveRow]) -> list[str]:
    """Markdown, with the ratios where both libraries were measured."""
    lines = [
        "| images | library | seconds | peak MiB | × faster | × less memory |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    own = {row.images: row for row in rows if row.library == "margeq"}
    for row in rows:
        ratios = "| | |"
        if row.library != "margeq" and row.images in own:
            mine = own[row.images]
            ratios = f"| {row.seconds / mine.seconds:.0f} | {row.mib / mine.mib:.0f} |"
        lines.append(f"| {row.images} | {row.library} | {row.seconds:.2f} | {row.mib:.0f} {ratios}")
    return lines


def agreement(images: int = 8) -> float:
    """Relative difference of the two libraries' variances."""
    model, batches, fresh = _subject(images)
    found = [_posterior(library, model, batches) for library in _LIBRARIES]
    one, other = (posterior._glm_predictive_distribution(fresh)[1] for posterior in found)
    return float((one - other).norm() / other.norm())


def _subject(images: int) -> tuple[nn.Module, Batches, Tensor]:
    """A network after two epochs, its data, and images that it has not seen."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, everything = lenet(), digits(_N_TRAIN + images)
    pictures, labels = everything.dataset.tensors
    batches = Batches(pictures[:_N_TRAIN], labels[:_N_TRAIN])
    optimizer = optimizer_for(model)
    for _ in range(2):
        epoch(model, optimizer, batches)
    return model, batches, pictures[_N_TRAIN:]


def _posterior(library: str, model: nn.Module, batches: Batches) -> Any:
    if library == "margeq":
        options = KfacOptions(bias_approx="expand")
        return to_laplace(model, batches, GaussianPrior(model), Categorical(), options)
    posterior = import_laplace().Laplace(model, "classification", "all", "kron")
    posterior.fit(batches)
    return posterior


def _one(library: str, images: int) -> None:
    """Print seconds and mebibytes of one call."""
    model, batches, fresh = _subject(images)
    import_laplace()
    posterior = _posterior(library, model, batches)
    posterior(fresh[:2])
    with Sampler() as sampler:
        start = time.process_time()
        posterior(fresh)
        seconds = time.process_time() - start
    print(seconds, sampler.growth)


def _document(rows: Sequence[PredictiveRow]) -> list[str]:
    return [
        "# Predictions without Jacobians",
        "",
        f"GLM predictive (probit) of the LeNet (51,902 weights) on 28 × 28 digits, PyTorch "
        f"{torch.__version__}, one core, each line one call in a fresh process; `python -m "
        f"benchmarks.predictive`. laplace-torch is measured with its default back-end. Targets at "
        f"128 images: {_TARGET_TIME} × faster, {_TARGET_MEMORY} × less memory.",
        "",
        *predictive_table(rows),
        "",
        f"Relative difference of the variances, on 8 images: {agreement():.1g}.",
    ]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--margeq-images", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        _one(arguments.one[0], int(arguments.one[1]))
        return
    rows = predictive_rows(arguments.images)
    alone = [count for count in arguments.margeq_images if count not in arguments.images]
    lines = _document([*rows, *predictive_rows(alone, ["margeq"])])
    print("\n".join(lines))
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _main()
