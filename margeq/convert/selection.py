"""Which layers of a model are relaxed, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from margeq.convert.candidates import ORIGINALS
from margeq.convert.observed import Observed
from margeq.convert.record import RelaxedLayer
from margeq.errors import ConfigError
from margeq.parameters import matches
from margeq.paths import path_prefixes

__all__ = ["Entry", "Selection", "layers_of"]

Entry = str | type[nn.Module]


def layers_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Convolutions and linear layers on maps, and all names of each."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in ORIGINALS or isinstance(module, _ConvNd):
            found[module] = (*found.get(module, ()), name)
    return found


class Selection:
    """What is to be relaxed.

    Args:
        model: the model.
        include: names of layers or of modules that hold them, or types of either; ``None`` for all.
        exclude: the same, to be left.

    Raises:
        ConfigError: for an entry that is no name in the model and no type.
    """

    def __init__(
        self,
        model: nn.Module,
        include: Entry | Sequence[Entry] | None,
        exclude: Entry | Sequence[Entry],
    ) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        layers = [name for names in layers_of(model).values() for name in names]
        self._include = None if include is None else self._checked("include", include, layers)
        self._exclude = self._checked("exclude", exclude, layers)
        named = path_prefixes(model).values()
        self._chosen_already = [p for paths in named if len(paths) > 1 for p in paths.values()]

    def trouble(self, layer: nn.Module, names: Sequence[str], seen: Observed | None) -> str:
        """Why a layer is left as it is, empty if it is not."""
        if type(layer) not in ORIGINALS:
            return f"no candidate paths are known of {type(layer).__name__}"
        if self._include is not None and not self._listed(names, self._include):
            return "not included"
        if self._listed(names, self._exclude):
            return "excluded"
        if any(matches(name, self._chosen_already) for name in names):
            return "in a candidate path already"
        if seen is None:
            return "not called on this example"
        if seen.trouble:
            return seen.trouble
        return "called on maps of different sizes" if len(seen.sizes) > 1 else ""

    def left(
        self, layer: nn.Module, names: tuple[str, ...], seen: Observed | None, note: str
    ) -> RelaxedLayer:
        """The record of a layer that is left as it is."""
        one_size = seen is not None and len(seen.sizes) == 1
        sizes = tuple(map(tuple, seen.sizes[0])) if seen is not None and one_size else None
        return RelaxedLayer(names, type(layer).__name__, sizes=sizes, note=note)  # pyright: ignore[reportArgumentType]

    def _checked(
        self, argument: str, entries: Entry | Sequence[Entry], layers: Sequence[str]
    ) -> tuple[Entry, ...]:
        listed = (entries,) if isinstance(entries, str | type) else tuple(entries)
        for entry in listed:
            known = (
                any(matches(name, [entry]) for name in self._modules)
                if isinstance(entry, str)
                else isinstance(entry, type) and issubclass(entry, nn.Module)
            )
            if not known:
                raise ConfigError(
                    f"{argument}: {entry!r} is no module of the model and no type of modules; the "
                    f"layers are {', '.join(layers) or 'none'}"
                )
        return listed

    def _listed(self, names: Sequence[str], entries: Sequence[Entry]) -> bool:
        kinds = tuple(entry for entry in entries if not isinstance(entry, str))
        prefixes = [entry for entry in entries if isinstance(entry, str)]
        for name in names:
            holders = [module for other, module in self._modules.items() if _holds(other, name)]
            if matches(name, prefixes) or any(isinstance(module, kinds) for module in holders):
                return True
        return False


def _holds(module: str, layer: str) -> bool:
    return not module or matches(layer, [module])
