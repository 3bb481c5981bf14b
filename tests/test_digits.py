"""The embedded digits are the published ones, and their two tasks have the stated symmetry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from margeq.data import ImageTask, load_digits, place_digits
from margeq.data.digits import _split
from margeq.errors import ConfigError

CORNERS = [(0, 0), (0, 8), (8, 0), (8, 8)]


def split_digits(seed):
    """The 8×8 digits of the training and the held-out part, in the order of a task."""
    images, labels = load_digits()
    train, test = _split(len(images), torch.Generator().manual_seed(seed))
    return (images[train], labels[train]), (images[test], labels[test])


def centres(pictures):
    """Centres of mass ``[n, 2]`` as (y, x), in pixels."""
    pictures = pictures.reshape(-1, *pictures.shape[-2:]).double()
    mass = pictures.sum((1, 2))
    position = torch.arange(pictures.shape[-1], dtype=torch.float64)
    y = (pictures.sum(2) * position).sum(1) / mass
    x = (pictures.sum(1) * position).sum(1) / mass
    return torch.stack([y, x], dim=1)


def offsets(placed, digits):
    """Offsets ``[n, 2]``: how far the centre of mass moved."""
    shift = centres(placed) - centres(digits)
    rounded = shift.round()
    torch.testing.assert_close(shift, rounded, rtol=0, atol=1e-9)
    return rounded.long()


def same_task(a: ImageTask, b: ImageTask) -> bool:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_digits_equal_the_copy_of_scikit_learn():
    published = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = load_digits()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert np.array_equal(images.numpy() * 16, published.images)
    assert np.array_equal(labels.numpy(), published.target)


@pytest.mark.parametrize("question", ["digit", "corner"])
def test_task_depends_on_the_seed_alone(question):
    torch.manual_seed(1)
    first = place_digits(question, seed=3)
    torch.manual_seed(2)
    assert same_task(first, place_digits(question, seed=3))
    assert not same_task(first, place_digits(question, seed=4))


@pytest.mark.parametrize("question", ["digit", "corner"])
def test_global_random_state_is_untouched(question):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    place_digits(question)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_split_is_disjoint_and_complete():
    train, test = _split(1797, torch.Generator().manual_seed(0))
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))


@pytest.mark.parametrize("seed", [0, 1])
def test_digit_question_shows_each_digit_anywhere_and_keeps_its_label(seed):
    task = place_digits("digit", copies=2, seed=seed)
    (train, train_labels), (test, test_labels) = split_digits(seed)
    assert task.name == "digit"
    assert task.train_images.shape == (2874, 1, 16, 16)
    assert task.test_images.shape == (360, 1, 16, 16)
    assert torch.equal(task.train_labels, train_labels.repeat(2))
    assert torch.equal(task.test_labels, test_labels)

    seen = offsets(task.train_images, train.repeat(2, 1, 1))
    assert set(map(tuple, seen.tolist())) == {(y, x) for y in range(9) for x in range(9)}
    assert not torch.equal(seen[:1437], seen[1437:])  # the copies are placed independently
    assert len(offsets(task.test_images, test).unique(dim=0)) > 60


@pytest.mark.parametrize("seed", [0, 1])
def test_corner_question_shows_the_same_digits_in_four_corners(seed):
    task = place_digits("corner", seed=seed)
    (train, _), (test, _) = split_digits(seed)
    assert task.name == "corner"
    parts = [
        (task.train_images, task.train_labels, train),
        (task.test_images, task.test_labels, test),
    ]
    for images, labels, digits in parts:
        assert images.shape == (len(digits), 1, 16, 16)
        assert labels.unique().tolist() == [0, 1, 2, 3]
        assert torch.equal(offsets(images, digits), torch.tensor(CORNERS)[labels])


def test_placing_keeps_every_pixel_of_the_digit():
    task = place_digits("corner", canvas=20)
    (digits, _), _ = split_digits(0)
    for picture, label, digit in zip(task.train_images, task.train_labels, digits, strict=True):
        y, x = (12 * (label // 2), 12 * (label % 2))
        assert torch.equal(picture[0, y : y + 8, x : x + 8], digit)
        assert picture.sum() == pytest.approx(digit.sum().item())


def test_canvas_without_room_still_asks_for_the_digit():
    task = place_digits("digit", canvas=8, copies=1)
    (digits, _), _ = split_digits(0)
    assert torch.equal(task.train_images[:, 0], digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "colour"}, "unknown question 'colour'"),
        ({"question": "digit", "canvas": 7}, "canvas=7 is too small"),
        ({"question": "corner", "canvas": 8}, "use at least 9"),
        ({"question": "digit", "copies": 0}, "copies=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        place_digits(**arguments)


def test_standardising_uses_the_training_pictures_alone():
    task = place_digits("digit")
    standard = task.standardised()
    assert float(standard.train_images.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(standard.train_images.std()) == pytest.approx(1.0, abs=1e-5)
    mean, deviation = task.train_images.mean(), task.train_images.std()
    assert torch.equal(standard.test_images, (task.test_images - mean) / deviation)
