"""Readers of picture files: idx, CIFAR's two layouts, and folders of one class each.

Nothing is unpickled: CIFAR's pickled batches are scanned for their bytes and numbers.
"""

from __future__ import annotations

import gzip
import pickletools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from margeq.errors import DataError

__all__ = [
    "Source",
    "in_memory",
    "read_cifar_binary",
    "read_cifar_python",
    "read_folder",
    "read_idx",
]

_IDX_UINT8 = 8
_CIFAR_SIDE = 32
_CIFAR_PIXELS = 3 * _CIFAR_SIDE**2
_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # grey, 16 bits
_UNSCALED = ("I", "F")
_INTEGERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"}  # not: places in the memo


@dataclass(frozen=True)
class Source:
    """Pictures that are read when they are asked for.

    Attributes:
        labels: class indices of all pictures, int64, ``[n]``.
        read: from indices ``[m]`` to grey or colour values in [0, 1], float32,
            ``[m, channels, height, width]``.
        class_names: in the order of the indices.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def in_memory(pictures: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Source:
    """A source of bytes ``[n, channels, height, width]`` that are already here."""
    bytes_ = torch.from_numpy(pictures)
    return Source(
        torch.from_numpy(labels.astype(np.int64)),
        lambda indices: bytes_[indices].to(torch.float32) / 255,
        class_names,
    )


def read_idx(path: Path) -> np.ndarray:
    """The unsigned bytes of an idx file, gzipped or not.

    Args:
        path: such as ``train-images-idx3-ubyte`` or ``train-images-idx3-ubyte.gz``.

    Returns:
        An array with the shape that the file states.

    Raises:
        DataError: if the file is no idx file of unsigned bytes, or not all of one.

    Reference:
        LeCun, Cortes and Burges, The MNIST database of handwritten digits (file format).
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and get it again") from error
    # two zero bytes, the type, the number of axes; then each axis as a big-endian integer
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4").astype(int) if len(content) >= start else []
    is_idx = content[:3] == bytes([0, 0, _IDX_UINT8]) and axes > 0
    if not is_idx or len(content) != start + int(np.prod(shape)):
        raise DataError(
            f"{path} ({len(content)} bytes) is no complete idx file of unsigned bytes; delete it "
            f"and get it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_cifar_binary(
    path: Path, n_labels: int = 1, label: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``[n, 3, 32, 32]`` and labels ``[n]`` of a file of CIFAR's binary layout.

    Args:
        path: such as ``cifar-10-batches-bin/test_batch.bin``.
        n_labels: bytes of labels in front of each picture: 1, or 2 for CIFAR-100.
        label: which of them to return.

    Returns:
        Bytes and class indices, in the order of the file.

    Raises:
        DataError: if the file does not consist of records of the labels and 3,072 pixels.
    """
    content = np.fromfile(path, np.uint8)
    length = n_labels + _CIFAR_PIXELS
    if not len(content) or len(content) % length:
        raise DataError(
            f"{path} ({len(content)} bytes) does not consist of records of {length} bytes; delete "
            f"it and get it again"
        )
    records = content.reshape(-1, length)
    return records[:, n_labels:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE), records[:, label]


def read_cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``[n, 3, 32, 32]`` and labels ``[n]`` of a file of ``cifar-10-batches-py``.

    The file is a pickle of ``{"labels": [...], "data": array, ...}``. It is read as a list of
    instructions of which none is carried out: the labels are the integers after the key
    ``labels``, the pixels are the longest string.

    Returns:
        Bytes and class indices, in the order of the file.

    Raises:
        DataError: if there are not 3,072 pixels for each label.
    """
    labels: list[int] = []
    pixels = b""
    among_labels = False
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if isinstance(argument, (str, bytes, bytearray)) and opcode.name != "GLOBAL":
                among_labels = argument in ("labels", b"labels")
                pixels = max(pixels, _as_bytes(argument), key=len)
            elif among_labels and isinstance(argument, int) and opcode.name in _INTEGERS:
                labels.append(argument)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}; delete it and get it again") from error
    if not labels or len(pixels) != len(labels) * _CIFAR_PIXELS:
        raise DataError(
            f"{path} is no CIFAR-10 batch: {len(labels)} labels, {len(pixels)} bytes of pixels, "
            f"{_CIFAR_PIXELS} expected for each label; delete it and get it again"
        )
    pictures = np.frombuffer(pixels, np.uint8).reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    return pictures.copy(), np.asarray(labels)


def _as_bytes(argument: str | bytes | bytearray) -> bytes:
    # Python 2 wrote bytes as strings, which the scan decodes by this code
    if isinstance(argument, str):
        return argument.encode("latin-1", errors="replace")
    return bytes(argument)


def read_folder(root: Path) -> Source:
    """The pictures ``root/class_name/*.png|jpg|jpeg``, classes and files in order of their names.

    Returns:
        A source that decodes the pictures that are asked for.

    Raises:
        DataError: if there is no picture.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = {
        folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
        for folder in folders
    }
    files = {name: found for name, found in files.items() if found}
    if not files:
        raise DataError(
            f"no pictures in {root}; expected {root}/<class name>/*{'|'.join(_SUFFIXES)}"
        )
    paths = [path for found in files.values() for path in found]
    labels = [label for label, found in enumerate(files.values()) for _ in found]

    def read(indices: Tensor) -> Tensor:
        return _decoded([paths[index] for index in indices.tolist()], paths[0])

    return Source(torch.tensor(labels), read, tuple(files))


def _decoded(paths: list[Path], reference: Path) -> Tensor:
    """Pictures of the mode and the size of the reference, ``[n, channels, height, width]``."""
    with _image_module().open(reference) as picture:
        grey = picture.mode in ("1", "L", *_DEEP)
        mode, size = ("L" if grey else "RGB"), picture.size
    pictures = np.empty((len(paths), size[1], size[0], len(mode)), np.float32)
    for row, path in zip(pictures, paths, strict=True):
        try:
            with _image_module().open(path) as picture:
                if picture.size != size:
                    raise DataError(
                        f"{path} has {picture.size[0]}×{picture.size[1]} pixels, {reference} "
                        f"{size[0]}×{size[1]}; bring all pictures to one size first"
                    )
                row[:] = _values(picture, mode, path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}; remove this picture") from error
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def _values(picture: Any, mode: str, path: Path) -> np.ndarray:
    """Grey or colour values in [0, 1], float32, ``[height, width, 1 or 3]``."""
    if picture.mode in _UNSCALED:
        raise DataError(
            f"{path} has the mode {picture.mode!r}, whose largest value is not known; save it "
            f"with 8 bits"
        )
    if picture.mode in _DEEP:  # Pillow would cut off what exceeds 255
        return np.asarray(picture).astype(np.float32)[..., None] / 65535
    values = np.asarray(picture.convert(mode)).astype(np.float32) / 255
    return values.reshape(*values.shape[:2], len(mode))


def _image_module() -> Any:
    from PIL import Image  # lazy: only folders of pictures need it

    return Image
