"""How the curvature is approximated, and the flavour that this gives the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from margeq.errors import ConfigError, FlavourMismatchError
from margeq.parameters import LAST_LAYER, LastLayer, matches

__all__ = ["EvidenceFlavour", "KfacOptions"]

_CURVATURES = ("kfac", "ekfac", "diag", "full")
_ROOTS = ("exact", "adaptive", "mc")
_BACKENDS = ("margeq", "backpack", "asdl")
_APPROXIMATIONS = {
    "expand": (False, False),
    "reduce": (True, True),
    "expand/reduce": (False, True),
    "reduce/expand": (True, False),
}
"""Name -> whether places, and whether frames, are summed before products are formed."""
_PLAIN_FACTORS = {"kfac_approx": "expand", "bias_approx": "exact", "position_fraction": 1.0}


@dataclass(frozen=True)
class EvidenceFlavour:
    """Everything that makes two evidence values comparable, or not.

    Values of different flavours differ by hundreds of nats on the same model and data.
    """

    likelihood: str
    curvature: str
    hessian_root: str
    kfac_approx: str
    bias_approx: str
    position_fraction: float
    weights: str
    temperature: float

    @property
    def is_bound(self) -> bool:
        """Whether the value is guaranteed not to exceed the Laplace evidence of the full GGN.

        It is for exact second moments (``"ekfac"`` and ``"diag"``) of the exact root, at all
        shared positions, and for ``"full"``, where the two are equal; never for ``"kfac"``, whose
        eigenvalues are approximate, or for a root that drops or samples columns.
        """
        return (
            self.curvature in ("ekfac", "diag", "full")
            and self.hessian_root == "exact"
            and self.position_fraction == 1.0
        )

    def require_same(self, other: EvidenceFlavour) -> None:
        """Refuse a comparison between different flavours.

        Raises:
            FlavourMismatchError: naming each field that differs.
        """
        differing = [
            f"{name}: {value!r} against {getattr(other, name)!r}"
            for name, value in vars(self).items()
            if value != getattr(other, name)
        ]
        if differing:
            raise FlavourMismatchError(
                "evidence values of different flavours cannot be compared ("
                + "; ".join(differing)
                + "); recompute both with the same options"
            )


@dataclass(frozen=True)
class KfacOptions:
    """Options of one curvature pass.

    Attributes:
        hessian_root: ``"exact"`` (C - 1 columns), ``"adaptive"`` (the largest columns, up to
            ``captured_trace`` of the trace over the whole data set), or ``"mc"``.
        mc_samples: columns of the Monte-Carlo root.
        captured_trace: share of the output Hessian's trace that the adaptive root keeps.
        kfac_approx: ``"expand"`` or ``"reduce"`` over shared positions, or a mapping from names
            of parameters or modules to one of them (``""`` is the default of the rest). For group
            layers ``"expand/reduce"`` expands places and reduces group elements, and
            ``"reduce/expand"`` is the converse; other layers have one element.
        bias_approx: ``"exact"``, or ``"expand"`` for parity with other libraries.
        position_fraction: share of the shared positions that enter the input covariances.
        seed: mixed into the content keys of all random draws.
        curvature: ``"kfac"``; ``"ekfac"``, exact second moments in the eigenvectors of the
            Kronecker factors, a lower bound on the evidence of the full GGN; ``"diag"``, the same
            without factors; or ``"full"``, the dense GGN of small models. The options of Kronecker
            factors do not go with the last two.

    Raises:
        ConfigError: for an unknown name, a share outside (0, 1], or an option without effect.
    """

    hessian_root: str = "exact"
    mc_samples: int = 1
    captured_trace: float = 0.999
    kfac_approx: str | Mapping[str, str] = "expand"
    bias_approx: str = "exact"
    position_fraction: float = 1.0
    seed: int = 0
    curvature: str = "kfac"
    backend: str = "margeq"

    def __post_init__(self) -> None:
        if self.curvature not in _CURVATURES:
            raise ConfigError(f"curvature={self.curvature!r}: use one of {_CURVATURES}")
        if self.hessian_root not in _ROOTS:
            raise ConfigError(f"hessian_root={self.hessian_root!r}: use one of {_ROOTS}")
        if self.bias_approx not in ("exact", "expand"):
            raise ConfigError(f"bias_approx={self.bias_approx!r}: use 'exact' or 'expand'")
        if self.mc_samples < 1:
            raise ConfigError(f"mc_samples={self.mc_samples} must be at least 1")
        for name in ("captured_trace", "position_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        for value in self._named().values():
            if not isinstance(value, str) or value not in _APPROXIMATIONS:
                raise ConfigError(f"kfac_approx={value!r}: use one of {tuple(_APPROXIMATIONS)}")
        if self.curvature in ("diag", "full"):
            self._refuse_factor_options()
        if self.backend not in _BACKENDS:
            raise ConfigError(f"backend={self.backend!r}: use one of {_BACKENDS}")
        if self.backend != "margeq":
            self._refuse_what_others_lack()

    def _refuse_what_others_lack(self) -> None:
        asked = {
            "curvature": (self.curvature, "kfac"),
            "hessian_root": (self.hessian_root, "exact"),
            "kfac_approx": (self._plain_approx(), "expand"),
            "position_fraction": (self.position_fraction, 1.0),
        }
        for name, (value, only) in asked.items():
            if value != only:
                raise ConfigError(
                    f"backend={self.backend!r} has {name}={only!r} only, not {value!r}; use "
                    f"backend='margeq' for the rest"
                )

    def _refuse_factor_options(self) -> None:
        for field, plain in _PLAIN_FACTORS.items():
            value = self._plain_approx() if field == "kfac_approx" else getattr(self, field)
            if value != plain:
                raise ConfigError(
                    f"{field}={getattr(self, field)!r} is about Kronecker factors, which "
                    f"curvature={self.curvature!r} has none of; leave it out, or use 'kfac' or "
                    f"'ekfac'"
                )

    def require_known(self, tensors: Iterable[str]) -> None:
        """Check that each name in ``kfac_approx`` is one of ``tensors``, or a prefix of one.

        Raises:
            ConfigError: naming the entry.
        """
        names = list(tensors)
        for key in self._named():
            if key and not any(matches(name, [key]) for name in names):
                raise ConfigError(f"kfac_approx: no weight is called, or lies below, {key!r}")

    def reduces(self, tensor: str) -> tuple[bool, bool]:
        """Whether places, and whether frames, of one weight tensor are reduced."""
        return _APPROXIMATIONS[_looked_up(tensor, self._named())]

    def _named(self) -> dict[str, str]:
        """Name -> approximation, with the default of the rest at ``""``."""
        named = self.kfac_approx
        return {"": "expand", **(named if isinstance(named, Mapping) else {"": named})}

    def _plain_approx(self) -> str:
        """The same text for all values of ``kfac_approx`` that say the same."""
        named = self._named()
        telling = {"": named[""]} if named[""] != "expand" else {}
        for key in named:
            others = {other: value for other, value in named.items() if other != key}
            if key and named[key] != _looked_up(key, others):
                telling[key] = named[key]
        return named[""] if telling.keys() <= {""} else repr(sorted(telling.items()))

    def flavour(
        self, likelihood: str, parameters: str | Sequence[str], temperature: float
    ) -> EvidenceFlavour:
        """The flavour of evidence that these options give, for a selection of weights."""
        detail = {
            "exact": "exact",
            "adaptive": f"adaptive({self.captured_trace:g})",
            "mc": f"mc({self.mc_samples})",
        }
        return EvidenceFlavour(
            likelihood=likelihood,
            curvature=self.curvature,
            hessian_root=detail[self.hessian_root],
            kfac_approx=self._plain_approx(),
            bias_approx=self.bias_approx,
            position_fraction=self.position_fraction,
            weights=_weights(parameters),
            temperature=temperature,
        )


def _weights(parameters: str | Sequence[str]) -> str:
    """One text per selection of weights; last layers compare from model to model."""
    if isinstance(parameters, LastLayer):
        return LAST_LAYER
    return parameters if isinstance(parameters, str) else repr(sorted(parameters))


def _looked_up(tensor: str, named: Mapping[str, str]) -> str:
    """The value of the longest name that a tensor is called or lies below."""
    hits = [key for key in named if key and matches(tensor, [key])]
    return named[max(hits, key=len, default="")]
