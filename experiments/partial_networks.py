"""Networks of the experiments on partial equivariance, by name.

    t2, full-p4, partial-p4, augmented-p4     convolutions on a grid of p4, p4m, c8, d1 with gates
    partial-p4+monotone                       gates pay for leaving more than the one before
    mc-full-se2-8, mc-t2head-e2-8             the residual network, on samples (t2, full, partial,
                                              t2head, mlp) of se2, e2 or the mirror alone
    mc-partial-se2-8@relu                     the same with other filters
    cnn13-partial-se2-4                       the network of 13 layers, on samples

``t2`` has no symmetry but translations, and about as many weights as ``full-p4``; ``augmented`` is
that network on learned changes of its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from experiments.partial_presets import PartialSettings
from margeq.data import ImageTask
from margeq.errors import ConfigError
from margeq.groups import P4, P4M, C, D, FiniteGroup
from margeq.layers import MonotoneGates
from margeq.models import AugmentedInputs, PartialCNN13, PartialResNet, partial_cnn
from margeq.models.sampled_groups import SampledGroup

__all__ = ["build_partial"]

TrainedBy = Literal["evidence", "loss"]
_GROUPS: dict[str, FiniteGroup] = {"p4": P4, "p4m": P4M, "c8": C(8), "d1": D(1)}
_SAMPLED: dict[str, SampledGroup] = {"se2": "SE(2)", "e2": "E(2)", "mirror": "mirror"}
_HEADS = {"full": "max", "partial": "max", "t2": "max", "t2head": "t2", "mlp": "mlp"}
_GENERATORS = {"p4": ["rotation"], "p4m": ["rotation", "mirror"]}


@dataclass(frozen=True)
class _Sizes:
    """What depends on the data."""

    n_classes: int
    in_channels: int
    n_train: int


def build_partial(
    model: str, settings: PartialSettings, task: ImageTask, trained_by: TrainedBy
) -> nn.Module:
    """The network of that name, with random weights.

    Raises:
        ConfigError: for an unknown name.
    """
    images = task.train_images
    sizes = _Sizes(task.n_classes, images.shape[1], len(images))
    if model.startswith(("mc-", "cnn13-")):
        return _on_samples(model, settings, sizes, trained_by)
    name, _, extra = model.partition("+")
    if extra not in ("", "monotone"):
        raise ConfigError(f"network {model!r}: after + only 'monotone' is known")
    network = _on_grid(name, settings, sizes, trained_by)
    return MonotoneGates(network, settings.monotone * sizes.n_train) if extra else network


def _on_grid(
    name: str, settings: PartialSettings, sizes: _Sizes, trained_by: TrainedBy
) -> nn.Module:
    kind, _, group = name.partition("-")
    if kind == "t2":
        return _cnn(C(1), settings, sizes, trained_by)
    if kind not in ("full", "partial", "augmented") or group not in _GROUPS:
        raise ConfigError(f"network {name!r} is unknown")
    if kind != "augmented":
        return _cnn(_GROUPS[group], settings, sizes, trained_by, partial=kind == "partial")
    return AugmentedInputs(
        _cnn(C(1), settings, sizes, trained_by),
        settings.n_copies,
        generators=_GENERATORS[group],
        trained_by=trained_by,
    )


def _cnn(
    group: FiniteGroup,
    settings: PartialSettings,
    sizes: _Sizes,
    trained_by: TrainedBy,
    partial: bool = False,
) -> nn.Module:
    # as many weights as on p4: a group convolution has width^2 |H|
    factor = math.sqrt(P4.order / group.order)
    return partial_cnn(
        sizes.n_classes,
        group=group,
        partial=partial,
        width=settings.start,
        mirror=settings.start,
        trained_by=trained_by,
        widths=[max(1, round(width * factor)) for width in settings.widths],
        in_channels=sizes.in_channels,
        kernel_size=settings.kernel_size,
    )


def _on_samples(
    model: str, settings: PartialSettings, sizes: _Sizes, trained_by: TrainedBy
) -> nn.Module:
    name, _, nonlinearity = model.partition("@")
    try:
        family, kind, group, number = name.split("-")
        head, sampled = _HEADS[kind], _SAMPLED[group]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"network {model!r} is unknown") from error
    options: dict[str, Any] = {
        "num_classes": sizes.n_classes,
        "in_channels": sizes.in_channels,
        "partial": kind == "partial",
        "trained_by": trained_by,
    }
    on: SampledGroup = "T(2)" if kind == "t2" else sampled
    if family == "cnn13":
        return PartialCNN13.on(on, int(number), **options)
    # about what pixels can show; the published 10 is that of 7 x 7 pixels and more
    frequency = (settings.kernel_size - 1) / 2
    return PartialResNet.on(
        on, int(number), head=head, width=settings.mc_width, hidden=settings.mc_hidden,
        kernel_size=settings.kernel_size, pool_after=settings.mc_pools, omega_0=frequency,
        nonlinearity=nonlinearity or "siren", **options,
    )  # fmt: skip
