"""Tasks on small stand-ins of MNIST and CIFAR-10, and on the real ones where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from margeq.data import (
    ImageTask,
    cifar10,
    mnist,
    quadrant_mnist,
    rotated_cifar10,
    rotated_mnist,
    translated_mnist,
)
from margeq.data.geometry import resized, rotated, shifted
from margeq.errors import ConfigError, DataError
from tests.data_files import CLASSES, digits, same, toy, write_cifar, write_mnist

DIGIT_TASKS = [quadrant_mnist, mnist, translated_mnist, rotated_mnist]
TASKS = [*DIGIT_TASKS, cifar10, rotated_cifar10]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with little MNIST and CIFAR-10."""
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    write_cifar(root, "binary")
    return root


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("MARGEQ_DATA")
    if not folder:
        pytest.skip("MARGEQ_DATA names no folder with MNIST and CIFAR-10")
    return Path(folder)


def centres(pictures):
    """Centres of mass ``[n, 2]`` as (y, x), in pixels."""
    position = torch.arange(float(pictures.shape[-1]))
    mass = pictures.sum((1, 2, 3))
    y = (pictures.sum((1, 3)) * position).sum(1) / mass
    x = (pictures.sum((1, 2)) * position).sum(1) / mass
    return torch.stack([y, x], dim=1)


@pytest.mark.parametrize("task", TASKS)
def test_task_depends_on_the_seed_alone(data, task):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = task(data_dir=data, seed=3, n_train=10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    assert same(first, task(data_dir=data, seed=3, n_train=10))
    assert not same(first, task(data_dir=data, seed=4, n_train=10))
    assert 0 <= first.train_images.min()
    assert first.train_images.max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_small_task_is_the_beginning_of_a_larger_one(data, task):
    small = task(data_dir=data, n_train=5, n_test=2, size=16)
    large = task(data_dir=data, n_train=9, size=16)
    assert small.train_images.shape[-2:] == (16, 16)
    assert torch.equal(small.train_images, large.train_images[:5])
    everything = {tuple(picture.flatten().tolist()) for picture in large.test_images}
    assert all(tuple(picture.flatten().tolist()) in everything for picture in small.test_images)


@pytest.mark.parametrize("size", [16, 24, 32, 56])
@pytest.mark.parametrize("antialias", [False, True])
def test_all_ink_lies_in_the_labelled_quadrant(data, size, antialias):
    task = quadrant_mnist("digit+quadrant", size, data, antialias=antialias)
    assert task.n_classes == 40
    half = size // 2
    for images, labels in (
        (task.train_images, task.train_labels),
        (task.test_images, task.test_labels),
    ):
        quarters = [images[..., y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        mass = torch.stack([quarter.sum((1, 2, 3)) for quarter in quarters], dim=1)
        assert torch.equal(mass.argmax(1), labels // 10)
        assert torch.equal(mass.amax(1), mass.sum(1))
        assert set((labels // 10).tolist()) == {0, 1, 2, 3}


def test_quadrant_labels_keep_the_digit_and_both_questions_share_pictures(data):
    where = quadrant_mnist("digit+quadrant", 56, data)
    what = quadrant_mnist("digit", 56, data)
    assert what.n_classes == 10
    assert torch.equal(where.train_images, what.train_images)
    assert torch.equal(where.train_labels % 10, what.train_labels)
    assert (where.class_names[0], where.class_names[37]) == ("0 upper left", "7 lower right")
    originals = torch.tensor(digits(40, 0))
    for picture, label, digit in zip(
        where.train_images, where.train_labels, originals, strict=True
    ):
        y, x = 28 * (label // 20), 28 * (label // 10 % 2)
        assert torch.equal((picture[0, y : y + 28, x : x + 28] * 255).round().byte(), digit)


def test_held_out_pictures_come_from_the_test_part(data):
    task = quadrant_mnist("digit", 56, data)
    half = task.test_images.reshape(12, 2, 28, 2, 28).sum((1, 3))
    assert torch.equal((half * 255).round().byte(), torch.tensor(digits(12, 1)))


@pytest.mark.parametrize("shift", [(3, -2), (-5, 0)])
def test_whole_shifts_move_pixels(shift):
    image = torch.zeros(1, 1, 28, 28)
    image[..., 8:20, 8:20] = torch.rand(12, 12)
    moved = shifted(image, torch.tensor([shift], dtype=torch.float32))
    torch.testing.assert_close(moved, image.roll(shift, (2, 3)), rtol=0, atol=1e-5)


def test_half_a_pixel_is_the_mean_of_two():
    image = torch.rand(1, 2, 6, 6)
    moved = shifted(image, torch.tensor([[0.0, 0.5]]))
    torch.testing.assert_close(moved[..., 1:], (image[..., 1:] + image[..., :-1]) / 2)


def test_right_angles_turn_anticlockwise():
    images = torch.rand(4, 3, 7, 7)
    turned = rotated(images, torch.tensor([0.0, 90.0, 180.0, 270.0]))
    expected = torch.stack([image.rot90(k, (1, 2)) for k, image in enumerate(images)])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)


def test_translations_and_turns_differ_between_pictures(data):
    upright = mnist(28, data)
    moved, turned = translated_mnist(28, data), rotated_mnist(28, data)
    assert 0.3 < (moved.train_images.sum((1, 2, 3)) / upright.train_images.sum((1, 2, 3))).min()
    ways = centres(moved.train_images) - centres(upright.train_images)
    assert (ways.abs() < 8).all()  # uniform on ±8: a deviation of 4.6, less what is cut off
    assert (ways.std(0) > 3).all()
    assert abs(float(torch.corrcoef(ways.T)[0, 1])) < 0.5
    assert not torch.isclose(turned.train_images, upright.train_images).all(3).all(2).any()


def test_antialiasing_averages_all_pixels():
    image = torch.rand(1, 1, 56, 56)
    means = image.reshape(14, 4, 14, 4).mean((1, 3))
    # the bilinear kernel is a triangle of twice the width: compare on a picture of equal blocks
    blocks = means.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
    assert float(resized(image, 14, True).std()) < float(resized(image, 14, False).std())
    assert resized(blocks, 56, True) is blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "colour"}, r"unknown question 'colour'.*digit\+quadrant"),
        ({"n_train": 41}, "n_train=41, but there are 40"),
        ({"n_test": 0}, "n_test=0, but there are 12"),
        ({"n_train": 2.5}, r"n_train=2\.5"),
        ({"n_train": "3"}, "n_train='3'"),
        ({"n_test": True}, "n_test=True"),
        ({"size": 0}, "size=0"),
        ({"size": 16.5}, r"size=16\.5"),
    ],
)
def test_bad_arguments_are_named(data, arguments, message):
    with pytest.raises(ConfigError, match=message):
        quadrant_mnist(data_dir=data, **arguments)


def test_subset_keeps_pairs_and_classes():
    task = toy()
    small = task.subset(7, 2, seed=1)
    assert torch.equal((small.train_images[:, 0, 0, 0].long() - 1) % 4, small.train_labels)
    assert torch.equal(small.train_images, task.subset(9, seed=1).train_images[:7])
    assert not torch.equal(small.train_images, task.subset(7, seed=2).train_images)
    assert len(task.subset(7).test_images) == 6
    assert task.subset(1, 1).n_classes == 4
    for wanted in (21, 2.5, "3", True):
        with pytest.raises(ConfigError, match=f"n_train={wanted!r}, but there are 20"):
            task.subset(wanted)
    assert len(task.subset(np.int64(3)).train_images) == 3


def test_standardised_per_channel():
    images = torch.rand(30, 3, 4, 4, dtype=torch.float64) * torch.tensor([1, 5, 9])[:, None, None]
    task = ImageTask(images[:20], torch.arange(20), images[20:], torch.arange(10), name="toy")
    standard = task.standardised()
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(standard.train_images.mean((0, 2, 3)), zeros)
    torch.testing.assert_close(standard.train_images.std((0, 2, 3)), ones)
    mean = images[:20].mean((0, 2, 3), keepdim=True)
    deviation = images[:20].std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(standard.test_images, (images[20:] - mean) / deviation)
    images[:20, 1] = 0.5
    with pytest.raises(DataError, match="a channel is constant"):
        task.standardised()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grey", [0.0, 0.1, 0.7, 1 / 3, -123.4])
def test_a_constant_channel_is_refused_whatever_its_value(grey, dtype):
    images = torch.rand(500, 2, 28, 28, dtype=dtype)
    images[:, 1] = grey  # its computed deviation is a rounding of its mean, not zero
    labels = torch.zeros(500, dtype=torch.long)
    with pytest.raises(DataError, match="a channel is constant"):
        ImageTask(images, labels, images, labels, name="toy").standardised()
    images[0, 1, 0, 0] += 1e-3  # a single pixel, and no more than a thousandth
    assert ImageTask(images, labels, images, labels, name="toy").standardised()


def test_unequal_parts_are_refused():
    images, labels = torch.rand(4, 1, 3, 3), torch.arange(4)
    with pytest.raises(DataError, match=r"held-out pictures .* and labels"):
        ImageTask(images, labels, images, labels[:3], name="toy")
    with pytest.raises(DataError, match=r"training pictures are \(1, 3, 3\)"):
        ImageTask(images, labels, images[..., 1:], labels, name="toy")


def test_real_mnist(real_data):
    task = quadrant_mnist("digit+quadrant", 16, real_data)
    assert task.train_images.shape == (60_000, 1, 16, 16)
    assert task.test_images.shape == (10_000, 1, 16, 16)
    assert torch.bincount(task.train_labels, minlength=40).min() > 1200
    upright = mnist(28, real_data)
    assert upright.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(upright.train_images.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(upright.train_images.std()) == pytest.approx(0.3081, abs=1e-4)


def test_real_cifar(real_data):
    task = rotated_cifar10(32, real_data, n_train=300, n_test=100)
    assert task.train_images.shape == (300, 3, 32, 32)
    assert task.class_names == CLASSES
    assert len(task.test_labels.unique()) == 10
    # the published means of the channels are .491, .482 and .447
    upright = cifar10(32, real_data, n_train=300, n_test=1)
    assert (upright.train_images.mean((0, 2, 3)) - 0.47).abs().max() < 0.06
