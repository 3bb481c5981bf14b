"""Checkpoints of strangers: nothing runs, nothing huge is allocated, nothing outside is read."""

from __future__ import annotations

import json
import os
import pickle
import random
import tracemalloc

import pytest
import torch

from margeq.checkpoint.manifest import MANIFEST, FileEntry, Manifest, digest, read_manifest
from margeq.checkpoint.tensors import decode_tensors, encode_tensors
from margeq.errors import CheckpointCorrupt, CheckpointError
from tests.checkpoint_files import (
    adopt,
    body_of,
    files_of,
    forged_manifest,
    saved,
    with_header,
    write_manifest,
)

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(tmp_path, name, vouched):
    store, mark = saved(tmp_path / "run"), tmp_path / "executed"
    checkpoint, bomb = tmp_path / "run" / "step-000001", pickle.dumps(Bomb(mark))
    if vouched and name != MANIFEST:
        adopt(checkpoint, name, bomb)
    else:
        (checkpoint / name).write_bytes(bomb)
    with pytest.raises(CheckpointCorrupt):
        store.load(1)
    assert not mark.exists()
    pickle.loads(bomb)  # it would have gone off
    assert mark.exists()


def test_a_bomb_beside_the_files_is_not_touched(tmp_path):
    store, mark = saved(tmp_path / "run"), tmp_path / "executed"
    (tmp_path / "run" / "step-000001" / "model.pt").write_bytes(pickle.dumps(Bomb(mark)))
    torch.save({"a": Bomb(mark)}, tmp_path / "run" / "step-000001" / "data.pkl")
    store.load(1)
    assert not mark.exists()


def mutated(data: bytes, rng: random.Random, end: int) -> bytes:
    """One to four bytes before ``end`` changed, removed, doubled or inserted."""
    new = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(min(end, len(new))), rng.randrange(4)
        if kind == 0:
            new[at] = rng.randrange(256)
        elif kind == 1:
            del new[at]
        elif kind == 2:
            new.insert(at, rng.choice(b'0123456789{}[]",:e-\x00\xff'))
        else:
            new[at:at] = new[at : at + rng.randint(1, 30)]
    return bytes(new)


def headers(count):
    data = encode_tensors({"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.ones(())})
    header = 8 + int.from_bytes(data[:8], "little")
    rng, outcomes = random.Random(0), {"refused": 0, "read": 0}
    for _ in range(count):
        try:
            found = decode_tensors(mutated(data, rng, header), "file")
        except CheckpointCorrupt:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1  # another name, or dtypes of one size
            assert sum(t.numel() * t.element_size() for t in found.values()) < len(data)
    assert outcomes["refused"] > 0.8 * count


def manifests(tmp_path, count):
    saved(tmp_path)
    checkpoint = tmp_path / "step-000001"
    rng, spelled = random.Random(0), json.dumps(body_of(checkpoint)).encode()
    refusals = 0
    for _ in range(count):
        try:
            body = json.loads(mutated(spelled, rng, len(spelled)))
        except ValueError:
            continue
        (checkpoint / MANIFEST).write_bytes(forged_manifest(body))
        try:
            read_manifest(checkpoint)
        except CheckpointError:
            refusals += 1
    assert refusals > 0


def test_mutated_headers_give_typed_errors_only():
    headers(400)


@pytest.mark.slow
def test_2000_mutated_headers_give_typed_errors_only():
    headers(2000)


def test_mutated_manifests_give_typed_errors_only(tmp_path):
    manifests(tmp_path, 200)


@pytest.mark.slow
def test_500_mutated_manifests_give_typed_errors_only(tmp_path):
    manifests(tmp_path, 2000)  # a quarter of them is still JSON


def test_mutated_states_give_typed_errors_only(tmp_path):
    store = saved(tmp_path)
    checkpoint = tmp_path / "step-000001"
    spelled, rng = (checkpoint / "state.json").read_bytes(), random.Random(0)
    for _ in range(200):
        adopt(checkpoint, "state.json", mutated(spelled, rng, len(spelled)))
        try:
            store.load(1)
        except CheckpointCorrupt:
            continue


@pytest.mark.parametrize(
    "state",
    [
        {"model": {"$tensor": "model/missing"}},
        {"model": {"$tensor": ["model/0.weight"]}},
        {"model": {"$eval": "1"}},
        {"model": {"$tuple": 3}},
        {"model": {"$items": [[[1], 2]]}},
        {"model": {"$float": "1e400"}},
        {"model": {"$tensor": "a", "b": 1}},
        [1],
        "text",
    ],
)
def test_a_state_that_makes_no_sense_is_refused(tmp_path, state):
    store = saved(tmp_path)
    adopt(tmp_path / "step-000001", "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointCorrupt):
        store.load(1)


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 50_000])
def test_nesting_without_end_is_refused(tmp_path, deep):
    store = saved(tmp_path)
    adopt(tmp_path / "step-000001", "state.json", deep)
    with pytest.raises(CheckpointCorrupt):
        store.load(1)
    with pytest.raises(CheckpointCorrupt):
        decode_tensors(with_header(deep), "file")


def entry(shape, begin, end, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "data",
    [
        (2**40).to_bytes(8, "little") + b"{}",
        (2**62).to_bytes(8, "little") + b"{}",
        b"\x00" * 7,
        with_header(entry([2**38], 0, 2**40), b"1234"),
        with_header(entry([2**60], 0, 2**62), b"1234"),
        with_header(entry([2**60], 0, 4), b"1234"),
        with_header(entry([2**32, 2**32, 2**32], 0, 4), b"1234"),
        with_header(entry([2**62, 2**62, 0], 0, 4), b"1234"),
        with_header(entry([-1], 0, -4)),
        with_header(entry([1.0], 0, 4), b"1234"),
        with_header(entry([True], 0, 4), b"1234"),
        with_header(entry([1] * 100, 0, 4), b"1234"),
        with_header(entry([1], 4, 8), b"12345678"),
        with_header(entry([1], 0, 4), b"12345678"),
        with_header(entry([1], 0, 4, "F4096"), b"1234"),
        with_header({"a": [1]}),
        with_header([]),
        with_header({**entry([1], 0, 4), "b": entry([1], 0, 4)["a"]}, b"1234"),
    ],
)
def test_declared_sizes_are_refused_before_allocation(data):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointCorrupt):
            decode_tensors(data, "file")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_manifest_that_declares_a_huge_file_is_refused(tmp_path, size):
    store, checkpoint = saved(tmp_path), tmp_path / "step-000001"
    old = read_manifest(checkpoint)
    files = {**old.files, "model.safetensors": FileEntry(size, digest(b""))}
    write_manifest(checkpoint, Manifest(1, None, files, {}))
    with pytest.raises(CheckpointCorrupt, match=f"its manifest says {size}"):
        store.load(1)


def test_a_sparse_file_of_a_terabyte_and_more_is_not_read(tmp_path):
    store, checkpoint = saved(tmp_path), tmp_path / "step-000001"
    size = 2**40 + 1
    with (checkpoint / "model.safetensors").open("wb") as file:
        try:
            file.truncate(size)  # takes no room
        except OSError:
            pytest.skip("no sparse files here")
    old = read_manifest(checkpoint)
    files = {**old.files, "model.safetensors": FileEntry(size, digest(b""))}
    write_manifest(checkpoint, Manifest(1, None, files, {}))
    with pytest.raises(CheckpointCorrupt, match="more than"):
        store.load(1)


@pytest.mark.parametrize(
    "name",
    ["../secret.json", "/etc/passwd", "a/b.json", "..", "", "model.pt", ".hidden.json", "C:x.json",
     "manifest.json", "a\n.json", "x.json\x00"],
)  # fmt: skip
def test_names_outside_the_directory_are_refused(tmp_path, name):
    store, checkpoint = saved(tmp_path), tmp_path / "step-000001"
    (tmp_path / "secret.json").write_text("{}")
    body = body_of(checkpoint)
    body["files"][name] = {"size": 2, "sha256": digest(b"{}")}
    (checkpoint / MANIFEST).write_bytes(forged_manifest(body))
    with pytest.raises(CheckpointCorrupt, match="which no checkpoint has"):
        store.load(1)


@pytest.mark.parametrize("name", FILES)
def test_links_are_refused(tmp_path, name):
    store, checkpoint = saved(tmp_path / "run"), tmp_path / "run" / "step-000001"
    outside = tmp_path / "outside"
    (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(outside)  # the very same bytes
    with pytest.raises(CheckpointCorrupt, match=name):
        store.load(1)


def test_a_linked_checkpoint_is_none(tmp_path):
    store = saved(tmp_path / "run")
    saved(tmp_path / "other", [5])
    (tmp_path / "run" / "step-000005").symlink_to(tmp_path / "other" / "step-000005")
    assert store.steps() == [1]
    with pytest.raises(CheckpointCorrupt):
        store.load(5)


@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_a_directory_or_a_pipe_is_no_file(tmp_path, make):
    if not hasattr(os, make):
        pytest.skip("no pipes here")
    store, checkpoint = saved(tmp_path), tmp_path / "step-000001"
    path = checkpoint / "state.json"
    path.unlink()
    getattr(os, make)(path)
    with pytest.raises(CheckpointCorrupt, match="no plain file"):
        store.load(1)


def test_files_that_no_section_is_about_are_refused(tmp_path):
    store, checkpoint = saved(tmp_path), tmp_path / "step-000001"
    adopt(checkpoint, "other.safetensors", encode_tensors({"other/a": torch.ones(1)}))
    assert len(files_of(checkpoint)) == 5
    with pytest.raises(CheckpointCorrupt, match="no section"):
        store.load(1)
