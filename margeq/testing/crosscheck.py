"""Every curvature back-end against the exact GGN, on a sample of the weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from margeq.accumulation import accumulate
from margeq.batches import Batch, map_tensors, read_batches
from margeq.curvature.spectral import SpectralBlock, spectral_blocks
from margeq.errors import ConfigError
from margeq.integrations.kron_factors import neighbour_factors
from margeq.likelihoods import Categorical, Gaussian, Likelihood, as_likelihood
from margeq.parameters import named_weights, unwrapped
from margeq.testing.exact_sample import ExactSample, exact_sample, sampled_entries

__all__ = ["CrossCheck", "CrossCheckRow", "crosscheck"]

_Measured = dict[str, tuple[float, Tensor]]
"""Weight tensor -> trace over all of its weights, and the block of a sample of them."""


@dataclass(frozen=True)
class CrossCheckRow:
    """What one back-end makes of the curvature.

    Attributes:
        backend: its name.
        ratios: weight tensor -> its trace over the exact one.
        errors: weight tensor -> relative error of the sampled block, in Frobenius norm.
        log_determinant: of ``I + H / delta`` over the sampled blocks, in nats.
        reason: why there are no numbers, empty otherwise.
    """

    backend: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    log_determinant: float = nan
    reason: str = ""


@dataclass(frozen=True)
class CrossCheck:
    """A table of back-ends; ``str()`` of it is for reading.

    Attributes:
        rows: one per back-end, installed or not.
        log_determinant: of ``I + H / delta`` of the exact GGN over the sampled blocks, in nats.
        n_data: number of data.
        sizes: weight tensor -> number of sampled weights.
        prior_precision: ``delta``.
    """

    rows: tuple[CrossCheckRow, ...]
    log_determinant: float
    n_data: int
    sizes: Mapping[str, int]
    prior_precision: float

    def __getitem__(self, backend: str) -> CrossCheckRow:
        """The row of a back-end."""
        for row in self.rows:
            if row.backend == backend:
                return row
        raise ConfigError(
            f"no back-end is called {backend!r}; there are {[row.backend for row in self.rows]}"
        )

    def __str__(self) -> str:
        names = list(self.sizes)
        width = max(len(row.backend) for row in self.rows)
        columns = [max(len(name), 13) for name in names]
        head = "  ".join(f"{name:>{c}}" for name, c in zip(names, columns, strict=True))
        lines = [
            f"Curvature against the exact GGN of {self.n_data} data: trace ratio (relative error "
            f"on up to {max(self.sizes.values())} weights), log-determinant at prior precision "
            f"{self.prior_precision:g}",
            f"{'':{width}}  {head}  {'log det':>10}",
            f"{'exact':{width}}  {'':{len(head)}}  {self.log_determinant:>10.2f}",
        ]
        for row in self.rows:
            if row.reason:
                lines.append(f"{row.backend:{width}}  {row.reason}")
                continue
            cells = (f"{row.ratios[name]:.3f} ({row.errors[name]:.3f})" for name in names)
            text = "  ".join(f"{cell:>{c}}" for cell, c in zip(cells, columns, strict=True))
            lines.append(f"{row.backend:{width}}  {text}  {row.log_determinant:>10.2f}")
        return "\n".join(lines)


def crosscheck(
    model: nn.Module,
    loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    *,
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None,
    max_data: int = 256,
    sample_size: int = 64,
    prior_precision: float = 1.0,
    seed: int = 0,
) -> CrossCheck:
    """Compare every curvature back-end with the exact GGN of a model.

    Those of other libraries are shown as they are, with their defects: BackPACK's convolutions
    are too large by the number of positions, ASDL's Monte Carlo too small by that of its samples.
    ``margeq by ...`` is the same library as a back-end of margeq. One that is not installed, or
    fails, is listed with the reason.

    Args:
        model: left as it is.
        loader: the data; those after the first ``max_data`` are left out.
        likelihood: ``"classification"``, ``"regression"`` or an object.
        batch_fn: turns a batch into ``(inputs, targets)``.
        max_data: most data; the exact GGN takes one backward pass per datum and class.
        sample_size: most weights per tensor whose block is compared.
        prior_precision: ``delta`` of the log-determinants.
        seed: of the sample, and of Monte Carlo roots.

    Returns:
        Trace ratio and relative error per tensor, and log-determinants.

    Raises:
        ConfigError: for numbers that are not positive.
        DataError: for data that cannot be used.

    Example:
        >>> import torch
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> table = crosscheck(nn.Linear(4, 2), [(x, y)])
        >>> f"{table['margeq expand'].ratios['bias']:.2f}"
        '1.00'
    """
    for name, value in (("max_data", max_data), ("sample_size", sample_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if not prior_precision > 0:
        raise ConfigError(f"prior_precision={prior_precision} must be positive")
    model, chosen = unwrapped(model), as_likelihood(likelihood)
    device = next(model.parameters()).device
    batches = list(_first(read_batches(loader, device, batch_fn), max_data))
    places = sampled_entries(named_weights(model), sample_size, seed)
    exact = exact_sample(model, batches, chosen, places)
    rows = []
    for backend, measure in _backends(seed).items():
        try:
            found = measure(model, batches, chosen, places)
        except Exception as error:  # whatever happens in another library is what the table shows
            reason = str(error).strip().split("\n")[0]
            rows.append(CrossCheckRow(backend, reason=f"{type(error).__name__}: {reason}"))
        else:
            rows.append(_row(backend, found, exact, prior_precision))
    return CrossCheck(
        tuple(rows),
        sum(_log_determinant(sample.block, prior_precision) for sample in exact.values()),
        sum(len(batch) for batch in batches),
        {name: len(chosen_places) for name, chosen_places in places.items()},
        prior_precision,
    )


def _first(batches: Iterable[Batch], n_data: int) -> Iterator[Batch]:
    """The first data."""
    for batch in batches:
        size = min(len(batch), n_data)
        if not size:
            return
        inputs = map_tensors(lambda t: t[:size], batch.inputs)  # noqa: B023  called at once
        yield Batch(batch.index, inputs, batch.targets[:size])
        n_data -= size


def _backends(seed: int) -> dict[str, Callable[..., _Measured]]:
    """Name -> what gives its traces and blocks."""
    return {
        "margeq expand": partial(_own, kfac_approx="expand"),
        "margeq reduce": partial(_own, kfac_approx="reduce"),
        "margeq ekfac": partial(_own, curvature="ekfac"),
        "margeq mc-10": partial(_own, hessian_root="mc", mc_samples=10, seed=seed),
        "margeq by BackPACK": partial(_own, backend="backpack"),
        "margeq by ASDL": partial(_own, backend="asdl"),
        "curvlinops": partial(_theirs, "CurvlinopsGGN"),
        "curvlinops reduce": partial(_theirs, "CurvlinopsGGN", kfac_approx="reduce"),
        "BackPACK": partial(_theirs, "BackPackGGN"),
        "ASDL": partial(_theirs, "AsdlGGN"),
        "ASDL mc-10": partial(_theirs, "AsdlGGN", stochastic=True, n_mc_samples=10),
    }


def _own(
    model: nn.Module,
    batches: list[Batch],
    likelihood: Likelihood,
    places: Mapping[str, Tensor],
    **options: Any,
) -> _Measured:
    pairs = [(batch.inputs, batch.targets) for batch in batches]
    blocks = spectral_blocks(accumulate(model, pairs, likelihood, **options).curvature)
    return {name: (float(b.values.sum()), _picked(b, places[name])) for name, b in blocks.items()}


def _picked(block: SpectralBlock, places: Tensor) -> Tensor:
    rows = torch.zeros(len(places), block.numel, dtype=torch.float64)
    rows[torch.arange(len(places)), places] = 1.0
    return block.times(rows.to(block.values.device), block.values)[:, places].cpu()


def _theirs(
    interface: str,
    model: nn.Module,
    batches: list[Batch],
    likelihood: Likelihood,
    places: Mapping[str, Tensor],
    **options: Any,
) -> _Measured:
    if not isinstance(likelihood, (Categorical, Gaussian)):
        raise ConfigError(f"{interface} has no {type(likelihood).__name__}")
    found = {}
    factors = neighbour_factors(interface, model, batches, likelihood.name, **options)
    for name, block in factors.items():
        trace, picked = 1.0, torch.ones((), dtype=torch.float64)
        rest = places[name]
        for factor in reversed(block):  # the last factor belongs to the innermost axis
            wide, inner = factor.double().cpu(), rest % len(factor)
            trace *= float(wide.diagonal().sum())
            picked, rest = picked * wide[inner][:, inner], rest // len(factor)
        found[name] = (trace, picked)
    return found


def _row(
    backend: str, found: _Measured, exact: Mapping[str, ExactSample], prior_precision: float
) -> CrossCheckRow:
    ratios, errors, log_determinant = {}, {}, 0.0
    for name, sample in exact.items():
        trace, block = found[name]
        norm = float(sample.block.norm())
        ratios[name] = trace / sample.trace if sample.trace else nan
        errors[name] = float((block - sample.block).norm()) / norm if norm else nan
        log_determinant += _log_determinant(block, prior_precision)
    return CrossCheckRow(backend, ratios, errors, log_determinant)


def _log_determinant(block: Tensor, prior_precision: float) -> float:
    values = torch.linalg.eigvalsh(0.5 * (block + block.mT)).clamp_min(0.0)
    return float(torch.log1p(values / prior_precision).sum())
