"""MNIST, CIFAR-10 and folders of pictures: every layout, every place, and what is broken."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from margeq.data import cifar10, load_image_folder, mnist, rotated_cifar10, sources
from margeq.data.formats import read_cifar_python
from margeq.errors import DataError
from tests.data_files import (
    CLASSES,
    LAYOUTS,
    colours,
    digits,
    pickled_by_python_2,
    same,
    write_cifar,
    write_folder,
    write_idx,
    write_mnist,
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An own cache folder, and no folder from the environment."""
    monkeypatch.delenv("MARGEQ_DATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("place", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_from_every_place(tmp_path, place, suffix):
    write_mnist(tmp_path, place, suffix)
    task = mnist(size=28, data_dir=tmp_path)
    assert torch.equal((task.train_images[:, 0] * 255).round().byte(), torch.tensor(digits(40, 0)))
    assert torch.equal((task.test_images[:, 0] * 255).round().byte(), torch.tensor(digits(12, 1)))
    assert task.train_labels.tolist() == [k % 10 for k in range(40)]
    assert task.train_images.dtype == torch.float32
    assert task.train_labels.dtype == torch.int64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar_is_read_from_every_layout(tmp_path, layout):
    write_cifar(tmp_path, layout)
    task = cifar10(data_dir=tmp_path)
    expected = np.concatenate([colours(4, seed) for seed in range(5)])
    assert np.array_equal((task.train_images * 255).round().byte().numpy(), expected)
    assert task.train_labels.tolist() == [(s + k) % 10 for s in range(5) for k in range(4)]
    assert task.test_labels.tolist() == [5, 6, 7, 8]
    assert task.class_names == CLASSES


def test_handmade_pickle_is_a_pickle():
    content = pickle.loads(pickled_by_python_2(colours(2, 0), [3, 4]), encoding="bytes")
    assert content[b"labels"] == [3, 4]
    assert content[b"data"] == colours(2, 0).tobytes()


def test_no_instruction_of_a_pickle_is_carried_out(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "trap").touch, ()

    path = tmp_path / "data_batch_1"
    content = {"trap": Trap(), "labels": [1, 2], "data": colours(2, 0).reshape(2, -1)}
    path.write_bytes(pickle.dumps(content))
    assert read_cifar_python(path)[1].tolist() == [1, 2]
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("below", ["cifar10", "cifar10-jpeg", "."])
def test_cifar_is_read_from_picture_folders(tmp_path, below):
    for part in ("train", "test"):
        write_folder(tmp_path / below / part, CLASSES)
    task = cifar10(data_dir=tmp_path, n_test=7)
    assert task.train_images.shape == (30, 3, 32, 32)
    assert len(task.test_images) == 7
    assert torch.equal(task.train_labels, torch.arange(10).repeat_interleave(3))
    assert np.array_equal((task.train_images[3] * 255).round().numpy(), colours(3, 1)[0])


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
def test_image_folder(tmp_path, mode, channels, suffix):
    write_folder(tmp_path, mode=mode, suffix=suffix)
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    images, labels, names = load_image_folder(tmp_path)
    assert names == ("ant", "bee")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.shape == (6, channels, 32, 32)
    if suffix == ".png":
        expected = colours(3, 1)[:, :channels]
        assert np.array_equal((images[3:] * 255).round().numpy(), expected)


def test_grey_pictures_of_16_bits_keep_their_values(tmp_path):
    write_folder(tmp_path, names=("ant",), mode="L")
    (tmp_path / "bee").mkdir()
    grey = np.random.default_rng(0).integers(0, 2**16, (32, 32)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "bee" / "0.png")
    images, *_ = load_image_folder(tmp_path)  # among pictures of 8 bits
    assert np.array_equal((images[-1, 0] * 65535).round().numpy(), grey)
    assert np.array_equal((images[:3] * 255).round().numpy(), colours(3, 0)[:, :1])
    alone, *_ = load_image_folder(_moved(tmp_path / "bee", tmp_path / "deep" / "bee").parent)
    assert torch.equal(alone[0], images[-1])
    write_folder(tmp_path / "colours", names=("ant",))
    _moved(tmp_path / "deep" / "bee", tmp_path / "colours" / "bee")
    among_colours, *_ = load_image_folder(tmp_path / "colours")
    assert torch.equal(among_colours[-1], images[-1].expand(3, -1, -1))


def test_pictures_of_unknown_range_are_refused(tmp_path):
    write_folder(tmp_path, names=("ant",), mode="L")
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "ant" / "0.png", format="TIFF")
    with pytest.raises(DataError, match=r"ant/0.png has the mode 'F'.*8 bits"):
        load_image_folder(tmp_path)


def _moved(source, target):
    target.parent.mkdir(exist_ok=True)
    return shutil.move(source, target)


def test_broken_image_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no pictures in .*<class name>"):
        load_image_folder(tmp_path / "nowhere")
    write_folder(tmp_path / "a", size=32)
    write_folder(tmp_path / "b", names=("cat",), size=16)
    shutil.move(tmp_path / "b" / "cat", tmp_path / "a" / "cat")
    with pytest.raises(DataError, match=r"cat/0.png has 16×16 pixels"):
        load_image_folder(tmp_path / "a")
    (tmp_path / "a" / "ant" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read .*ant/1.png"):
        load_image_folder(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x09abc", b"\0\0\x0d\x01\0\0\0\0"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_idx_files_are_named(tmp_path, content, suffix):
    write_mnist(tmp_path, suffix=suffix)
    (tmp_path / "MNIST" / "raw" / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.* get it again"):
        mnist(data_dir=tmp_path)


@pytest.mark.parametrize("layout", ["binary", "protocol 5"])
def test_broken_cifar_files_are_named(tmp_path, layout):
    write_cifar(tmp_path, layout)
    path = next(tmp_path.rglob("data_batch_3*"))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"data_batch_3.* get it again"):
        cifar10(data_dir=tmp_path)


def test_argument_goes_before_environment_and_cache(tmp_path, home, monkeypatch):
    for name in ("argument", "environment", "home/.cache/margeq"):
        write_mnist(tmp_path / name)
    marked = tmp_path / "environment" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(marked, np.full(12, 7, np.uint8))
    cached = home / ".cache" / "margeq" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(cached, np.full(12, 8, np.uint8))
    assert mnist().test_labels.unique().tolist() == [8]
    monkeypatch.setenv("MARGEQ_DATA", str(tmp_path / "environment"))
    assert mnist().test_labels.unique().tolist() == [7]
    assert len(mnist(data_dir=tmp_path / "argument").test_labels.unique()) == 10


@pytest.mark.parametrize(("task", "name"), [(mnist, "MNIST"), (rotated_cifar10, "CIFAR-10")])
def test_missing_data_are_named_with_the_ways_out(tmp_path, home, task, name):
    with pytest.raises(
        DataError, match=rf"{name} is not in .*margeq; .*data_dir=, set MARGEQ_DATA"
    ):
        task(download=False)
    assert not home.exists()
    # a folder that the user named is not written to
    with pytest.raises(DataError, match=rf"{name} is not in {tmp_path}/empty"):
        task(data_dir=tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def serve(monkeypatch, folder: Path, files: list[Path]) -> None:
    """Downloads come from ``folder``, with the digests of what lies there."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    url = f"file://{folder}/"
    monkeypatch.setattr(sources, "_MNIST_URL", url)
    monkeypatch.setattr(sources, "_CIFAR_URL", url)
    stems = {name.removesuffix(".gz"): digest for name, digest in digests.items()}
    monkeypatch.setattr(sources, "_MNIST_SHA256", stems)
    monkeypatch.setattr(sources, "_CIFAR_SHA256", digests.get(sources._CIFAR_ARCHIVE, ""))


def test_mnist_is_downloaded_into_the_cache(tmp_path, home, monkeypatch, capfd):
    write_mnist(tmp_path / "server", ".", ".gz")
    serve(monkeypatch, tmp_path / "server", sorted((tmp_path / "server").iterdir()))
    first = mnist()
    shutil.rmtree(tmp_path / "server")
    assert same(mnist(), first)
    assert len(list((home / ".cache/margeq/MNIST/raw").iterdir())) == 4
    assert capfd.readouterr() == ("", "")


def test_cifar_is_downloaded_into_the_cache(tmp_path, home, monkeypatch):
    write_cifar(tmp_path / "content", "binary")
    archive = tmp_path / "cifar-10-binary"
    made = shutil.make_archive(str(archive), "gztar", tmp_path / "content")
    serve(monkeypatch, tmp_path, [Path(made)])
    assert same(cifar10(), cifar10(data_dir=tmp_path / "content"))
    assert [path.name for path in (home / ".cache/margeq").iterdir()] == ["cifar-10-batches-bin"]


def test_a_download_with_another_digest_is_refused(tmp_path, home, monkeypatch):
    write_mnist(tmp_path / "server", ".", ".gz")
    serve(monkeypatch, tmp_path / "server", sorted((tmp_path / "server").iterdir()))
    path = tmp_path / "server" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match=r"cannot download .*t10k-images.*invalid hash"):
        mnist()
    assert "t10k-images-idx3-ubyte.gz" not in {p.name for p in home.rglob("*")}
