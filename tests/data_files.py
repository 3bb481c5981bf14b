"""Small files in the layouts of MNIST, CIFAR-10 and folders of pictures, and a small task."""

from __future__ import annotations

import gzip
import pickle
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from margeq.data import ImageTask

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PARTS = [("train", "train", 40), ("test", "t10k", 12)]


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(content + array.tobytes()))


def digits(n: int, seed: int) -> np.ndarray:
    """Bytes with MNIST's empty margin of four pixels; the first pixels inside tell them apart."""
    pictures = np.zeros((n, 28, 28), np.uint8)
    pictures[:, 4:24, 4:24] = np.random.default_rng(seed).integers(100, 256, (n, 20, 20))
    return pictures


def write_mnist(root: Path, place: str = "MNIST/raw", suffix: str = "") -> None:
    for seed, (_, prefix, n) in enumerate(PARTS):
        write_idx(root / place / f"{prefix}-images-idx3-ubyte{suffix}", digits(n, seed))
        labels = (np.arange(n) % 10).astype(np.uint8)
        write_idx(root / place / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


def colours(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32)).astype(np.uint8)


def binary(pictures: np.ndarray, labels: list[int]) -> bytes:
    pairs = zip(labels, pictures, strict=True)
    return b"".join(bytes([label]) + picture.tobytes() for label, picture in pairs)


def pickled_by_python_2(pictures: np.ndarray, labels: list[int]) -> bytes:
    """Short strings and lists in parts, as in the published files; the array is its bytes."""
    halves = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    listed = b"".join(b"(" + b"".join(b"K" + bytes([k]) for k in half) + b"e" for half in halves)
    data = b"T" + struct.pack("<i", pictures.size) + pictures.tobytes()
    start = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x0ftraining batch q\x03"
    return start + b"U\x06labelsq\x04]q\x05" + listed + b"U\x04data" + data + b"u."


def pickled(protocol: int, pictures: np.ndarray, labels: list[int]) -> bytes:
    content = {"labels": labels, "data": pictures.reshape(len(pictures), -1), "batch_label": "7"}
    return pickle.dumps(content, protocol)


LAYOUTS = {
    "binary": ("cifar-10-batches-bin", ".bin", binary),
    "python 2": ("cifar-10-batches-py", "", pickled_by_python_2),
    "protocol 2": ("cifar-10-batches-py", "", partial(pickled, 2)),
    "protocol 5": ("cifar-10-batches-py", "", partial(pickled, 5)),
}


def write_cifar(root: Path, layout: str) -> None:
    folder, suffix, content = LAYOUTS[layout]
    (root / folder).mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(seed + k) % 10 for k in range(4)]
        (root / folder / (name + suffix)).write_bytes(content(colours(4, seed), labels))


def write_folder(root: Path, names=("ant", "bee"), mode="RGB", suffix=".png", size=32) -> None:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k, picture in enumerate(colours(3, seed)[:, :, :size, :size]):
            array = picture[0] if mode == "L" else picture.transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(array)).save(root / name / f"{k}{suffix}")


def toy(n_train: int = 20, n_test: int = 6, channels: int = 1) -> ImageTask:
    """Pictures whose pixels all show the picture's index, plus one."""
    images = torch.arange(1.0, n_train + n_test + 1)[:, None, None, None]
    images = images.repeat(1, channels, 6, 5)
    labels = torch.arange(n_train + n_test) % 4
    return ImageTask(
        images[:n_train], labels[:n_train], images[n_train:], labels[n_train:], name="toy"
    )


def same(a: ImageTask, b: ImageTask) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
