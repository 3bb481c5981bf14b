"""Classification with a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from margeq.curvature.roots import MonteCarloSoftmaxRoot, Root, SoftmaxRoot
from margeq.errors import DataError
from margeq.likelihoods.base import Likelihood, promoted

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """Softmax classification, ``log p(y | f) = f_y - logsumexp(f)``.

    Args:
        temperature: ``T``.

    Example:
        >>> import torch
        >>> Categorical().loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    name = "classification"

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """None: a categorical likelihood has no scale."""
        return {}

    @property
    def curvature_scale(self) -> Tensor:
        """``1 / T``."""
        return torch.tensor(1.0 / self.temperature, dtype=torch.float64)

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log-likelihood summed over the batch, a scalar."""
        return -torch.nn.functional.cross_entropy(promoted(outputs), targets, reduction="sum")

    def log_likelihood(self, fit: Tensor, n_data: int) -> Tensor:
        """``fit / T``."""
        return fit / self.temperature

    def root(self, outputs: Tensor, keys: Tensor | None = None, n_samples: int = 0) -> Root:
        """Exact with C - 1 columns, or Monte Carlo."""
        if keys is None:
            return SoftmaxRoot(outputs)
        return MonteCarloSoftmaxRoot(outputs, keys, n_samples)

    def hessian(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T``."""
        p = torch.softmax(outputs, -1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Labels ``[n]`` as int64; one-hot and integer-valued float labels are accepted.

        Returns:
            Class indices ``[n]``, int64.

        Raises:
            DataError: naming the first label that is no class of the model.
        """
        if outputs.ndim != 2:
            raise DataError(f"classification needs outputs [n, C], got {tuple(outputs.shape)}")
        if targets.shape == outputs.shape and outputs.shape[1] > 1:
            targets = _from_one_hot(targets)
        targets = targets.reshape(len(targets), -1).squeeze(1) if targets.ndim == 2 else targets
        if targets.shape != outputs.shape[:1]:
            raise DataError(
                f"classification needs labels [{len(outputs)}], got {tuple(targets.shape)}"
            )
        labels = targets.long()
        n_classes = outputs.shape[1]
        wrong = (labels < 0) | (labels >= n_classes) | (labels != targets)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise DataError(
                f"label {targets[index].item()} at index {index}, model has {n_classes} outputs; "
                f"labels must be integers from 0 to {n_classes - 1}"
            )
        return labels


def _from_one_hot(targets: Tensor) -> Tensor:
    is_one_hot = ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) == 1)
    if not is_one_hot.all():
        index = int((~is_one_hot).nonzero()[0])
        raise DataError(f"target row {index} is no one-hot label: {targets[index].tolist()}")
    return targets.argmax(1)
