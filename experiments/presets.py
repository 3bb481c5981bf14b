"""Named settings of each experiment: as published, for half an hour on one GPU, for two cores.

Within a preset all networks share one :class:`Settings`: nothing is tuned for one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = [
    "CIFAR10",
    "MULTIPLE_GROUPS",
    "SEPARABLE",
    "TOY_PROBLEM",
    "PresetName",
    "Settings",
    "Training",
]

PresetName = Literal["paper", "gpu30", "cpu"]
Training = Literal["map", "evidence"]


@dataclass(frozen=True)
class Settings:
    """Everything that a run needs besides its task, network, training and seed.

    Attributes:
        models: networks of the tables.
        tasks: questions of the tables.
        seeds: seeds of the tables.
        width: channels of the first layer.
        size: height and width of the pictures, in pixels.
        n_train: training pictures, or ``None`` for all.
        n_test: held-out pictures, or ``None`` for all.
        antialias: whether digits are averaged when they shrink; the paper picks pixels.
        augment: whether training pictures (never those of the evidence) are shifted and mirrored.
        epochs: of each start.
        burnin: epochs before the first hyperparameter update.
        frequency: epochs between updates.
        batch_size: pictures per gradient step.
        curvature_batch: pictures per batch of the curvature pass.
        lr: of Adam; annealed to zero by a cosine.
        map_lr: the same for MAP runs, which start from weights that large steps can kill.
        warmup: share of the steps in which both rise; without, deep networks die at once.
        starts: starts of evidence runs of networks with several paths; the evidence chooses.
            ``"convolutional"`` is their convolution alone, the corner that they contain.
        single_start: start of evidence runs of networks with one path.
        map_start: start of MAP runs.
        prior_prec_inits: precisions at the beginning of evidence runs, one run from each of them;
            the highest evidence is kept. MAP keeps 1 throughout.
        hyper_solver: of the precisions.
        n_hypersteps: steps per update of ``hyper_solver="adam"``.
        lr_hyp: their size.
        hessian_root: columns of the output Hessian that the curvature uses.
        position_fraction: share of the positions that enter the curvature's input covariances.
        reduction: how the paths of a layer combine.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int
    size: int
    n_train: int | None
    n_test: int | None
    antialias: bool
    augment: bool
    epochs: int
    burnin: int
    frequency: int
    batch_size: int
    curvature_batch: int
    lr: float
    map_lr: float
    warmup: float
    starts: tuple[str, ...]
    single_start: str
    map_start: str
    prior_prec_inits: tuple[float | str, ...]
    hyper_solver: str
    n_hypersteps: int
    lr_hyp: float
    hessian_root: str
    position_fraction: float
    reduction: Literal["sum", "mean"]


_PAPER_TOY = Settings(
    models=("fc", "conv", "f_fc+conv"),
    tasks=("digit", "digit+quadrant"),
    seeds=(0, 1, 2),
    width=10,
    size=32,
    n_train=None,
    n_test=None,
    antialias=False,
    augment=False,
    epochs=1000,
    burnin=10,
    frequency=5,
    batch_size=128,
    curvature_batch=150,
    lr=0.01,
    map_lr=0.01,
    warmup=0.0,
    starts=("current",),
    single_start="current",
    map_start="current",
    prior_prec_inits=(1.0,),
    hyper_solver="adam",
    n_hypersteps=20,
    lr_hyp=0.1,
    hessian_root="exact",
    position_fraction=1.0,
    reduction="mean",
)
"""Section 6.1 and appendix F.6; one seed in the paper."""

_GPU30_TOY = replace(
    _PAPER_TOY,
    antialias=True,
    epochs=60,
    burnin=6,
    frequency=4,
    batch_size=64,
    curvature_batch=512,
    map_lr=0.003,
    warmup=0.15,
    starts=("symmetric", "convolutional"),
    single_start="symmetric",
    prior_prec_inits=("function-scale",),
    hyper_solver="mackay",
    hessian_root="adaptive",
    position_fraction=0.25,
    reduction="sum",
)
"""All digits at full width; half an hour is an estimate, nothing was timed on a GPU."""

_CPU_TOY = replace(
    _GPU30_TOY,
    width=4,
    size=16,
    n_train=5000,
    hessian_root="mc",
    position_fraction=1.0,
)
"""5,000 digits of 16 × 16 pixels and two fifths of the width. One random column of the output
Hessian: several times cheaper than all, and close to them unless the training data are fitted
without an error; then it misses most of the curvature, and the evidence comes out too high."""

TOY_PROBLEM: Mapping[PresetName, Settings] = {
    "paper": _PAPER_TOY,
    "gpu30": _GPU30_TOY,
    "cpu": _CPU_TOY,
}

_PAPER_CIFAR = replace(
    _PAPER_TOY,
    models=(
        *("fc", "conv", "fc+conv", "f_fc", "f_fc+conv", "s_fc", "s_conv", "s_fc+s_conv"),
        *("s_fc@lengthscales", "s_conv@lengthscales", "s_fc+s_conv@lengthscales"),
    ),
    tasks=("cifar10",),
    antialias=True,
    augment=True,
    epochs=4000,
)
"""Section 6.2 and appendix F.6; one seed in the paper."""

_GPU30_CIFAR = replace(
    _GPU30_TOY,
    models=("conv", "fc+conv", "f_fc", "f_fc+conv", "s_fc+s_conv"),
    tasks=("cifar10",),
    augment=True,
)
"""All pictures at full width; half an hour is an estimate, nothing was timed on a GPU."""

_CPU_CIFAR = replace(
    _CPU_TOY,
    models=("conv", "f_fc", "f_fc+conv", "s_fc+s_conv", "fc+conv"),
    tasks=("cifar10",),
    seeds=(0, 1),
    n_train=10_000,
    epochs=30,
    burnin=3,
    frequency=3,
)
"""10,000 pictures averaged to 16 × 16 pixels, two fifths of the width, no augmentation."""

CIFAR10: Mapping[PresetName, Settings] = {
    "paper": _PAPER_CIFAR,
    "gpu30": _GPU30_CIFAR,
    "cpu": _CPU_CIFAR,
}

_PAPER_MIXER_DIGITS = replace(
    _PAPER_TOY,
    models=("f_fc+conv+gconv",),
    tasks=("mnist", "translated-mnist", "rotated-mnist"),
    width=2,
    antialias=True,
)
"""Table 3 and appendix F.6; one seed in the paper."""

_GPU30_MIXER_DIGITS = replace(
    _GPU30_TOY,
    models=_PAPER_MIXER_DIGITS.models,
    tasks=_PAPER_MIXER_DIGITS.tasks,
    width=2,
    batch_size=128,
    starts=("symmetric", "only:conv", "only:gconv"),
    map_start="symmetric",
)
"""All digits; half an hour is an estimate, nothing was timed on a GPU. The sum of three paths that
all start at full size blows up over eight layers, so MAP runs start near the symmetric limit too.
"""

_CPU_MIXER_DIGITS = replace(
    _GPU30_MIXER_DIGITS,
    seeds=(0, 1),
    size=16,
    n_train=5000,
    n_test=5000,
    epochs=12,
    burnin=4,
    frequency=4,
    batch_size=64,
    lr=0.005,
    hessian_root="mc",
    position_fraction=1.0,
)
"""5,000 digits of 16 × 16 pixels; one random column of the output Hessian. Half the learning rate,
which at this width kills one path or another in a few hundred steps. In trials with 1,200 and 2,000
digits the evidence mostly ended at that of no weights at all; these differed in other settings too.
"""


def _on_colour(digits: Settings, *, augment: bool = True, **other: Any) -> Settings:
    return replace(digits, tasks=("cifar10", "rotated-cifar10"), augment=augment, **other)


MULTIPLE_GROUPS: tuple[Mapping[PresetName, Settings], ...] = (
    {
        "paper": _PAPER_MIXER_DIGITS,
        "gpu30": _GPU30_MIXER_DIGITS,
        "cpu": _CPU_MIXER_DIGITS,
    },
    {
        "paper": _on_colour(_PAPER_MIXER_DIGITS, epochs=4000),
        "gpu30": _on_colour(_GPU30_MIXER_DIGITS),
        "cpu": _on_colour(_CPU_MIXER_DIGITS, augment=False, seeds=(0,)),
    },
)
"""Digits, and colour pictures, which are trained for longer and with changed copies."""

_PAPER_SEPARABLE = replace(
    _PAPER_CIFAR,
    models=(
        *("full", "separable", "dw-separable"),
        *("full-matched", "separable-matched", "dw-separable-matched"),
        *("pointwise", "cnn"),
    ),
    tasks=("rotated-cifar10",),
)
"""Table 7 and appendix F.6, of MAP training; one seed in the paper."""

SEPARABLE: Mapping[PresetName, Settings] = {
    "paper": _PAPER_SEPARABLE,
    "gpu30": replace(
        _GPU30_TOY,
        models=_PAPER_SEPARABLE.models,
        tasks=_PAPER_SEPARABLE.tasks,
        augment=True,
        batch_size=128,
    ),
    "cpu": replace(
        _CPU_TOY,
        models=_PAPER_SEPARABLE.models,
        tasks=_PAPER_SEPARABLE.tasks,
        seeds=(0,),
        width=5,
        n_train=3000,
        n_test=5000,
        epochs=10,
    ),
}
"""``width`` is that of the networks with matched channels; the widths of the others follow. On two
cores: half of it, and 3,000 pictures averaged to 16 × 16 pixels without augmentation. That checks
that all of them train: after 470 steps none is far enough to tell them apart."""
