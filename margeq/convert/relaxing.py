"""Candidate paths around the layers of any network, which computes the same as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast
from zlib import crc32

import torch
from torch import nn

from margeq.convert.candidates import ORIGINALS, Maker, Spot, Unfit, makers
from margeq.convert.observed import Observed, largest_difference, observe, run
from margeq.convert.record import RECORD, Relaxation, RelaxedLayer
from margeq.convert.selection import Entry, Selection, layers_of
from margeq.convert.silence import silence
from margeq.counts import is_count
from margeq.errors import ConfigError, ConversionError
from margeq.layers import ResidualPathways

__all__ = ["relax"]

_LARGEST = 10_000_000
_TOLERANCE = 1e-6
_N_PROBES = 2


def relax(
    model: nn.Module,
    example_input: Any,
    paths: Sequence[str] | Mapping[str, str | Maker] = ("factored", "conv"),
    *,
    include: Entry | Sequence[Entry] | None = None,
    exclude: Entry | Sequence[Entry] = (),
    largest_path: int = _LARGEST,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model whose convolutions can become something else, if the data ask for it.

    Each ``nn.Conv2d`` becomes a :class:`margeq.layers.ResidualPathways` with reduction ``"sum"``.
    Its path ``"conv"`` is the layer with its weights; the others start as the zero function, with a
    gradient, so that the copy computes what the model computes. A :class:`margeq.layers.Linear2d`
    becomes one too, its path is ``"fc"``. The caller's model is left as it is.

    To go on from a trained model, train with ``optimize_marglik(..., restarts=["current"])``: with
    ``restarts="auto"`` every start draws all weights anew. Even then, weights before a norm in
    training mode begin at the norm that is held for them, which the normed outputs do not show.

    Built-in paths: ``"fc"`` (:class:`margeq.layers.Linear2d`), ``"factored"``
    (:class:`margeq.layers.FactoredLinear2d`), ``"s_factored"``, ``"s_conv"`` (the sparsified
    ones), ``"conv"`` in place of linear layers (3 x 3, circular), and groups ``"p2"``, ``"p4"``,
    ``"pm"``, ``"p4m"``, ``"c<n>"``, ``"d<n>"``: a group convolution that reads channels as maps
    of the group (all elements of a channel together), and that lifts in the first layer.
    Convolutions among the new paths have no bias, and whole-map paths have one where the layer has.

    Args:
        model: any network.
        example_input: of it: a tensor, a sequence of positional or a mapping of keyword inputs.
            The model is run twice on it, in evaluation mode.
        paths: names, or path name -> built-in name or function ``(layer, in_shape, out_shape)``
            that returns a module, or ``None`` for none. Its last map is set to zero.
        include: layers to relax, by name, by name of a module that holds them, or by type of
            either; all by default.
        exclude: layers to leave, likewise.
        largest_path: largest number of weights of a path ``"fc"``.
        seed: of first factors, which are drawn.

    Returns:
        The copy; ``margeq.convert.relaxation(copy)`` says what was done to each layer.

    Raises:
        ConfigError: for an unknown name, a dense path above ``largest_path``, a path that cannot
            start at zero, or if no layer is relaxed.
        ConversionError: if the copy does not compute the same.

    Reference:
        Finzi, Benton & Wilson 2021 (residual pathway priors).

    Example:
        >>> from margeq.convert import relaxation
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        >>> relaxed = relax(model, torch.zeros(1, 1, 6, 6), paths=("factored", "p4"))
        >>> print(relaxation(relaxed))
        0 (Conv2d, 1 x 6 x 6 -> 8 x 6 x 6): conv (80) + factored (620) + p4 (18)
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not is_count(largest_path):
        raise ConfigError(f"largest_path={largest_path!r}: use a number of weights")
    make = makers(paths)
    copy = deepcopy(model)
    outputs, seen = observe(copy, example_input, list(layers_of(copy)))
    layers = layers_of(copy)  # lazy ones have found their type
    selection = Selection(copy, include, exclude)
    lines, sums = [], {}
    for layer, names in layers.items():
        line, new = _relaxed(layer, names, seen.get(layer), selection, make, largest_path, seed)
        lines.append(line)
        if new is not None:
            sums[names] = new
    if not sums:
        listed = "".join(f"\n- {line}" for line in lines) or " it has no convolutions"
        raise ConfigError(f"no layer of {type(model).__name__} is relaxed:{listed}")
    relaxed = _replaced(copy, sums)
    record = Relaxation(tuple(lines), _new_names(copy, lines, model))
    setattr(relaxed, RECORD, record)
    _require_same(relaxed, example_input, outputs)
    return relaxed


def _relaxed(
    layer: nn.Module,
    names: tuple[str, ...],
    seen: Observed | None,
    selection: Selection,
    make: Mapping[str, Callable[[Spot], Any]],
    largest_path: int,
    seed: int,
) -> tuple[RelaxedLayer, ResidualPathways | None]:
    note = selection.trouble(layer, names, seen)
    if note or seen is None:
        return selection.left(layer, names, seen, note), None
    sizes = seen.sizes[0]
    spot = Spot(names[0], cast(nn.Conv2d, layer), *sizes, seen.is_first, largest_path)
    original = ORIGINALS[type(layer)]
    paths: dict[str, nn.Module] = {original: layer}
    omitted = {}
    for name in make:
        if name != original:
            try:
                paths[name] = _new_path(name, make[name], spot, seed)
            except Unfit as unfit:
                omitted[name] = str(unfit)
    if len(paths) == 1:
        why = "; ".join(f"no {name}: {reason}" for name, reason in omitted.items())
        return selection.left(layer, names, seen, why or f"{original} is its only path"), None
    new = ResidualPathways(paths, reduction="sum")
    new.training = new.paths.training = layer.training
    counts = {name: sum(p.numel() for p in path.parameters()) for name, path in paths.items()}
    kind, (x, y) = type(layer).__name__, sizes
    return RelaxedLayer(names, kind, original, counts, (tuple(x), tuple(y)), omitted), new


def _new_path(name: str, make: Callable[[Spot], nn.Module], spot: Spot, seed: int) -> nn.Module:
    """A path at zero, its first factors drawn by layer and name: the same among other paths."""
    weight = spot.layer.weight
    # drawn on the CPU, whatever the default device, and with its generator alone
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.default_generator.manual_seed(crc32(f"{seed}:{spot.name}:{name}".encode()))
        path = make(spot).to(weight.device, weight.dtype).train(spot.layer.training)
        x = torch.randn(_N_PROBES, *spot.in_shape).to(weight)
    silence(path, x, spot.out_shape, f"{spot.name or 'the model itself'}: the path {name!r}")
    return path


def _replaced(model: nn.Module, sums: Mapping[tuple[str, ...], ResidualPathways]) -> nn.Module:
    for names, new in sums.items():
        for name in names:
            if not name:
                return new
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, new)
    return model


def _new_names(copy: nn.Module, lines: Sequence[RelaxedLayer], model: nn.Module) -> dict[str, str]:
    """Parameter of the original model -> its name in the relaxed one."""
    inside = {name: line.original for line in lines if line.original for name in line.names}
    found = {}
    for name, _ in model.named_parameters():
        layer, _, local = name.rpartition(".")
        prefix = f"{layer}." if layer else ""
        moved = layer in inside
        found[name] = f"{prefix}paths.{inside[layer]}.{local}" if moved else name
    return found


def _require_same(relaxed: nn.Module, example_input: Any, outputs: list[torch.Tensor]) -> None:
    try:
        difference = largest_difference(outputs, run(relaxed, example_input))
    except AttributeError as error:
        raise ConversionError(
            f"the relaxed model cannot be run, its code looks at attributes of a layer that is a "
            f"sum of paths now ({error}); leave that layer with exclude=[...]"
        ) from error
    if not difference <= _TOLERANCE:
        raise ConversionError(
            f"the relaxed model's outputs differ from the model's by {difference:.3g}, more than "
            f"{_TOLERANCE:g}; does its forward depend on anything but input and weights? Leave "
            f"layers with exclude=[...]"
        )
