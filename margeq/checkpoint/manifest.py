"""What a checkpoint says about its own files, and how that is proven.

    {"body": {"format_version", "step", "score", "files": {name: {"size", "sha256"}},
              "environment"}, "sha256"}

The digest is that of the body. A manifest that is not byte for byte what would be written for its
content is refused, so that no bit of it can change unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from margeq.checkpoint import disk
from margeq.checkpoint.text import from_json, to_canonical_json
from margeq.errors import CheckpointCorrupt, CheckpointVersion

__all__ = ["FORMAT_VERSION", "MANIFEST", "FileEntry", "Manifest", "digest", "read_manifest"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**20
_FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\.(safetensors|json)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return sha256(data).hexdigest()


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        step: number of the checkpoint within its run.
        score: by which the best one is kept, or ``None``.
        files: name -> size and digest.
        environment: versions, dtype, threads, seed and the like, for the reader.
    """

    step: int
    score: float | None
    files: Mapping[str, FileEntry]
    environment: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The file."""
        body = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "score": None if self.score is None else float(self.score),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "environment": dict(self.environment),
        }
        return to_canonical_json({"body": body, "sha256": digest(to_canonical_json(body))})


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Returns:
        The manifest; nothing else in the directory has been looked at.

    Raises:
        CheckpointCorrupt: if it is missing, damaged, or names files outside its directory.
        CheckpointVersion: for an undamaged manifest of another format.
    """
    path = directory / MANIFEST
    data = disk.read_file(path, _LARGEST_MANIFEST)
    content = from_json(data, str(path))
    if not isinstance(content, dict) or content.keys() != {"body", "sha256"}:
        raise CheckpointCorrupt(f"{path} is no manifest")
    body = content["body"]
    if content["sha256"] != digest(_respelled(body)) or _respelled(content) != data:
        raise CheckpointCorrupt(f"{path} is damaged: its digest is not that of its content")
    version = body.get("format_version") if isinstance(body, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointVersion(
            f"{directory} has format {str(version)[:40]}, this version of margeq reads "
            f"{FORMAT_VERSION}; resume with the version that wrote it"
        )
    return _manifest(body, path)


def _respelled(content: Any) -> bytes:
    try:
        return to_canonical_json(content)
    except (ValueError, RecursionError):  # such as 1e999, which is read as infinity
        return b""


def _manifest(body: Mapping[str, Any], path: Path) -> Manifest:
    step, score = body.get("step"), body.get("score")
    files, environment = body.get("files"), body.get("environment")
    scored = score is None or (isinstance(score, float) and math.isfinite(score))
    if not (isinstance(step, int) and step >= 0 and scored):
        raise CheckpointCorrupt(f"{path} has no step, or a score that is no number")
    if not (isinstance(files, dict) and isinstance(environment, dict)):
        raise CheckpointCorrupt(f"{path} lacks files or environment")
    entries = {name: _entry(name, entry, path) for name, entry in files.items()}
    return Manifest(step, score, entries, environment)


def _entry(name: str, entry: Any, path: Path) -> FileEntry:
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointCorrupt(f"{path} names the file {name[:80]!r}, which no checkpoint has")
    if isinstance(entry, dict) and entry.keys() == {"size", "sha256"}:
        size, sha = entry["size"], entry["sha256"]
        if type(size) is int and size >= 0 and isinstance(sha, str) and _DIGEST.fullmatch(sha):
            return FileEntry(size, sha)
    raise CheckpointCorrupt(f"{path}: size or digest of {name!r} cannot be read")
