"""MNIST6, validation parts and CIFAR-100, on small stand-ins and on the real files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from margeq.data import ImageTask, cifar100, mnist6_180, mnist6_mirror
from margeq.errors import ConfigError, DataError
from tests.data_files import binary, colours, same, toy, write_idx

SIXES = [mnist6_180, mnist6_mirror]
N_TRAIN, N_TEST = 80, 20  # every other one is a six


def top_heavy(n, seed):
    """Ink in the upper half, a little to the left; the first pixel of it tells them apart."""
    pictures = np.zeros((n, 28, 28), np.uint8)
    pictures[:, 6:10, 11:15] = 200
    pictures[:, 6, 8] = np.random.default_rng(seed).permutation(256)[:n]
    return pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sixes")
    for seed, (prefix, n) in enumerate([("train", N_TRAIN), ("t10k", N_TEST)]):
        write_idx(root / f"{prefix}-images-idx3-ubyte", top_heavy(n, seed))
        write_idx(root / f"{prefix}-labels-idx1-ubyte", np.tile([6, 3], n // 2).astype(np.uint8))
    return root


def all_parts(task):
    """Pictures and labels of every part."""
    return [
        (task.train_images, task.train_labels),
        (task.validation_images, task.validation_labels),
        (task.test_images, task.test_labels),
    ]


def identity(pictures):
    """A number that turning and mirroring by whole pixels leave alone."""
    return pictures.sum((1, 2, 3)).mul(255).round().long().tolist()


@pytest.mark.parametrize("task", SIXES)
def test_every_six_is_in_one_part_and_no_other_digit_is(data, task):
    split = task(data_dir=data, n_validation=15)
    assert [len(labels) for _, labels in all_parts(split)] == [25, 15, 10]
    assert len(task(data_dir=data, n_validation=None).train_images) == 40
    whole = mnist6_mirror(data_dir=data, n_validation=15)
    originals = [torch.tensor(top_heavy(n, k)[::2]).sum((1, 2)) for k, n in enumerate((80, 20))]
    (train, _), (validation, _), (test, _) = all_parts(whole)
    assert sorted(identity(train) + identity(validation)) == sorted(originals[0].tolist())
    assert sorted(identity(test)) == sorted(originals[1].tolist())


def test_upright_sixes_have_their_weight_above_the_middle(data):
    task = mnist6_180(data_dir=data, n_validation=15)
    assert task.class_names == ("upside down", "upright")
    height = torch.arange(28.0)[:, None] - 13.5
    for images, labels in all_parts(task):
        below = (images[:, 0] * height).sum((1, 2)) / images.sum((1, 2, 3))
        # the block is a little to the left: 3 to 6 degrees around a quarter turn say nothing
        sure = below.abs() > 1.0
        assert sure.float().mean() > 0.7
        assert torch.equal((below < 0).long()[sure], labels[sure])
        assert 0 < labels.float().mean() < 1


def test_half_turns_are_exact_and_told_apart(data):
    plain = [torch.tensor(top_heavy(n, k)[::2]) / 255 for k, n in enumerate((80, 20))]
    task = mnist6_180(data_dir=data, n_validation=None, turns="half")
    for originals, (images, labels) in zip(plain, all_parts(task)[::2], strict=True):
        turned = torch.where((labels == 0)[:, None, None], originals.flip(1, 2), originals)
        torch.testing.assert_close(images[:, 0], turned, rtol=0, atol=1e-4)
        assert 0 < labels.float().mean() < 1
    with pytest.raises(ConfigError, match="turns='quarter'"):
        mnist6_180(data_dir=data, turns="quarter")


def test_turns_go_all_round_the_circle(data):
    pictures = mnist6_180(data_dir=data, n_validation=None).train_images[:, 0]
    x = torch.arange(28.0) - 13.5
    angles = torch.atan2((pictures * x[:, None]).sum((1, 2)), (pictures * x).sum((1, 2)))
    sixths = (angles / (torch.pi / 3)).floor().long()
    assert torch.bincount(sixths + 3, minlength=6).min() >= 2  # of 40
    assert len(angles.unique()) == 40


def test_mirrored_sixes_are_mirrored(data):
    task = mnist6_mirror(data_dir=data, n_validation=None)
    upright = torch.tensor(top_heavy(80, 0)[::2])[:, None] / 255
    mirrored = task.train_labels.bool()
    assert task.class_names == ("plain", "mirrored")
    assert 8 < int(mirrored.sum()) < 32
    assert torch.equal(task.train_images[~mirrored], upright[~mirrored])
    assert torch.equal(task.train_images[mirrored], upright[mirrored].flip(3))


@pytest.mark.parametrize("task", SIXES)
def test_numbers_and_seeds(data, task):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    few = task(14, data, n_train=5, n_test=3, n_validation=10, seed=3)
    many = task(14, data, n_train=9, n_validation=10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert few.train_images.shape == (5, 1, 14, 14)
    assert len(few.test_images) == 3
    assert torch.equal(few.train_images, many.train_images[:5])
    assert torch.equal(few.validation_images, many.validation_images)
    assert same(few, task(14, data, n_train=5, n_test=3, n_validation=10, seed=3))
    assert not same(few, task(14, data, n_train=5, n_test=3, n_validation=10, seed=4))
    for n_validation in (40, 0, 2.5):
        with pytest.raises(ConfigError, match=f"n_validation={n_validation}, but there are 40"):
            task(data_dir=data, n_validation=n_validation)
    with pytest.raises(ConfigError, match="n_train=31, but there are 30"):
        task(data_dir=data, n_train=31, n_validation=10)


def test_files_without_a_six_are_refused(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", top_heavy(2, 0))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.array([1, 2], np.uint8))
    with pytest.raises(DataError, match="no six among 2 digits"):
        mnist6_180(data_dir=tmp_path)


# --- validation parts


def test_validation_takes_training_pictures_away():
    task = toy().with_validation(6, seed=1)
    numbers = task.train_images[:, 0, 0, 0].tolist(), task.validation_images[:, 0, 0, 0].tolist()
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 21))
    assert (len(numbers[0]), numbers[0]) == (14, sorted(numbers[0]))
    assert torch.equal((task.validation_images[:, 0, 0, 0].long() - 1) % 4, task.validation_labels)
    ((images, labels),) = task.validation_loader(10)
    assert torch.equal(images, task.validation_images)
    assert torch.equal(labels, task.validation_labels)
    assert torch.equal(task.test_images, toy().test_images)
    other = toy().with_validation(6, seed=2)
    assert not torch.equal(task.validation_images, other.validation_images)
    assert torch.equal(task.subset(3).validation_images, task.validation_images)
    assert toy(2, 1).with_validation(1).n_classes == 3
    with pytest.raises(ConfigError, match="has validation pictures already"):
        task.with_validation(2)
    with pytest.raises(ConfigError, match="'toy' has no validation pictures"):
        toy().validation_loader(2)


def test_validation_pictures_are_standardised_by_the_training_pictures():
    task = toy().with_validation(6)
    standard = task.standardised()
    mean, deviation = task.train_images.mean(), task.train_images.std()
    torch.testing.assert_close(
        standard.validation_images, (task.validation_images - mean) / deviation
    )
    assert toy().standardised().validation_images is None


def test_unequal_validation_parts_are_refused():
    images, labels = torch.rand(4, 1, 3, 3), torch.arange(4)

    def task(*validation):
        return ImageTask(images, labels, images, labels, "toy", (), *validation)

    assert task(images, torch.arange(4) + 3).n_classes == 7
    with pytest.raises(DataError, match="validation takes both"):
        task(images)
    with pytest.raises(DataError, match=r"validation pictures .* and labels"):
        task(images, labels[:3])
    with pytest.raises(DataError, match=r"validation pictures \(1, 3, 2\)"):
        task(images[..., 1:], labels)


# --- CIFAR-100


def write_cifar100(root: Path, largest: int = 99) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(["train", "test"]):
        pictures = colours(4, seed)
        fine = binary(pictures, [0, 7, 50, largest])
        coarse = [19, 3, 0, 1]
        records = np.frombuffer(fine, np.uint8).reshape(4, -1)
        both = np.concatenate([np.array(coarse, np.uint8)[:, None], records], axis=1)
        (root / f"{part}.bin").write_bytes(both.tobytes())


@pytest.mark.parametrize("place", ["cifar-100-binary", "."])
def test_cifar100_is_read_from_both_places(tmp_path, place):
    write_cifar100(tmp_path / place)
    fine, coarse = cifar100(data_dir=tmp_path), cifar100(data_dir=tmp_path, labels="coarse")
    assert fine.train_labels.tolist() == [0, 7, 50, 99]
    assert coarse.test_labels.tolist() == [19, 3, 0, 1]
    assert (fine.n_classes, coarse.n_classes) == (100, 20)
    for seed, images in enumerate((fine.train_images, coarse.test_images)):
        assert np.array_equal((images * 255).round().byte().numpy(), colours(4, seed))
    assert cifar100(16, tmp_path, n_train=2, n_test=1).train_images.shape == (2, 3, 16, 16)


def test_cifar100_classes_have_names_where_the_file_is(tmp_path):
    write_cifar100(tmp_path)
    names = [f"thing_{k}" for k in range(100)]
    (tmp_path / "fine_label_names.txt").write_text("\n".join(names) + "\n\n")
    assert cifar100(data_dir=tmp_path).class_names == tuple(names)
    assert cifar100(data_dir=tmp_path, labels="coarse").class_names[:2] == ("0", "1")


def test_cifar100_that_is_not_there_or_broken(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="labels='middle'; choose one of"):
        cifar100(data_dir=tmp_path, labels="middle")
    with pytest.raises(DataError, match=r"CIFAR-100 is not in .*never downloaded: get the files"):
        cifar100(data_dir=tmp_path)
    write_cifar100(tmp_path, largest=100)
    with pytest.raises(DataError, match="fine label 100, but there are only 100 classes"):
        cifar100(data_dir=tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"records of 3074 bytes"):
        cifar100(data_dir=tmp_path)
    monkeypatch.setenv("MARGEQ_DATA", str(tmp_path / "elsewhere"))
    write_cifar100(tmp_path / "elsewhere")
    assert len(cifar100().train_images) == 4


# --- the real files


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("MARGEQ_DATA")
    if not folder:
        pytest.skip("MARGEQ_DATA names no folder with MNIST")
    return Path(folder)


@pytest.mark.parametrize("task", SIXES)
def test_real_sixes(real_data, task):
    sixes = task(14, real_data)
    assert [len(labels) for _, labels in all_parts(sixes)] == [5000, 918, 958]
    assert sixes.train_images.shape[1:] == (1, 14, 14)
    for _, labels in all_parts(sixes):
        assert 0.45 < float(labels.float().mean()) < 0.55
