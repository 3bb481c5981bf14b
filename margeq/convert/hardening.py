"""A plain network of torch from one with candidate paths and group layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from margeq.convert.observed import largest_difference, run
from margeq.convert.plain import PLAIN, PLAIN_AROUND
from margeq.convert.record import RECORD
from margeq.convert.sums import plain_sum
from margeq.errors import ConfigError, ConversionError, UnsupportedLayerError
from margeq.layers import ResidualPathways
from margeq.parameters import unwrapped
from margeq.paths import path_sums
from margeq.training.result import MargLikResult

__all__ = ["harden"]

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
_COARSE = 2e-2  # of half precision

_Dropped = Mapping[str, frozenset[str]]


def harden(
    model: nn.Module, result: MargLikResult | None = None, *, example_input: Any = None
) -> nn.Module:
    """A copy of a model that needs torch alone: only the paths that the data chose are left.

    Paths that are switched off, or that ``result`` finds ``"off"``, are dropped. Of the others,
    those that are convolutions together are added up to one ``nn.Conv2d``, sparsified ones and
    group convolutions by the filters that they convolve with; factored paths become grouped
    convolutions of the same size. Group layers become ordinary ones. What no module of torch
    computes, as a sum, becomes a ``torch.fx.GraphModule``. Normalisation stays as it is.

    The copy computes what the model computes with the dropped paths switched off. A path that is
    ``"off"`` but still computed has less than 1 % of its layer's variance over the data, and may
    have a mean: compare the held-out figures of both.

    The copy can be saved without margeq: with ``torch.export`` as a whole, or by its
    ``state_dict`` beside a script that builds it.

    Args:
        model: trained or not, left as it is.
        result: of :func:`margeq.optimize_marglik`, for its verdicts.
        example_input: of the model; if given, both are run on it and compared.

    Returns:
        A module without margeq in it, with the model's flags of training.

    Raises:
        ConfigError: for a result about other layers, or that leaves a layer without a path.
        UnsupportedLayerError: for a module that has no plain form.
        ConversionError: if the outputs differ by more than 1e-5 (float32; 1e-10 in float64).

    Example:
        >>> from margeq.layers import ResidualPathways
        >>> sums = ResidualPathways({"a": nn.Conv2d(1, 2, 3, padding=1), "b": nn.Conv2d(1, 2, 1)})
        >>> harden(sums)
        Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    reference = deepcopy(unwrapped(model))
    _switch_off(reference, {} if result is None else _off(result, reference))
    copy = deepcopy(reference)
    if RECORD in copy.__dict__:
        delattr(copy, RECORD)
    with torch.no_grad():
        plain = _Hardening().plain(copy, "")
    _require_plain(plain)
    if example_input is not None:
        _require_same(reference, plain, example_input)
    return plain


class _Hardening:
    """Replaces modules from the inside outwards, each once."""

    def __init__(self) -> None:
        self._done: dict[nn.Module, nn.Module] = {}
        self._settled: set[nn.Module] = set()

    def plain(self, module: nn.Module, name: str) -> nn.Module:
        """The module without margeq, in the same mode; parts keep their own."""
        if module not in self._done:
            new = self._done[module] = self._converted(module, name)
            for part in set(new.modules()) - self._settled:
                part.training = module.training
                self._settled.add(part)
        return self._done[module]

    def _converted(self, module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, ResidualPathways):
            return self._sum(module, name)
        if type(module) in PLAIN:
            return PLAIN[type(module)](module)
        for local, child in _children(module).items():
            setattr(module, local, self.plain(child, f"{name}.{local}".removeprefix(".")))
        if type(module) in PLAIN_AROUND:
            return PLAIN_AROUND[type(module)](module)
        return _container(module, name) if _is_ours(module) else module

    def _sum(self, layer: ResidualPathways, name: str) -> nn.Module:
        kept = {path: module for path, module in layer.named_paths() if path in layer.active}
        prefix = f"{name}.paths".removeprefix(".")
        paths = {path: self.plain(module, f"{prefix}.{path}") for path, module in kept.items()}
        subsample = layer.subsample
        if subsample is not None:
            subsample = self.plain(subsample, f"{name}.subsample".removeprefix("."))
        return plain_sum(paths, layer.scale, subsample, layer.before)


class _Tracer(fx.Tracer):
    """Looks into containers of margeq and into no other module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_ours(m)


def _container(module: nn.Module, name: str) -> nn.Module:
    """A module of margeq whose parts are plain."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return nn.Sequential(_children(module))
    if _is_ours(module, "margeq.layers"):
        raise _no_plain_form(module, name, "")
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward does that cannot be traced
        raise _no_plain_form(module, name, f" ({error})") from error
    return fx.GraphModule(module, graph, type(module).__name__)


def _children(module: nn.Module) -> OrderedDict[str, nn.Module]:
    """Also those that stand there twice."""
    return OrderedDict((n, child) for n, child in module._modules.items() if child is not None)


def _no_plain_form(module: nn.Module, name: str, why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{name or 'the model itself'} ({type(module).__name__}) has no plain form{why}; replace "
        f"it by a module of torch before hardening, or keep the model as it is"
    )


def _is_ours(module: nn.Module, package: str = "margeq") -> bool:
    """Whether a module needs margeq, also by a base class."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(module).__mro__)


def _require_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _is_ours(module):
            raise _no_plain_form(module, name, "")


def _off(result: MargLikResult, model: nn.Module) -> _Dropped:
    """Layer -> paths that the result finds off."""
    sums = path_sums(model)
    found: dict[str, frozenset[str]] = {}
    for row in result.effective_dimension().paths:
        known = dict(sums[row.layer].named_paths()) if row.layer in sums else {}
        if row.path and row.path not in known:
            raise ConfigError(
                f"result is about the path {row.path!r} of {row.layer or 'the model itself'!r}, "
                f"which this model does not have; give the result of this very model"
            )
        if row.verdict == "off":
            found[row.layer] = found.get(row.layer, frozenset()) | {row.path}
    return found


def _switch_off(model: nn.Module, dropped: _Dropped) -> None:
    sums = path_sums(model)
    for layer, names in dropped.items():
        left = set(sums[layer].active) - names
        if not left:
            raise ConfigError(
                f"{layer or 'the model itself'}: {', '.join(sorted(names))} are off in result, "
                f"and every other path is switched off; give the result of this very model"
            )
        for name in names:
            sums[layer].switch_off(name)


def _require_same(before: nn.Module, after: nn.Module, example_input: Any) -> None:
    old = run(before, example_input)
    difference = largest_difference(old, run(after, example_input))
    allowed = max((_tolerance(y) for y in old), default=_COARSE)
    if not difference <= allowed:
        raise ConversionError(
            f"the plain model's outputs differ from the model's by {difference:.3g}, more than "
            f"{allowed:g}; please report this, with the model"
        )


def _tolerance(y: Tensor) -> float:
    return _TOLERANCES.get(y.dtype, _COARSE)
