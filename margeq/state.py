"""What one pass over the data leaves behind: un-normalised sums, from which evidence follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose

from torch import Tensor

from margeq.curvature.addition import require_same
from margeq.curvature.forms import BlockCurvature, Curvature
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import EvidenceFlavour
from margeq.curvature.outputs import OutputCurvature
from margeq.errors import ConfigError

__all__ = ["CurvatureState"]


@dataclass(frozen=True)
class CurvatureState:
    """Sums over the data at one set of weights; free of prior, noise and temperature.

    Attributes:
        curvature: sums of the flavour that was asked for.
        fit: log-likelihood (classification) or squared residuals per output (regression).
        n_data: number of data that were counted.
        square_norms: squared Euclidean norm per weight tensor.
        flavour: how the curvature was approximated.
        captured_trace: share of the output Hessian's trace that the root kept.
        threshold: squared norm above which the adaptive root keeps a column.
        trace: trace of the output Hessian over all data, of the adaptive root only.
        checksum: order-independent checksum of inputs and targets.
        log_hyperprior: penalty of the hyperparameters inside the network, in nats.
    """

    curvature: Curvature
    fit: Tensor
    n_data: int
    square_norms: dict[str, Tensor]
    flavour: EvidenceFlavour
    captured_trace: float = 1.0
    checksum: int = 0
    log_hyperprior: float = 0.0
    threshold: float = 0.0
    trace: float = 0.0

    def __add__(self, other: CurvatureState) -> CurvatureState:
        """The state of all data, from those of two disjoint sets at the same weights.

        Returns:
            What one pass over both sets gives.

        Raises:
            ConfigError: for states of other weights, or of adaptive roots with thresholds of
                their own.
            FlavourMismatchError: for states of different flavours.
        """
        self.flavour.require_same(other.flavour)
        self._require_same_weights(other)
        if 0 in (self.n_data, other.n_data):
            fit = self.fit if self.n_data else other.fit
        else:
            require_same("shape of fit", self.fit.shape, other.fit.shape)
            fit = self.fit + other.fit
        trace = self.trace + other.trace
        kept = self.captured_trace * self.trace + other.captured_trace * other.trace
        return replace(
            self,
            curvature=self.curvature + other.curvature,
            fit=fit,
            n_data=self.n_data + other.n_data,
            captured_trace=kept / trace if trace > 0 else 1.0,
            checksum=(self.checksum + other.checksum) % 2**63,
            threshold=self.threshold if self.n_data else other.threshold,
            trace=trace,
        )

    def _require_same_weights(self, other: CurvatureState) -> None:
        require_same("list of weights", sorted(self.square_norms), sorted(other.square_norms))
        for name, square_norm in self.square_norms.items():
            values = float(square_norm), float(other.square_norms[name])
            if not isclose(*values, rel_tol=1e-9):
                require_same(f"squared norm of {name!r}", *values)
        if not isclose(self.log_hyperprior, other.log_hyperprior, rel_tol=1e-9):
            require_same("log_hyperprior", self.log_hyperprior, other.log_hyperprior)
        if self.n_data and other.n_data and self.threshold != other.threshold:
            raise ConfigError(
                f"states of adaptive roots with different thresholds ({self.threshold:.4g} and "
                f"{other.threshold:.4g}) cannot be added; use margeq.distributed.accumulate, which "
                f"finds one threshold for all data, or hessian_root='exact' or 'mc'"
            )

    @property
    def kron(self) -> dict[str, BlockKron]:
        """Kronecker factors per weight tensor.

        Raises:
            ConfigError: for another flavour than ``"kfac"``, or sums that are kept per output.
        """
        if isinstance(self.curvature, OutputCurvature):
            raise ConfigError(
                "the curvature is kept for each output, to be weighed by its noise; use "
                "margeq.laplace.of_scaled_outputs(state, likelihood)[0].kron"
            )
        blocks = self.curvature.blocks if isinstance(self.curvature, BlockCurvature) else {}
        krons = {name: block for name, block in blocks.items() if isinstance(block, BlockKron)}
        if krons.keys() != self.square_norms.keys():
            raise ConfigError(
                f"curvature={self.flavour.curvature!r} has no Kronecker factors; accumulate with "
                f"curvature='kfac'"
            )
        return krons
