"""Where MNIST and CIFAR come from: a given folder, ``MARGEQ_DATA``, or a checked download."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from margeq.data.formats import (
    Source,
    in_memory,
    read_cifar_binary,
    read_cifar_python,
    read_folder,
    read_idx,
)
from margeq.errors import ConfigError, DataError

__all__ = [
    "Folder",
    "LabelKind",
    "Part",
    "cifar10_source",
    "cifar100_source",
    "load_image_folder",
    "mnist_source",
]

Part = Literal["train", "test"]
LabelKind = Literal["fine", "coarse"]
Folder = str | os.PathLike[str]

_VARIABLE = "MARGEQ_DATA"
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_PREFIX = {"train": "train", "test": "t10k"}
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_MNIST_PLACES = ("MNIST/raw", "mnist", ".")
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
# the binary layout: the same pixels without pickles
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR_FILES = {
    "cifar-10-batches-bin": ("data_batch_{}.bin", "test_batch.bin", read_cifar_binary),
    "cifar-10-batches-py": ("data_batch_{}", "test_batch", read_cifar_python),
}
_CIFAR_FOLDERS = ("cifar10", "cifar10-jpeg", ".")
_CIFAR100_FOLDERS = ("cifar-100-binary", ".")
_CIFAR100_LABELS = ("coarse", "fine")  # in the order of a record's bytes
_CIFAR100_N_CLASSES = {"coarse": 20, "fine": 100}
_CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def load_image_folder(root: Folder) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """All pictures ``root/class_name/*.png|jpg|jpeg``; classes in the order of their names.

    Args:
        root: the folder; all pictures in it have one size. They are grey if the first one is.

    Returns:
        Pictures ``[n, channels, height, width]``, float32 in [0, 1]; labels ``[n]``, int64; and
        the names of the classes.

    Raises:
        DataError: if there are no pictures, one of another size, or one that cannot be decoded.
    """
    source = read_folder(Path(root))
    return source.read(torch.arange(len(source))), source.labels, source.class_names


def mnist_source(part: Part, data_dir: Folder | None = None, download: bool = True) -> Source:
    """One part of MNIST: 28×28 grey pictures of digits.

    Args:
        part: ``"train"`` (60,000) or ``"test"`` (10,000).
        data_dir: folder with the four idx files, gzipped or not, in it or in ``MNIST/raw``
            (torchvision's layout) or ``mnist``. None: the environment variable ``MARGEQ_DATA``,
            else the cache ``~/.cache/margeq``, which is filled by a download.
        download: whether the cache may be filled.

    Returns:
        Pictures ``[n, 1, 28, 28]`` and labels.

    Raises:
        DataError: if the files are not found, cannot be downloaded, or are broken.

    Reference:
        LeCun, Bottou, Bengio and Haffner (1998), Gradient-based learning applied to document
        recognition.
    """

    def find(root: Path) -> Source | None:
        prefix = _MNIST_PREFIX[part]
        paths = [
            _first_file(root, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        ]
        if paths[0] is None or paths[1] is None:
            return None
        images, labels = read_idx(paths[0]), read_idx(paths[1])
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{paths[0]} has the shape {images.shape}, {paths[1]} {labels.shape}")
        return in_memory(images[:, None], labels, tuple("0123456789"))

    def fill(cache: Path) -> None:
        for name, digest in _MNIST_SHA256.items():
            _download(f"{_MNIST_URL}{name}.gz", cache / "MNIST" / "raw" / f"{name}.gz", digest)

    wanted = "MNIST (MNIST/raw/train-images-idx3-ubyte, gzipped or not, and its three companions)"
    return _find("MNIST", wanted, find, fill if download else None, data_dir)


def cifar10_source(part: Part, data_dir: Folder | None = None, download: bool = True) -> Source:
    """One part of CIFAR-10: 32×32 colour pictures.

    Args:
        part: ``"train"`` (50,000) or ``"test"`` (10,000).
        data_dir: folder with ``cifar-10-batches-bin``, ``cifar-10-batches-py`` (torchvision's
            layout) or the pictures ``train/<class>/*`` and ``test/<class>/*``, these also below
            ``cifar10`` or ``cifar10-jpeg``. None: as for :func:`mnist_source`.
        download: whether the cache may be filled.

    Returns:
        Pictures ``[n, 3, 32, 32]`` and labels.

    Raises:
        DataError: if the files are not found, cannot be downloaded, or are broken.

    Reference:
        Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """

    def find(root: Path) -> Source | None:
        for folder, (train, test, read) in _CIFAR_FILES.items():
            names = [train.format(i) for i in range(1, 6)] if part == "train" else [test]
            paths = [root / folder / name for name in names]
            if all(path.is_file() for path in paths):
                pictures, labels = zip(*map(read, paths), strict=True)
                return in_memory(np.concatenate(pictures), np.concatenate(labels), _CIFAR_CLASSES)
        for folder in _CIFAR_FOLDERS:
            if (root / folder / part).is_dir():
                return read_folder(root / folder / part)
        return None

    def fill(cache: Path) -> None:
        archive = cache / _CIFAR_ARCHIVE
        _download(_CIFAR_URL + _CIFAR_ARCHIVE, archive, _CIFAR_SHA256)
        shutil.unpack_archive(archive, cache, filter="data")
        archive.unlink()

    wanted = "CIFAR-10 (cifar-10-batches-bin, cifar-10-batches-py, or train/<class>/ and test/)"
    return _find("CIFAR-10", wanted, find, fill if download else None, data_dir)


def cifar100_source(
    part: Part, labels: LabelKind = "fine", data_dir: Folder | None = None
) -> Source:
    """One part of CIFAR-100: 32×32 colour pictures. Never downloaded.

    Args:
        part: ``"train"`` (50,000) or ``"test"`` (10,000).
        labels: ``"fine"`` (100 classes) or ``"coarse"`` (20).
        data_dir: folder with ``train.bin`` and ``test.bin`` of the binary version, in it or in
            ``cifar-100-binary``; their ``*_label_names.txt`` name the classes. None: as for
            :func:`mnist_source`.

    Returns:
        Pictures ``[n, 3, 32, 32]`` and labels.

    Raises:
        ConfigError: for unknown labels.
        DataError: if the files are not found, or are broken.

    Reference:
        Krizhevsky (2009), Learning multiple layers of features from tiny images.
    """
    if labels not in _CIFAR100_LABELS:
        raise ConfigError(f"labels={labels!r}; choose one of {_CIFAR100_LABELS}")

    def find(root: Path) -> Source | None:
        for folder in _CIFAR100_FOLDERS:
            path = root / folder / f"{part}.bin"
            if path.is_file():
                pictures, indices = read_cifar_binary(path, 2, _CIFAR100_LABELS.index(labels))
                names = _label_names(path.parent / f"{labels}_label_names.txt", labels)
                if indices.max() >= len(names):
                    raise DataError(
                        f"{path} has the {labels} label {indices.max()}, but there are only "
                        f"{len(names)} classes; delete it and get it again"
                    )
                return in_memory(pictures, indices, names)
        return None

    wanted = "CIFAR-100's binary version (cifar-100-binary/train.bin and test.bin)"
    return _find("CIFAR-100", wanted, find, None, data_dir, never_downloaded=True)


def _label_names(path: Path, labels: LabelKind) -> tuple[str, ...]:
    """The classes by name where the file is, else by number."""
    if not path.is_file():
        return tuple(map(str, range(_CIFAR100_N_CLASSES[labels])))
    return tuple(path.read_text(encoding="utf-8").split())


def _find(
    name: str,
    wanted: str,
    find: Callable[[Path], Source | None],
    fill: Callable[[Path], None] | None,
    data_dir: Folder | None,
    never_downloaded: bool = False,
) -> Source:
    """What ``find`` finds in the given folder, else that of the environment, else the cache."""
    named = data_dir or os.environ.get(_VARIABLE)
    root = Path(named).expanduser() if named else Path.home() / ".cache" / "margeq"
    source = find(root)
    # only the cache is ours to write to
    if source is None and not named and fill is not None:
        fill(root)
        source = find(root)
    if source is None:
        ways = f"Pass data_dir=, set {_VARIABLE}, or leave both out with download=True"
        if never_downloaded:
            ways = f"It is never downloaded: get the files and pass data_dir=, or set {_VARIABLE}"
        raise DataError(f"{name} is not in {root}; looked for {wanted}. {ways}")
    return source


def _first_file(root: Path, name: str) -> Path | None:
    places = [root / place / (name + suffix) for place in _MNIST_PLACES for suffix in ("", ".gz")]
    return next((path for path in places if path.is_file()), None)


def _download(url: str, target: Path, sha256: str) -> None:
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # moves the file to its place after its digest was found right
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise DataError(
            f"cannot download {url} to {target}: {error}; get the file in another way and set "
            f"{_VARIABLE} or data_dir= to its folder"
        ) from error
