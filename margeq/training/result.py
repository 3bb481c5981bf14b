"""What :func:`margeq.optimize_marglik` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any

from torch import Tensor, nn

from margeq.curvature.options import EvidenceFlavour, KfacOptions
from margeq.effective_dim import EffectiveDimension, effective_dimension
from margeq.errors import ConfigError
from margeq.function_share import Variances
from margeq.integrations.laplace_torch import to_laplace
from margeq.laplace import Spectrum
from margeq.likelihoods import Likelihood
from margeq.pictures import path_pictures
from margeq.priors import GaussianPrior
from margeq.subsets import LearnedSubset, learned_subsets
from margeq.training.history import History

__all__ = ["Diagnostics", "MargLikResult", "Restart"]


@dataclass(frozen=True)
class Restart:
    """One of the runs that were compared by evidence.

    Attributes:
        start: name of the start.
        log_marginal_likelihood: nats, ``-inf`` for a failed run.
        kept: whether the model holds this run's weights.
        error: why it failed, empty otherwise.
        history: losses, updates and switches.
    """

    start: str
    log_marginal_likelihood: float
    kept: bool
    error: str
    history: History


@dataclass(frozen=True)
class Diagnostics:
    """Numbers that tell whether to believe the evidence.

    Attributes:
        slope: change of the log evidence per datum and epoch over the last updates, in nats.
        gradient_norm: norm of the evidence gradient in log precisions inside their bounds.
        at_bounds: groups whose precision sits at a bound.
        clamped_eigenvalues: eigenvalues that had to be set to zero at the kept state.
        captured_trace: share of the output Hessian's trace behind the kept evidence.
        restart_spread: best minus worst evidence over finished restarts, in nats.
        held_norms: scale-invariant tensors whose norm was held.
        failed_restarts: starts that ended in an error.
    """

    slope: float
    gradient_norm: float
    at_bounds: tuple[str, ...]
    clamped_eigenvalues: int
    captured_trace: float
    restart_spread: float
    held_norms: tuple[tuple[str, ...], ...]
    failed_restarts: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class MargLikResult:
    """A trained model with learned hyperparameters, and how it came about.

    Attributes:
        model: the caller's model, holding the kept run's weights.
        prior: learned precisions.
        likelihood: learned noise, and temperature.
        log_marginal_likelihood: nats, total over the data; larger is better.
        flavour: how the evidence was approximated; values of other flavours do not compare.
        n_data: number of data.
        restarts: every run, kept or not, in the order in which they ran.
        diagnostics: whether to believe it.
        success: whether the kept run ended with a settled evidence, with outputs that follow the
            inputs or some weight besides biases that the data determine, and with more evidence
            than guessing among the classes.
        message: the same in words.
        n_iter: epochs of the kept run.
        spectrum: of the curvature at the kept weights.
        variances: of the outputs of the candidate paths, over the data.
        hyperparameters: learned values of the hyperparameters inside the network, by name.
        seed: of starts and data order.
        options: of the kept curvature pass, its random draws included.
        parameters: which weights have a prior.
        batch_fn: turns a batch of the loaders into ``(inputs, targets)``.
    """

    model: nn.Module
    prior: GaussianPrior
    likelihood: Likelihood
    log_marginal_likelihood: float
    flavour: EvidenceFlavour
    n_data: int
    restarts: tuple[Restart, ...]
    diagnostics: Diagnostics
    success: bool
    message: str
    n_iter: int
    spectrum: Spectrum
    variances: Variances
    hyperparameters: Mapping[str, Tensor]
    seed: int
    options: KfacOptions
    parameters: str | Sequence[str] = "all"
    batch_fn: Callable[[Any], tuple[Any, Any]] | None = None

    def __repr__(self) -> str:
        """A few lines: all fields together are thousands of numbers."""
        kept = next((r.start for r in self.restarts if r.kept), "none")
        per_datum = self.log_marginal_likelihood / max(self.n_data, 1)
        return (
            f"MargLikResult: log marginal likelihood {self.log_marginal_likelihood:.2f} nats, "
            f"{per_datum:.4g} per datum of {self.n_data:,}\n"
            f"  start {kept!r} kept, of {len(self.restarts)}; {self.n_iter} epochs\n"
            f"{fill(self.message, 98, initial_indent='  ', subsequent_indent='  ')}\n"
            f"  verdicts: print(result.effective_dimension()); all: result.report(directory)"
        )

    @property
    def history(self) -> History:
        """History of the kept run."""
        return next(restart.history for restart in self.restarts if restart.kept)

    @property
    def selected(self) -> Mapping[str, str]:
        """Layer -> path with the largest share of function variance."""
        return self.effective_dimension().selected

    @property
    def learned_subsets(self) -> Mapping[str, LearnedSubset]:
        """Gate -> what it leaves of its group."""
        return learned_subsets(self.model)

    def effective_dimension(self) -> EffectiveDimension:
        """Effective parameters and verdict per tensor, layer and path."""
        return effective_dimension(
            self.model, self.spectrum, self.prior, self.likelihood, self.variances
        )

    def log_bayes_factor(self, other: MargLikResult) -> float:
        """Difference of the log evidences in nats; positive prefers this result.

        Returns:
            Nats.

        Raises:
            FlavourMismatchError: if the two values were approximated differently.
            ConfigError: if they are about different data.
        """
        self.flavour.require_same(other.flavour)
        if self.n_data != other.n_data:
            raise ConfigError(
                f"evidence of {self.n_data} data against evidence of {other.n_data} data; "
                f"compare models on the same data"
            )
        if self.spectrum.checksum != other.spectrum.checksum:
            raise ConfigError(
                "the two values are about other inputs or targets; compare on the same data"
            )
        return self.log_marginal_likelihood - other.log_marginal_likelihood

    def report(self, directory: str | Path) -> Path:
        """Write ``report.html``, one file that needs no network, and its figures as PNG and SVG.

        ``report.json`` beside it holds :meth:`to_dict`, for :func:`margeq.compare`.

        Args:
            directory: made if there is none.

        Returns:
            The HTML file.

        Raises:
            ConfigError: if it cannot be written.
        """
        # by name, and when it is asked for: figures and pages are built on results, not below them
        return import_module("margeq.report.page").report_result(self.to_dict(), Path(directory))

    def to_laplace(self, train_loader: Iterable[Any]) -> Any:
        """A fitted laplace-torch posterior, for predictive distributions, samples and saving.

        Takes one pass over the data. GLM predictives of the posterior form no Jacobians.

        Args:
            train_loader: the data of the evidence: ``marglik_loader`` if there was one.

        Returns:
            A ``laplace.KronLaplace`` with margeq's curvature, precisions and noise, whose
            ``log_marginal_likelihood()`` is :attr:`log_marginal_likelihood`.

        Raises:
            ConfigError: for ``curvature="full"``, a likelihood that laplace-torch does not have, or
                a model that has changed since.
            DataError: for data that cannot be used.
        """
        return to_laplace(
            self.model, train_loader, self.prior, self.likelihood, self.options,
            parameters=self.parameters, batch_fn=self.batch_fn, expected=self.spectrum,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the tensors of the model, of which a few pictures."""
        table = self.effective_dimension()
        noise = {name: value.exp().tolist() for name, value in _noise(self.likelihood).items()}
        return {
            "log_marginal_likelihood": self.log_marginal_likelihood,
            "n_data": self.n_data,
            # as text: JSON readers elsewhere round integers beyond 2 ** 53
            "checksum": str(self.spectrum.checksum),
            "seed": self.seed,
            "flavour": {**vars(self.flavour), "is_bound": self.flavour.is_bound},
            "success": self.success,
            "message": self.message,
            "n_iter": self.n_iter,
            "selected": dict(table.selected),
            "effective_dimension": table.to_dict(),
            "prior_precision": {g: float(d) for g, d in self.prior.prior_precision.items()},
            "prior_groups": dict(self.prior.groups),
            "hyperparameters": {n: t.flatten().tolist() for n, t in self.hyperparameters.items()},
            "likelihood": {"name": type(self.likelihood).__name__, **noise},
            "diagnostics": {
                key: None if value != value else value
                for key, value in vars(self.diagnostics).items()
            },
            "pictures": path_pictures(self.model),
            "restarts": [
                {
                    "start": r.start,
                    "log_marginal_likelihood": None if r.error else r.log_marginal_likelihood,
                    "kept": r.kept,
                    "error": r.error,
                    "history": deepcopy(r.history.to_dict()),
                }
                for r in self.restarts
            ],
        }


def _noise(likelihood: Likelihood) -> dict[str, Tensor]:
    return {n.removeprefix("log_"): value for n, value in likelihood.hyperparameters.items()}
