"""Named settings of the experiments on partial equivariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.presets import PresetName

__all__ = ["PARTIAL_BENCHMARKS", "PARTIAL_TOY", "PartialSettings"]


@dataclass(frozen=True)
class PartialSettings:
    """Everything that a run needs besides its task, network, training and seed.

    Attributes:
        questions: tasks, each with its networks, in the notation of
            :mod:`experiments.partial_networks`.
        loss_only: networks that are trained by the task loss alone.
        seeds: seeds of the table.
        size: height and width of the pictures, in pixels.
        n_train: training pictures, or ``None`` for all.
        n_validation: pictures that no choice was made on; their accuracy is in the record.
        n_test: held-out pictures, or ``None`` for all.
        widths: channels of the networks with gates, for the group p4; others follow.
        kernel_size: extent of all filters.
        start: share of the symmetry that gates and distributions start with.
        epochs: passes over the training pictures.
        batch_size: pictures per gradient step.
        lr: of Adam; a linear rise, and a cosine to zero.
        gate_lr: of gates, distributions and widths of augmentation that the task loss moves.
        warmup: share of the steps in which the learning rate rises.
        burnin: epochs before the first evidence.
        frequency: epochs between updates of the hyperparameters.
        lr_hyp: step of gates that the evidence moves.
        hessian_root: see :class:`margeq.curvature.options.KfacOptions`.
        curvature_batch: pictures per batch of a curvature pass.
        starts: of networks with gates, see :func:`margeq.optimize_marglik`.
        n_copies: changed copies of each picture, of learned augmentation.
        bonus: reward of wide augmentations, in the task loss.
        monotone: price per picture of a layer with more symmetry than the one before it.
        mc_width: channels of the residual networks on samples.
        mc_hidden: width of the hidden layers of their filters.
        mc_pools: which of their maps are halved.
        mc_epochs: passes over the training pictures for them.
        mc_lr: their learning rate.
    """

    questions: tuple[tuple[str, tuple[str, ...]], ...]
    loss_only: tuple[str, ...]
    seeds: tuple[int, ...]
    size: int
    n_train: int | None
    n_validation: int
    n_test: int | None
    widths: tuple[int, int, int]
    kernel_size: int
    start: float
    epochs: int
    batch_size: int
    lr: float
    gate_lr: float
    warmup: float
    burnin: int
    frequency: int
    lr_hyp: float
    hessian_root: str
    curvature_batch: int
    starts: tuple[str, ...]
    n_copies: int
    bonus: float
    monotone: float
    mc_width: int
    mc_hidden: int
    mc_pools: tuple[int, ...]
    mc_epochs: int
    mc_lr: float


_TURNS = ("full-p4", "partial-p4", "full-p4m", "partial-p4m")
_MIRRORS = ("full-d1", "partial-d1", "full-p4m", "partial-p4m")
_MC_TURNS = ("mc-full-se2-8", "mc-partial-se2-8")
_MC_MIRRORS = ("mc-full-mirror-2", "mc-partial-mirror-2")

_PAPER_TOY = PartialSettings(
    questions=(
        ("mnist6-180", (*_TURNS, *_MC_TURNS)),
        ("mnist6-half", (*_TURNS, *_MC_TURNS)),
        ("mnist6-mirror", (*_MIRRORS, *_MC_MIRRORS)),
    ),
    loss_only=("mc",),
    seeds=(0, 1, 2),
    size=28,
    n_train=None,
    n_validation=918,
    n_test=None,
    widths=(10, 10, 20),
    kernel_size=7,
    start=0.8,
    epochs=300,
    batch_size=64,
    lr=0.001,
    gate_lr=0.001,
    warmup=0.0,
    burnin=10,
    frequency=5,
    lr_hyp=0.1,
    hessian_root="exact",
    curvature_batch=500,
    starts=("auto",),
    n_copies=8,
    bonus=0.05,
    monotone=1e-3,
    mc_width=10,
    mc_hidden=32,
    mc_pools=(0, 1),
    mc_epochs=300,
    mc_lr=0.001,
)
"""Table 1 and figure 4 of Romero & Lohit 2022, with a test part that nothing is chosen on."""

_GPU30_TOY = replace(
    _PAPER_TOY,
    epochs=40,
    lr=0.003,
    gate_lr=0.003,
    warmup=0.15,
    burnin=4,
    frequency=4,
    lr_hyp=0.2,
    hessian_root="adaptive",
    mc_epochs=40,
    mc_lr=0.003,
)
"""All sixes at full size; half an hour is an estimate, nothing was timed on a GPU."""

_CPU_TOY = replace(
    _GPU30_TOY,
    questions=(
        ("mnist6-half", ("full-p4", "partial-p4", *_MC_TURNS)),
        ("mnist6-mirror", (*_MIRRORS, *_MC_MIRRORS)),
        ("mnist6-180", _TURNS),
    ),
    size=14,
    n_train=2000,
    widths=(6, 6, 12),
    kernel_size=5,
    epochs=24,
    lr=0.005,
    gate_lr=0.005,
    burnin=3,
    frequency=3,
    n_copies=4,
    mc_width=6,
    mc_hidden=16,
    mc_pools=(0,),
    mc_epochs=10,
    mc_lr=0.005,
)
"""2,000 sixes of 14 × 14 pixels."""

PARTIAL_TOY: Mapping[PresetName, PartialSettings] = {
    "paper": _PAPER_TOY,
    "gpu30": _GPU30_TOY,
    "cpu": _CPU_TOY,
}

_GATES = ("t2", "full-p4", "partial-p4", "partial-p4+monotone", "augmented-p4")
_MIRRORED_GATES = ("full-p4m", "partial-p4m", "augmented-p4m")
_FINER_GATES = ("full-c8", "partial-c8")
_SAMPLED = tuple(
    f"mc-{kind}-{group}"
    for group in ("se2-4", "se2-8", "se2-16", "e2-8", "e2-16")
    for kind in ("full", "partial", "t2head", "mlp")
)
_KERNELS = tuple(f"mc-partial-se2-8@{kind}" for kind in ("relu", "leaky-relu", "swish"))
_FEW_SAMPLES = (
    *("mc-t2-se2-1", "mc-full-se2-4", "mc-partial-se2-4", "mc-t2head-se2-4", "mc-mlp-se2-4"),
    *(f"mc-partial-se2-4@{kind}" for kind in ("relu", "leaky-relu", "swish")),
)
_THIRTEEN = tuple(f"cnn13-{kind}-se2-{n}" for n in (2, 4, 8) for kind in ("full", "partial"))
_ALL = (
    *(*_GATES, *_MIRRORED_GATES, *_FINER_GATES),
    *("mc-t2-se2-1", *_SAMPLED, *_KERNELS),
    *("cnn13-t2-se2-1", *_THIRTEEN),
)

_PAPER = replace(
    _PAPER_TOY,
    questions=(("rotmnist", _ALL), ("mnist", _GATES), ("cifar10", _ALL), ("cifar100", _ALL)),
    loss_only=("mc", "cnn13"),
    n_validation=2000,
    widths=(16, 16, 32),
    n_copies=8,
    mc_width=32,
)
"""Tables 2 to 5 and 7 of Romero & Lohit 2022. Our networks with gates are smaller than theirs."""

_GPU30 = replace(
    _GPU30_TOY,
    questions=(
        ("rotmnist", (*_GATES, "mc-t2-se2-1", "mc-full-se2-8", "mc-partial-se2-8")),
        ("mnist", ("partial-p4",)),
        ("cifar10", (*_GATES, *_MIRRORED_GATES, "mc-partial-se2-8", "cnn13-partial-se2-8")),
    ),
    loss_only=_PAPER.loss_only,
    seeds=(0,),
    n_validation=2000,
    widths=_PAPER.widths,
    mc_width=32,
)
"""All pictures at full size; half an hour is an estimate, nothing was timed on a GPU."""

_CPU = replace(
    _CPU_TOY,
    questions=(
        ("rotmnist", (*_GATES, *_FEW_SAMPLES)),
        ("mnist", ("full-p4", "partial-p4")),
        ("cifar10", _GATES),
    ),
    loss_only=_PAPER.loss_only,
    size=16,
    n_validation=500,
    n_test=5000,
    widths=(8, 8, 16),
    epochs=32,
    burnin=4,
    frequency=4,
    starts=("current", "current@whole"),
    mc_width=8,
    mc_epochs=30,
)
"""2,000 pictures of 16 × 16 pixels."""

PARTIAL_BENCHMARKS: Mapping[PresetName, PartialSettings] = {
    "paper": _PAPER,
    "gpu30": _GPU30,
    "cpu": _CPU,
}
