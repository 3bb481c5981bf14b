"""Cost of a noise per output, and of the last layer alone: ``python -m benchmarks.outputs``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from margeq.laplace import CurvatureState, accumulate, decompose, hyper_gradient
from margeq.likelihoods import Categorical, Gaussian, Likelihood
from margeq.priors import GaussianPrior

__all__: list[str] = []

N_DATA, BATCH, WIDTH, REPEATS = 2000, 500, 128, 5


def main() -> None:
    """Print two tables in Markdown."""
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one core; seconds, medians of {REPEATS}\n")
    print("| outputs | noise | root | curvature pass | hyperparameter gradient |")
    print("|--:|---|---|--:|--:|")
    for n_outputs in (1, 10, 50, 200):
        for likelihood, root in _variants():
            _row(n_outputs, likelihood, root)
    print("\n| weights | curvature pass |\n|---|--:|")
    for parameters in ("all", "last_layer"):
        model, batches = _problem(10)
        labelled = [(x, y.argmax(1)) for x, y in batches]
        seconds, _ = _timed(
            lambda: accumulate(model, labelled, Categorical(), parameters=parameters)  # noqa: B023
        )
        print(f"| `{parameters}` | {seconds:.3f} |")


def _variants() -> Iterator[tuple[Likelihood, str]]:
    for root in ("exact", "mc"):
        yield Gaussian(), root
        yield Gaussian(noise="per-output"), root


def _problem(n_outputs: int) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    layers = [nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, n_outputs))
    x, y = torch.randn(N_DATA, 32), torch.randn(N_DATA, n_outputs)
    return model, list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def _row(n_outputs: int, likelihood: Likelihood, root: str) -> None:
    model, batches = _problem(n_outputs)
    seconds, state = _timed(lambda: accumulate(model, batches, likelihood, hessian_root=root))
    assert isinstance(state, CurvatureState)
    spectrum, prior = decompose(state), GaussianPrior(model)
    step, _ = _timed(lambda: hyper_gradient(spectrum, prior, likelihood))
    noise = "per output" if likelihood.weighs_outputs else "shared"
    print(f"| {n_outputs} | {noise} | {root} | {seconds:.2f} | {step:.4f} |")


def _timed(run: Callable[[], object]) -> tuple[float, object]:
    found, times = run(), []
    for _ in range(REPEATS):
        start = time.process_time()
        found = run()
        times.append(time.process_time() - start)
    return statistics.median(times), found


if __name__ == "__main__":
    main()
