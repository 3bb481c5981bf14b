"""What one pass over the data leaves behind: un-normalised sums, from which evidence follows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from margeq.curvature.forms import BlockCurvature, Curvature
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import EvidenceFlavour
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

    @property
    def kron(self) -> dict[str, BlockKron]:
        """Kronecker factors per weight tensor.

        Raises:
            ConfigError: for another flavour than ``"kfac"``.
        """
        blocks = self.curvature.blocks if isinstance(self.curvature, BlockCurvature) else {}
        krons = {name: block for name, block in blocks.items() if isinstance(block, BlockKron)}
        if krons.keys() != self.square_norms.keys():
            raise ConfigError(
                f"curvature={self.flavour.curvature!r} has no Kronecker factors; accumulate with "
                f"curvature='kfac'"
            )
        return krons
