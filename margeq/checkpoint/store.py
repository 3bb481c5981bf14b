"""Checkpoints of one run in one directory: complete or not there, verified before they are used.

A checkpoint is written under a temporary name, brought to the disk file by file, and renamed; a
crash at any moment leaves the ones before it as they are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from margeq.checkpoint import disk
from margeq.checkpoint.manifest import MANIFEST, FileEntry, Manifest, digest, read_manifest
from margeq.checkpoint.tensors import decode_tensors, encode_tensors
from margeq.checkpoint.text import from_json, to_canonical_json
from margeq.checkpoint.trees import from_plain, to_plain
from margeq.errors import CheckpointCorrupt, CheckpointError, CheckpointWarning

__all__ = ["Checkpoint", "CheckpointStore"]

_STATE = "state.json"
_STEP = re.compile(r"step-(\d{6,12})")
_SECTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEMPORARY = ".tmp-"
_LARGEST_FILE = 2**40


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified.

    Attributes:
        step: its number.
        state: section name -> nested state.
        environment: versions, dtype, threads, seed and the like of the process that wrote it.
    """

    step: int
    state: dict[str, Any]
    environment: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints ``step-000120`` of a run directory.

    Args:
        directory: of one run; hold its :func:`run_lock` while writing.
        keep: how many of the newest to keep, besides the one of the best score.

    Raises:
        CheckpointError: if ``keep`` is no positive integer.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(Path(tempfile.mkdtemp()))
        >>> _ = store.save(7, {"model": {"weight": torch.ones(2)}, "place": {"epoch": 3}})
        >>> store.load_latest().state
        {'model': {'weight': tensor([1., 1.])}, 'place': {'epoch': 3}}
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        if type(keep) is not int or keep < 1:
            raise CheckpointError(f"keep={keep!r} must be an integer of at least 1")
        self.directory, self._keep = Path(directory), keep

    def steps(self) -> list[int]:
        """Numbers of the checkpoints that are there, valid or not, in ascending order."""
        try:
            entries = list(self.directory.iterdir())
        except OSError:
            return []
        found = (_STEP.fullmatch(e.name) for e in entries if e.is_dir() and not e.is_symlink())
        return sorted(int(match[1]) for match in found if match)

    # -- writing ---------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            step: its number; larger is newer.
            state: section name -> nested state of plain values and tensors.
            score: the best one is kept.
            environment: plain values to note beside versions and threads.

        Returns:
            Its directory.

        Raises:
            CheckpointError: for a state that cannot be stored without pickle.
            OSError: if it cannot be written; what was there before is still there.
        """
        files = _encode(state)
        entries = {name: FileEntry(len(data), digest(data)) for name, data in files.items()}
        manifest = Manifest(step, score, entries, _versions() | dict(environment or {}))
        target = self._path(step)
        temporary = self._temporary()
        try:
            disk.make_directory(temporary)
            for name, data in files.items():
                disk.write_file(temporary / name, data)
            disk.write_file(temporary / MANIFEST, manifest.to_bytes())
            disk.sync_directory(temporary)
            if target.exists():  # damaged, or of a run that is written anew
                self._discard(target)
            disk.rename(temporary, target)
        except BaseException:
            disk.remove_tree(temporary)
            raise
        disk.sync_directory(self.directory)
        self._prune()
        return target

    def clean(self) -> None:
        """Remove what killed processes left unfinished."""
        for path in self.directory.glob(f"{_TEMPORARY}*"):
            if path.is_dir() and not path.is_symlink():
                disk.remove_tree(path)

    def clear(self) -> None:
        """Remove all checkpoints."""
        for step in reversed(self.steps()):
            self._discard(self._path(step))

    def _prune(self) -> None:
        steps = self.steps()
        scores = {step: self._score(step) for step in steps}
        best = max(steps, key=lambda step: (scores[step], -step))
        for step in steps[: -self._keep]:
            if step != best or scores[step] == -float("inf"):
                self._discard(self._path(step))

    def _score(self, step: int) -> float:
        try:
            score = read_manifest(self._path(step)).score
        except CheckpointError:
            score = None
        return -float("inf") if score is None else score

    def _discard(self, path: Path) -> None:
        # renamed first: a checkpoint is there as a whole, or not at all
        temporary = self._temporary()
        disk.rename(path, temporary)
        disk.remove_tree(temporary)

    # -- reading ---------------------------------------------------------------------------------

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint: manifest, sizes, digests, headers, and only then values.

        Returns:
            Its state, on the CPU.

        Raises:
            CheckpointCorrupt: if anything is missing, damaged, or not what it should be.
            CheckpointVersion: if it has another format.
        """
        directory = self._path(step)
        if directory.is_symlink() or not directory.is_dir():
            raise CheckpointCorrupt(f"{directory} is no directory")
        manifest = read_manifest(directory)
        if manifest.step != step or _STATE not in manifest.files:
            raise CheckpointCorrupt(f"{directory} holds step {manifest.step}, or no {_STATE}")
        files = {name: _verified(directory / name, e) for name, e in manifest.files.items()}
        return Checkpoint(step, _decode(files, directory), manifest.environment)

    def load_latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is undamaged, with a warning about newer ones.

        Returns:
            The checkpoint, or ``None`` if there are none at all.

        Raises:
            CheckpointCorrupt: if all of them are damaged.
            CheckpointVersion: if the newest undamaged one has another format.
        """
        failure: CheckpointCorrupt | None = None
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except CheckpointCorrupt as error:
                failure = failure or error
                continue
            if failure is not None:
                warnings.warn(
                    f"{failure}; going back to the checkpoint before it, {self._path(step).name}",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return found
        if failure is not None:
            raise CheckpointCorrupt(
                f"no checkpoint in {self.directory} can be trusted ({failure}); start anew with "
                f"resume=False"
            )
        return None

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _temporary(self) -> Path:
        return self.directory / f"{_TEMPORARY}{uuid4().hex}"


def _verified(path: Path, entry: FileEntry) -> bytes:
    data = disk.read_file(path, _LARGEST_FILE, entry.size)
    if digest(data) != entry.sha256:
        raise CheckpointCorrupt(f"{path} is damaged: its SHA-256 is not that of its manifest")
    return data


def _encode(state: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> bytes: one file of tensors per section, and one of everything else."""
    plain, files = {}, {}
    for section, part in state.items():
        if not _SECTION.fullmatch(section):
            raise CheckpointError(f"section {section!r}: use small letters, digits and _")
        plain[section], tensors = to_plain(part, section)
        if tensors:
            files[f"{section}.safetensors"] = encode_tensors(tensors)
    files[_STATE] = to_canonical_json(plain)
    return files


def _decode(files: Mapping[str, bytes], directory: Path) -> dict[str, Any]:
    plain = from_json(files[_STATE], str(directory / _STATE))
    if not isinstance(plain, dict):
        raise CheckpointCorrupt(f"{directory / _STATE} is a {type(plain).__name__}")
    names = {f"{section}.safetensors": section for section in plain}
    unknown = files.keys() - names.keys() - {_STATE}
    if unknown:
        raise CheckpointCorrupt(f"{directory} holds {sorted(unknown)}, which no section is about")
    tensors: dict[str, dict[str, Any]] = {section: {} for section in plain}
    for name, section in names.items():
        if name in files:
            tensors[section] = decode_tensors(files[name], str(directory / name))
    return {section: from_plain(part, tensors[section]) for section, part in plain.items()}


def _versions() -> dict[str, Any]:
    try:
        margeq = version("margeq")
    except PackageNotFoundError:  # run from its sources
        margeq = "unknown"
    return {"margeq": margeq, "torch": torch.__version__, "threads": torch.get_num_threads()}
