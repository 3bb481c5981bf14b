"""The sums over the data of all ranks, from those of each, before any eigenvalue is taken.

Eigenvalues, log-determinants and evidences of shares of the data do not add up; the sums do.

Ranks first tell each other what their sums look like, as a few hundred bytes of text: a rank
without data does not know, and sums of different models, options or thresholds must not be added.
The sums themselves are one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isclose
from typing import Any

import torch
from torch import Tensor

from margeq.comm import Comm
from margeq.curvature.eigen import BlockEigen
from margeq.curvature.forms import BlockCurvature, Curvature
from margeq.curvature.fourier import GroupCirculant
from margeq.curvature.full import FullCurvature
from margeq.curvature.kron import BlockKron
from margeq.curvature.outputs import OutputCurvature
from margeq.errors import DataError, DistributedMismatchError
from margeq.linalg import accumulation_dtype
from margeq.state import CurvatureState

__all__ = ["reduce_state"]


def reduce_state(state: CurvatureState, comm: Comm) -> CurvatureState:
    """The state of the data of all ranks together; every rank has to call this.

    Args:
        state: of this rank's share of the data, which may be empty, each datum in one share.
        comm: the ranks.

    Returns:
        What one pass over all data gives, up to rounding, the same on all ranks.

    Raises:
        DataError: if all ranks together have no data.
        DistributedMismatchError: if the ranks' states cannot be added, naming the difference.
    """
    if comm.size == 1:
        return state
    notes = comm.gather(_note(state))
    _require_addable(notes)
    used = [note for note in notes if note["n_data"]]
    if not used:
        raise DataError(f"the loaders of all {comm.size} ranks yielded 0 samples together")
    state = replace(state, curvature=_like_others(state.curvature, used))
    tensors = _tensors(state, used)
    sums = dict(zip(tensors, comm.sum(list(tensors.values())), strict=True))
    trace = sum(note["trace"] for note in notes)
    kept = sum(note["trace"] * note["captured_trace"] for note in notes)
    return replace(
        state,
        curvature=_with_sums(state.curvature, sums),
        fit=sums["fit"],
        n_data=sum(note["n_data"] for note in notes),
        captured_trace=kept / trace if trace > 0 else 1.0,
        checksum=sum(note["checksum"] for note in notes) % 2**63,
        threshold=used[0]["threshold"],
        trace=trace,
    )


# --- what ranks have to know of each other


def _note(state: CurvatureState) -> dict[str, Any]:
    """What a state is about, as numbers and texts."""
    base, parts = _split(state.curvature)
    blocks = base.blocks if isinstance(base, BlockCurvature) else {}
    return {
        "flavour": asdict(state.flavour),
        "kind": type(state.curvature).__name__,
        "square_norms": {name: float(value) for name, value in state.square_norms.items()},
        "log_hyperprior": state.log_hyperprior,
        "threshold": state.threshold,
        "n_data": state.n_data,
        "checksum": state.checksum,
        "trace": state.trace,
        "captured_trace": state.captured_trace,
        "fit": list(state.fit.shape),
        "blocks": {name: _form(block).as_note() for name, block in blocks.items()},
        "parts": {name: list(part.shape) for name, part in parts.items()},
    }


@dataclass(frozen=True)
class _Form:
    """What a block looks like, apart from the numbers in it.

    Attributes:
        kind: name of its class.
        shapes: of its tensors.
        layout: as in the block.
        symmetry: state of the symmetry, with nested lists for tensors.
        resolution: as in the block.
        is_empty: whether the rank has no data for it; the rest then says nothing.
    """

    kind: str
    shapes: dict[str, list[int]]
    layout: Any
    symmetry: Any = None
    resolution: float = 0.0
    is_empty: bool = False

    def as_note(self) -> dict[str, Any]:
        return asdict(self)


def _form(block: Any) -> _Form:
    symmetry = getattr(block, "symmetry", None)
    return _Form(
        kind=type(block).__name__,
        shapes={name: list(tensor.shape) for name, tensor in block.tensors().items()},
        layout=block.layout,
        symmetry=symmetry and _symmetry_note(symmetry),
        resolution=getattr(block, "resolution", 0.0),
        is_empty=block.is_empty,
    )


def _symmetry_note(symmetry: GroupCirculant) -> dict[str, Any]:
    plain = symmetry.state_dict()
    return {key: v.tolist() if isinstance(v, Tensor) else v for key, v in plain.items()}


def _split(curvature: Curvature) -> tuple[Curvature, Mapping[str, Tensor]]:
    """Sums over all outputs, and those that are kept for each."""
    if isinstance(curvature, OutputCurvature):
        return curvature.base, curvature.parts
    return curvature, {}


def _require_addable(notes: Sequence[Mapping[str, Any]]) -> None:
    for field in ("flavour", "kind", "square_norms", "log_hyperprior"):
        _require_same(field, [note[field] for note in notes], range(len(notes)))
    ranks = [rank for rank, note in enumerate(notes) if note["n_data"]]
    for field in ("threshold", "fit"):
        _require_same(field, [notes[rank][field] for rank in ranks], ranks)
    for name in _names_of_parts(notes):
        seen = [rank for rank, note in enumerate(notes) if name in note["parts"]]
        values = [notes[rank]["parts"][name] for rank in seen]
        _require_same(f"shape per output of the curvature of {name!r}", values, seen)
    for name in notes[0]["blocks"]:
        seen = [rank for rank, note in enumerate(notes) if not note["blocks"][name]["is_empty"]]
        for field in ("kind", "shapes", "layout"):
            values = [notes[rank]["blocks"][name][field] for rank in seen]
            _require_same(f"{field} of the curvature of {name!r}", values, seen)


def _require_same(what: str, values: Sequence[Any], ranks: Sequence[int]) -> None:
    for rank, value in zip(ranks, values, strict=True):
        if not _alike(value, values[0]):
            first, second = _telling(values[0], value)
            advice = (
                "margeq.distributed.accumulate finds one threshold for all"
                if what == "threshold"
                else "all ranks need the same model, weights and options"
            )
            raise DistributedMismatchError(
                f"{what} differs between ranks: {first} on rank {ranks[0]}, {second} on rank "
                f"{rank}; {advice}"
            )


def _alike(one: Any, other: Any) -> bool:
    """Equality, of numbers up to the rounding of other processors."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return isclose(one, other, rel_tol=1e-9)
    return one == other


def _telling(one: Any, other: Any) -> tuple[Any, Any]:
    """The part of two mappings that differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if not _alike(one.get(key), other.get(key))]
        return {k: one.get(k) for k in keys[:3]}, {k: other.get(k) for k in keys[:3]}
    return one, other


def _names_of_parts(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for note in notes for name in note["parts"]})


# --- blocks without data take the shape that others have


def _like_others(curvature: Curvature, used: Sequence[Mapping[str, Any]]) -> Curvature:
    if isinstance(curvature, OutputCurvature):
        shapes = {name: note["parts"][name] for note in used for name in note["parts"]}
        device = next(iter(_sums_of(curvature.base).values())).device
        zeros = {
            name: torch.zeros(shapes[name], dtype=accumulation_dtype(device), device=device)
            for name in _names_of_parts(used)
        }
        # a rank where no gradient reached a weight does not know how it is stored
        telling = sorted(used, key=lambda note: -len(note["parts"]))
        base = _like_others(curvature.base, telling)
        return OutputCurvature(base, {n: curvature.parts.get(n, zeros[n]) for n in zeros})
    if not isinstance(curvature, BlockCurvature):
        return curvature
    blocks = {}
    for name, block in curvature.blocks.items():
        notes = [note["blocks"][name] for note in used]
        telling = [note for note in notes if not note["is_empty"]] or notes[:1]
        blocks[name] = _shaped(block, [_Form(**note) for note in telling])
    return BlockCurvature(blocks)


def _shaped(block: Any, forms: Sequence[_Form]) -> BlockKron | BlockEigen:
    """The block, or zeros in its stead, with what all ranks together know about it."""
    form = forms[0]
    if block.is_empty:
        some = next(iter(block.tensors().values()))
        zeros = {name: some.new_zeros(shape) for name, shape in form.shapes.items()}
        block = replace(block, **zeros, layout=form.layout)
    if not isinstance(block, BlockKron):
        return block
    common = all(other.symmetry == form.symmetry for other in forms)
    return replace(
        block,
        resolution=max(other.resolution for other in forms),
        symmetry=_symmetry(form.symmetry, block.input_cov.device) if common else None,
    )


def _symmetry(note: dict[str, Any] | None, device: torch.device) -> GroupCirculant | None:
    if note is None:
        return None
    matrices = torch.tensor(note["matrices"], dtype=torch.float64)
    state = {**note, "matrices": matrices, "orbits": torch.tensor(note["orbits"])}
    return GroupCirculant.from_state(state, device)


# --- all sums as one list of tensors, and back


def _tensors(state: CurvatureState, used: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    fit = state.fit if state.n_data else state.fit.new_zeros(used[0]["fit"])
    base, parts = _split(state.curvature)
    return {"fit": fit, **_sums_of(base), **{f"parts of {n}": part for n, part in parts.items()}}


def _sums_of(curvature: Curvature) -> dict[str, Tensor]:
    if isinstance(curvature, FullCurvature):
        return {"matrix": curvature.matrix}
    blocks: Mapping[str, Any] = curvature.blocks if isinstance(curvature, BlockCurvature) else {}
    return {
        f"{name}/{field}": tensor
        for name, block in blocks.items()
        for field, tensor in block.tensors().items()
    }


def _with_sums(curvature: Curvature, sums: Mapping[str, Tensor]) -> Curvature:
    if isinstance(curvature, OutputCurvature):
        parts = {name: sums[f"parts of {name}"] for name in curvature.parts}
        return OutputCurvature(_with_sums(curvature.base, sums), parts)
    if isinstance(curvature, FullCurvature):
        return replace(curvature, matrix=sums["matrix"])
    assert isinstance(curvature, BlockCurvature)
    blocks: dict[str, Any] = dict(curvature.blocks)
    for name, block in blocks.items():
        found = {field: sums[f"{name}/{field}"] for field in block.tensors()}
        blocks[name] = replace(block, **found)
    return BlockCurvature(blocks)
