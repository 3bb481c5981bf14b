"""What relaxing did to each layer, and the way back to the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from margeq.errors import ConfigError
from margeq.parameters import unwrapped

__all__ = ["RECORD", "Relaxation", "RelaxedLayer", "relaxation"]

RECORD = "relaxation_record"
"""Attribute of a relaxed model."""


@dataclass(frozen=True)
class RelaxedLayer:
    """One layer of the original model.

    Attributes:
        names: all its names in the model.
        kind: its type.
        original: name of the path that holds it, empty for a layer that is left as it is.
        paths: path -> number of parameters, the original's first.
        sizes: shapes of its input and output, ``None`` if it is not called.
        omitted: path -> why the layer does not have it.
        note: why it is left as it is, empty if it is not.
    """

    names: tuple[str, ...]
    kind: str
    original: str = ""
    paths: Mapping[str, int] | None = None
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    omitted: Mapping[str, str] | None = None
    note: str = ""

    def __str__(self) -> str:
        """One line."""
        name = " = ".join(name or "the model itself" for name in self.names)
        sizes = "" if self.sizes is None else ", " + " -> ".join(map(_times, self.sizes))
        paths = " + ".join(f"{path} ({count:,})" for path, count in (self.paths or {}).items())
        done = paths or f"left as it is: {self.note}"
        omitted = "".join(f"; no {path}: {why}" for path, why in (self.omitted or {}).items())
        return f"{name} ({self.kind}{sizes}): {done}{omitted}"


@dataclass(frozen=True)
class Relaxation:
    """What :func:`margeq.relax` did; ``print`` it for a line per layer.

    Attributes:
        layers: every convolution and every linear layer on maps, relaxed or not.
        names: parameter of the original model -> its name in the relaxed one.
    """

    layers: tuple[RelaxedLayer, ...]
    names: Mapping[str, str]

    @property
    def relaxed(self) -> tuple[RelaxedLayer, ...]:
        """Layers that have candidate paths now."""
        return tuple(layer for layer in self.layers if layer.original)

    def original_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """State of the original layers inside a relaxed model, by their original names.

        Args:
            model: the relaxed model, trained or not.

        Returns:
            What the original model's ``load_state_dict`` takes. Other paths are not in it: it is
            the trained function only where they are off.
        """
        kept = {name: layer.original for layer in self.relaxed for name in layer.names}
        found = {}
        for key, value in unwrapped(model).state_dict().items():
            layer = next((name for name in kept if key.startswith(_below(name))), None)
            if layer is None:
                found[key] = value
                continue
            inside = f"{_below(layer)}paths.{kept[layer]}."
            if key.startswith(inside):
                found[_below(layer) + key.removeprefix(inside)] = value
        return found

    def __str__(self) -> str:
        """A line per layer."""
        return "\n".join(map(str, self.layers))


def relaxation(model: nn.Module) -> Relaxation:
    """The record of a relaxed model.

    Args:
        model: from :func:`margeq.relax`, or a copy of it.

    Returns:
        What was done to each layer.

    Raises:
        ConfigError: for a model that was not relaxed.
    """
    record = getattr(unwrapped(model), RECORD, None)
    if not isinstance(record, Relaxation):
        raise ConfigError(
            f"{type(model).__name__} has no record of a relaxation; give the model that "
            f"margeq.relax returned, not a part of it"
        )
    return record


def _below(name: str) -> str:
    return f"{name}." if name else ""


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
