"""The numbers that the papers print, as data.

``TABLE_...`` are those of the ELLA paper (van der Ouderaa, Immer & van der Wilk 2023): each is from
a single run without error bars; accuracies are per cent, negative log-likelihoods and evidences are
nats per datum. ``ROTMNIST_TABLE`` and ``CIFAR_TABLE`` are those of Lengyel & van Gemert 2021 and of
Cohen & Welling 2016; test errors are per cent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CIFAR_OTHERS",
    "CIFAR_TABLE",
    "ROTMNIST_OTHERS",
    "ROTMNIST_TABLE",
    "TABLE_1",
    "TABLE_2",
    "TABLE_3",
    "TABLE_4",
    "TABLE_7",
    "CifarRow",
    "ImageNetRow",
    "LayerRow",
    "MixerRow",
    "PathNumbers",
    "RotmnistRow",
    "SeparableRow",
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


@dataclass(frozen=True)
class RotmnistRow:
    """One network of table 1 of Lengyel & van Gemert 2021.

    Attributes:
        name: as printed.
        error: test error, per cent, mean of five runs.
        deviation: standard deviation over the runs.
        parameters: number of weights, as printed (thousands).
        macs: multiply-accumulate operations of a picture, as printed (millions).
    """

    name: str
    error: float
    deviation: float
    parameters: str
    macs: str


ROTMNIST_TABLE: Mapping[str, RotmnistRow] = {
    "z2-w20": RotmnistRow("Z2CNN", 5.20, 0.110, "25.21 k", "2.98 M"),
    "c-z2-w57": RotmnistRow("c-Z2CNN", 4.64, 0.126, "25.60 k", "4.14 M"),
    "p4-w10": RotmnistRow("P4CNN", 2.23, 0.061, "24.81 k", "11.67 M"),
    "g-p4-w10": RotmnistRow("g-P4CNN", 2.60, 0.098, "8.91 k", "4.37 M"),
    "gc-p4-w10": RotmnistRow("gc-P4CNN", 2.88, 0.169, "3.42 k", "1.80 M"),
    "g-p4-w17": RotmnistRow("g-P4CNN", 1.97, 0.044, "25.26 k", "12.34 M"),
    "gc-p4-w30": RotmnistRow("gc-P4CNN", 1.74, 0.070, "24.64 k", "13.01 M"),
}
"""Table 1: kind and width -> numbers, with 12,000 training pictures."""

ROTMNIST_OTHERS: Mapping[str, tuple[float, float | None]] = {
    "SFCNN": (0.71, 0.022),
    "DREN": (1.56, None),
    "H-Net": (1.69, None),
    "α-P4CNN": (1.70, 0.021),
    "a-P4CNN": (2.06, 0.043),
    "Z2CNN (Cohen & Welling)": (5.03, 0.20),
    "P4CNNRotationPooling (Cohen & Welling)": (3.21, 0.12),
    "P4CNN (Cohen & Welling)": (2.28, 0.04),
}
"""Table 1, lower part, and the table of Cohen & Welling 2016: test error and its deviation, both in
per cent. The latter prints deviations as fractions."""


@dataclass(frozen=True)
class CifarRow:
    """One network of the tables on CIFAR-10.

    Attributes:
        parameters: number of weights, as printed.
        errors: task -> test error, per cent.
        source: who printed it.
    """

    parameters: str
    errors: Mapping[str, float]
    source: str


def _cifar(
    parameters: str, plain: float, plus: float | None, source: str, fifth: float | None = None
) -> CifarRow:
    named = {"cifar10": plain, "cifar10+": plus, "cifar10-10000": fifth}
    errors = {task: error for task, error in named.items() if error is not None}
    return CifarRow(parameters, errors, source)


_COHEN, _LENGYEL = "Cohen & Welling 2016", "Lengyel & van Gemert 2021"

CIFAR_TABLE: Mapping[str, tuple[CifarRow, ...]] = {
    "resnet44-z2": (
        _cifar("2.64 M", 13.10, 7.66, _LENGYEL),
        _cifar("2.64 M", 9.45, 5.61, _COHEN),
    ),
    "resnet44-p4m": (
        _cifar("2.62 M", 8.06, 5.78, _LENGYEL, fifth=14.20),
        _cifar("2.62 M", 6.46, 4.94, _COHEN),
    ),
    "resnet44-g-p4m": (_cifar("1.78 M", 7.60, 6.09, _LENGYEL),),
    "resnet44-gc-p4m": (_cifar("1.88 M", 6.72, 5.43, _LENGYEL, fifth=13.43),),
    "allcnn-z2": (_cifar("1.37 M", 9.44, 8.86, _COHEN),),
    "allcnn-p4": (_cifar("1.37 M", 8.84, 7.67, _COHEN),),
    "allcnn-p4m": (_cifar("1.22 M", 7.59, 7.04, _COHEN),),
}
"""Table 2 of both papers; the first could not reproduce the second's ResNet44. With a fifth of the
pictures two networks are given, in the text."""

CIFAR_OTHERS: Mapping[str, CifarRow] = {
    "α_F-p4m-ResNet44": _cifar("2.70 M", 10.82, 10.12, _LENGYEL),
    "a-p4m-ResNet44": _cifar("2.63 M", 9.12, None, _LENGYEL),
}
"""Other networks of table 2 of Lengyel & van Gemert."""


@dataclass(frozen=True)
class MixerRow:
    """One data set of table 3: the mixer F-FC+CONV+GCONV.

    Attributes:
        map_nll: test negative log-likelihood under MAP, nats per datum.
        map_accuracy: test accuracy under MAP, per cent.
        nll: the same under the learned evidence.
        accuracy: the same.
        neg_log_evidence: negative log marginal likelihood, nats per datum.
        shares: path -> relative effective parameters, mean, least and most over layers, per cent.
    """

    map_nll: float
    map_accuracy: float
    nll: float
    accuracy: float
    neg_log_evidence: float
    shares: Mapping[str, tuple[int, int, int]]


def _mixer(
    numbers: tuple[float, float, float, float, float], *shares: tuple[int, int, int]
) -> MixerRow:
    return MixerRow(*numbers, dict(zip(("f_fc", "conv", "gconv"), shares, strict=True)))


TABLE_3: Mapping[str, MixerRow] = {
    "mnist": _mixer(
        (0.172, 97.59, 0.023, 99.21, 0.328), (10, 0, 46), (15, 0, 98), (75, 1, 100)
    ),
    "translated-mnist": _mixer(
        (0.812, 90.78, 0.053, 98.27, 0.216), (0, 0, 0), (23, 0, 99), (77, 1, 100)
    ),
    "rotated-mnist": _mixer(
        (0.819, 91.02, 0.136, 95.55, 0.896), (8, 0, 20), (8, 0, 47), (83, 47, 100)
    ),
    "cifar10": _mixer(
        (3.540, 68.33, 0.552, 80.94, 0.926), (0, 0, 1), (44, 0, 99), (56, 0, 100)
    ),
    "rotated-cifar10": _mixer(
        (5.953, 48.30, 1.236, 55.68, 1.630), (4, 0, 22), (14, 0, 41), (82, 58, 99)
    ),
}  # fmt: skip
"""Table 3: data set -> numbers. The paper gives 1.2 million weights throughout, which is the count
for colour pictures; grey ones make it 1.1."""


@dataclass(frozen=True)
class SeparableRow:
    """One network of table 7, on rotated CIFAR-10 under MAP.

    Attributes:
        parameters: number of weights, as printed.
        width: channels of its first layer.
        accuracy: test accuracy, per cent.
    """

    parameters: int
    width: int
    accuracy: float


TABLE_7: Mapping[str, SeparableRow] = {
    "full": SeparableRow(1_025_380, 10, 73.70),
    "separable": SeparableRow(214_550, 10, 61.31),
    "dw-separable": SeparableRow(139_735, 10, 51.63),
    "full-matched": SeparableRow(371_200, 6, 69.89),
    "separable-matched": SeparableRow(358_463, 13, 59.99),
    "dw-separable-matched": SeparableRow(346_215, 16, 49.77),
    "pointwise": SeparableRow(338_770, 10, 66.77),
    "cnn": SeparableRow(338_770, 10, 57.89),
}
"""Table 7; the third count is a slip of the pen, its network has 139,725 weights."""
