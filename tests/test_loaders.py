"""Loaders and augmentation: all pictures in every pass, one draw for each, and a way back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import margeq
from margeq.data import TensorLoader, mnist, random_shift_flip
from margeq.data.augment import shift_flip
from margeq.errors import ConfigError
from margeq.training.guards import Rewind
from tests.data_files import toy, write_mnist


def passes(loader, n):
    return [[(x.clone(), y.clone()) for x, y in loader] for _ in range(n)]


def equal_passes(a, b):
    tensors = [[t for shown in part for pair in shown for t in pair] for part in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def test_every_picture_has_its_own_draw():
    images = torch.rand(1, 3, 12, 12).expand(64, 3, 12, 12)
    changed = random_shift_flip(images, torch.Generator().manual_seed(0))
    assert len(changed.unique(dim=0)) > 45  # of 81 shifts times 2
    assert torch.equal(changed, random_shift_flip(images, torch.Generator().manual_seed(0)))
    only_shifted = random_shift_flip(images, torch.Generator().manual_seed(0), flip=False)
    unchanged = (only_shifted == changed).flatten(1).all(1)
    assert 16 < int(unchanged.sum()) < 48  # one half is mirrored


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (-1, 3), (4, -4)])
def test_shift_and_flip_move_whole_pixels(shift, flip):
    images = torch.zeros(2, 3, 16, 14)
    images[..., 5:11, 5:9] = torch.rand(2, 3, 6, 4)
    changed = shift_flip(images, torch.tensor([(0, 0), shift]), torch.tensor([False, flip]))
    expected = (images[1].flip(2) if flip else images[1]).roll(shift, (1, 2))
    assert torch.equal(changed[0], images[0])  # the zero draw
    assert torch.equal(changed[1], expected)


def test_what_comes_from_outside_is_zero():
    changed = shift_flip(torch.ones(1, 1, 4, 4), torch.tensor([(1, -2)]), torch.tensor([True]))
    assert changed[0, 0].tolist() == [[0, 0, 0, 0]] + 3 * [[1, 1, 0, 0]]


@pytest.mark.parametrize("max_shift", [-1, 5])
def test_impossible_shifts_are_named(max_shift):
    with pytest.raises(ConfigError, match=rf"max_shift={max_shift}; use 0 to 4"):
        random_shift_flip(torch.ones(1, 1, 6, 5), torch.Generator(), max_shift)


def test_loader_shows_every_picture_once_per_pass():
    loader = toy().train_loader(8, seed=1)
    assert len(loader) == 3
    assert len(loader.dataset) == 20
    first, second = passes(loader, 2)
    assert [len(labels) for _, labels in first] == [8, 8, 4]
    for shown in (first, second):
        numbers = torch.cat([images[:, 0, 0, 0] for images, _ in shown])
        labels = torch.cat([labels for _, labels in shown])
        assert sorted(numbers.tolist()) == list(range(1, 21))
        assert torch.equal((numbers.long() - 1) % 4, labels)
    assert not equal_passes([first], [second])


@pytest.mark.parametrize("augment", [None, partial(random_shift_flip, max_shift=2)])
def test_passes_repeat_by_seed_and_can_be_rewound(augment):
    torch.manual_seed(1)
    loader = toy().train_loader(8, augment=augment, seed=1)
    rewind = Rewind(nn.Linear(1, 1), [loader])
    first = passes(loader, 3)
    from_outside = any(bool((images == 0).any()) for images, _ in first[0])
    assert from_outside == (augment is not None)
    torch.manual_seed(2)
    assert equal_passes(first, passes(toy().train_loader(8, augment=augment, seed=1), 3))
    assert not equal_passes(first, passes(toy().train_loader(8, augment=augment, seed=2), 3))
    rewind()
    next(iter(loader))  # a pass that is left counts as one
    assert equal_passes(first[1:], passes(loader, 2))


def test_augmentation_changes_from_pass_to_pass_without_touching_the_data():
    task = toy()
    before = task.train_images.clone()
    loader = TensorLoader(task.train_images, task.train_labels, 20, augment=random_shift_flip)
    (first,), (second,) = passes(loader, 2)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(task.train_images, before)


@pytest.mark.parametrize("part", ["train", "test"])
def test_evidence_and_held_out_loaders_show_the_data_as_they_are(part):
    task = toy()
    loader = task.marglik_loader(8) if part == "train" else task.test_loader(8)
    state = loader.generator.get_state()
    for shown in passes(loader, 2):
        images, labels = (torch.cat(parts) for parts in zip(*shown, strict=True))
        assert torch.equal(images, getattr(task, f"{part}_images"))
        assert torch.equal(labels, getattr(task, f"{part}_labels"))
    assert torch.equal(loader.generator.get_state(), state)
    assert loader.augment is None


@pytest.mark.parametrize(
    ("n_labels", "batch_size", "message"),
    [
        (4, 0, "batch_size=0"),
        (4, 2.5, r"batch_size=2\.5"),
        (4, True, "batch_size=True"),
        (3, 2, "4 pictures, but 3"),
    ],
)
def test_bad_loaders_are_named(n_labels, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        TensorLoader(torch.ones(4, 1, 2, 2), torch.zeros(n_labels), batch_size)


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_pictures_make_no_batch(shuffle):
    loader = TensorLoader(torch.ones(0, 1, 2, 2), torch.zeros(0), 2, shuffle)
    assert len(list(loader)) == len(loader) == 0


@pytest.mark.parametrize("own", [False, True])
def test_evidence_on_augmented_batches_is_refused(own):
    task = toy()
    loader = task.train_loader(8, augment=random_shift_flip)
    before = loader.generator.get_state()
    plain = task.train_loader(8)
    name, loaders = ("marglik_loader", (plain, loader)) if own else ("train_loader", (loader, None))
    message = rf"augmented batches of {name}; .*marglik_loader=task\.marglik_loader\("
    with pytest.raises(ConfigError, match=message):
        margeq.optimize_marglik(
            nn.Sequential(nn.Flatten(), nn.Linear(30, 4)), loaders[0], marglik_loader=loaders[1]
        )
    assert torch.equal(loader.generator.get_state(), before)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_training_takes_the_loaders(tmp_path):
    write_mnist(tmp_path)
    task = mnist(8, tmp_path).standardised()

    def evidence():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, task.n_classes))
        result = margeq.optimize_marglik(
            model,
            task.train_loader(16, augment=partial(random_shift_flip, max_shift=1, flip=False)),
            marglik_loader=task.marglik_loader(40),
            n_epochs=4,
            n_epochs_burnin=1,
            marglik_frequency=1,
            progress="none",
        )
        assert result.n_data == 40
        return result.log_marginal_likelihood

    assert evidence() == evidence()
