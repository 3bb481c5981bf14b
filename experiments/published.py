"""The numbers that the ELLA paper prints (van der Ouderaa, Immer & van der Wilk 2023), as data.

Each is from a single run without error bars. Accuracies are per cent, negative log-likelihoods and
evidences are nats per datum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "TABLE_1",
    "TABLE_2",
    "TABLE_4",
    "ImageNetRow",
    "LayerRow",
    "PathNumbers",
]


TABLE_1: Mapping[tuple[str, str, str], float] = {
    ("digit", "fc", "map"): 95.73,
    ("digit", "conv", "map"): 99.38,
    ("digit", "fc", "evidence"): 97.04,
    ("digit", "conv", "evidence"): 99.23,
    ("digit", "f_fc+conv", "evidence"): 98.86,
    ("digit+quadrant", "fc", "map"): 95.10,
    ("digit+quadrant", "conv", "map"): 24.68,
    ("digit+quadrant", "fc", "evidence"): 95.46,
    ("digit+quadrant", "conv", "evidence"): 24.50,
    ("digit+quadrant", "f_fc+conv", "evidence"): 99.00,
}
"""Table 1, toy problem: (task, model, training) -> test accuracy in per cent."""


@dataclass(frozen=True)
class ImageNetRow:
    """One line of table 2.

    Attributes:
        model: kind of network.
        prior_on: what the prior is placed on; the sparsified networks come twice.
        parameters: number of weights, as printed (millions).
        map_nll: test negative log-likelihood under MAP, nats per datum.
        map_accuracy: test accuracy under MAP, per cent.
        nll: the same under the learned evidence.
        accuracy: the same.
        neg_log_evidence: negative log marginal likelihood, nats per datum.
    """

    model: str
    prior_on: str
    parameters: str
    map_nll: float
    map_accuracy: float
    nll: float
    accuracy: float
    neg_log_evidence: float


TABLE_2: tuple[ImageNetRow, ...] = (
    ImageNetRow("fc", "weights", "133.6 M", 2.423, 64.42, 1.319, 52.36, 1.896),
    ImageNetRow("conv", "weights", "0.3 M", 1.184, 82.81, 0.464, 84.07, 1.022),
    ImageNetRow("fc+conv", "weights", "133.9 M", 1.713, 76.93, 0.489, 83.32, 1.019),
    ImageNetRow("f_fc", "weights", "1.5 M", 4.291, 50.47, 1.307, 53.38, 2.119),
    ImageNetRow("f_fc+conv", "weights", "1.8 M", 1.343, 81.61, 0.468, 83.92, 1.277),
    ImageNetRow("s_fc", "anchors", "0.8 M", 5.614, 50.21, 1.496, 46.18, 1.926),
    ImageNetRow("s_conv", "anchors", "0.2 M", 0.604, 82.53, 0.562, 81.29, 1.037),
    ImageNetRow("s_fc+s_conv", "anchors", "1.0 M", 5.485, 58.80, 0.538, 81.55, 0.978),
    ImageNetRow("s_fc", "lengthscales", "0.8 M", 7.783, 49.69, 1.319, 52.22, 1.813),
    ImageNetRow("s_conv", "lengthscales", "0.2 M", 0.913, 81.84, 0.549, 81.20, 1.055),
    ImageNetRow("s_fc+s_conv", "lengthscales", "1.0 M", 2.040, 77.97, 0.564, 80.63, 1.067),
)
"""Table 2, CIFAR-10. The symbols of the column "prior" are lost in the text at hand; which rows
belong to anchors and which to lengthscales follows the order of section 6.2."""


@dataclass(frozen=True)
class PathNumbers:
    """One path of one layer of table 4.

    Attributes:
        precision: learned prior precision.
        mean_square: mean square weight ("weight norm" in the paper).
        normalised: effective parameters per parameter.
        relative: share of ``normalised`` among the layer's paths.
    """

    precision: float
    mean_square: float
    normalised: float
    relative: float


@dataclass(frozen=True)
class LayerRow:
    """One layer of table 4."""

    fc: PathNumbers
    conv: PathNumbers
    selected: str


TABLE_4: tuple[LayerRow, ...] = (
    LayerRow(
        PathNumbers(3588348.5, 0.0, 2e-08, 3e-08),
        PathNumbers(0.07513507, 10.7425736, 0.80731778, 0.99999997),
        "conv",
    ),
    LayerRow(
        PathNumbers(2750749.5, 0.0, 7e-08, 1e-07),
        PathNumbers(1.26366782, 0.55490241, 0.70107951, 0.9999999),
        "conv",
    ),
    LayerRow(
        PathNumbers(5898884.5, 0.0, 1.4e-07, 2.1e-07),
        PathNumbers(14.50690365, 0.04562404, 0.66181451, 0.99999979),
        "conv",
    ),
    LayerRow(
        PathNumbers(22690960.0, 0.0, 8.9e-07, 1.78e-06),
        PathNumbers(230.7509613, 0.00216724, 0.50004517, 0.99999822),
        "conv",
    ),
    LayerRow(
        PathNumbers(29633508.0, 0.0, 7.72e-06, 1.888e-05),
        PathNumbers(5438.10449219, 7.521e-05, 0.40905216, 0.99998112),
        "conv",
    ),
    LayerRow(
        PathNumbers(35631228.0, 0.0, 3.79e-06, 2.643e-05),
        PathNumbers(3797.48779297, 3.772e-05, 0.14326709, 0.99997357),
        "conv",
    ),
    LayerRow(
        PathNumbers(635.57513428, 1.135e-05, 0.00721232, 0.99927627),
        PathNumbers(31321916.0, 0.0, 5.22e-06, 0.00072373),
        "fc",
    ),
    LayerRow(
        PathNumbers(35582056.0, 0.0, 9e-08, 1.874e-05),
        PathNumbers(1.75766361, 0.00259477, 0.00456014, 0.99998126),
        "conv",
    ),
)
"""Table 4, FC+CONV on CIFAR-10, layers 0 to 7; printed with eight decimals, so that small mean
squares are 0."""
