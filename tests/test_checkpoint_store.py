"""Checkpoints come back bit for bit, and only if nothing about them is wrong."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from margeq.checkpoint import CheckpointStore, require_same_tensors
from margeq.checkpoint.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from margeq.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointVersion,
    CheckpointWarning,
)
from tests.checkpoint_files import body_of, equal, files_of, forged_manifest, saved, state

TRUNCATIONS, FLIPS = 400, 300
GOLDEN = Path(__file__).parent / "golden"


def test_every_kind_of_value_comes_back(tmp_path):
    tied = torch.randn(4, 5, dtype=torch.float64)
    everything = {
        "empty": {},
        "tensors": {
            "tied": [tied, tied, tied.mT, tied[1:, ::2]],
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(math.pi, dtype=torch.float64),
            **{str(d): torch.ones(3).to(d) for d in (torch.bool, torch.int16, torch.float16)},
            "random": torch.get_rng_state(),
            "special": torch.tensor([math.nan, math.inf, -0.0]),
        },
        "values": {
            "z": [
                None,
                True,
                1,
                2**70,
                0.1 + 0.2,
                -0.0,
                math.nan,
                math.inf,
                -math.inf,
                "ä\x00\ud800",
            ],
            "a": (1, (2.0, []), {}),
            "$tensor": "no mark",
            "keys": {0: "int", ("a", "b"): "tuple", "s": "string", None: 0, 1.5: 1},
        },
    }
    store = CheckpointStore(tmp_path)
    store.save(1, everything)
    assert equal(store.load(1).state, everything)


def test_bfloat16_comes_back(tmp_path):
    store = CheckpointStore(tmp_path)
    values = torch.randn(7).bfloat16()
    store.save(1, {"a": values})
    assert torch.equal(store.load(1).state["a"], values)


def test_names_that_collide_as_paths_stay_apart(tmp_path):
    store = CheckpointStore(tmp_path)
    nested = {"a": {"b/c": torch.zeros(1), "b": {"c": torch.ones(1)}}}
    store.save(1, nested)
    assert equal(store.load(1).state, nested)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "a set, which cannot be stored without pickle"),
        (print, "builtin_function_or_method"),
        (torch.zeros(2).to_sparse(), "dense tensors"),
        (torch.zeros(2, device="meta"), "dense tensors"),
        (torch.zeros(2, dtype=torch.complex128), "plain dtypes"),
    ],
)
def test_what_would_need_pickle_is_named(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        CheckpointStore(tmp_path).save(1, {"model": {"odd one": value}})
    assert "model/odd one" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_manifest_names_sizes_digests_and_versions(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(120, state(), score=-3.5, environment={"seed": 7, "dtype": "float32"})
    assert path.name == "step-000120"
    assert [f.name for f in files_of(path)] == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    body = body_of(path)
    assert body["format_version"] == FORMAT_VERSION
    assert body["environment"]["torch"] == torch.__version__
    assert body["environment"]["threads"] == torch.get_num_threads()
    assert {"margeq", "seed", "dtype"} <= body["environment"].keys()
    assert all(len(entry["sha256"]) == 64 for entry in body["files"].values())


def test_the_last_two_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for step, score in enumerate([None, -5.0, -1.0, -2.0, None, -1.0, -7.0]):
        store.save(step, state(), score=score)
    assert store.steps() == [2, 5, 6]
    assert not list(tmp_path.glob(".tmp-*"))


def test_without_scores_only_the_last_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for step in range(4):
        store.save(step, state())
    assert store.steps() == [3]


def test_a_step_is_written_again_in_place_of_the_old(tmp_path):
    store = saved(tmp_path, [1, 2])
    store.save(2, state(9.0))
    assert store.load_latest().state["place"]["value"] == 9.0
    assert store.steps() == [1, 2]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path).load_latest() is None
    assert CheckpointStore(tmp_path / "missing").load_latest() is None


def test_leftovers_are_cleaned_and_runs_cleared(tmp_path):
    store = saved(tmp_path, [1, 2])
    (tmp_path / ".tmp-0").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    store.clean()
    store.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def refused(store, step=1) -> bool:
    try:
        store.load(step)
    except CheckpointCorrupt:
        return True
    return False


def truncations(tmp_path, count):
    store = saved(tmp_path)
    rng, files = random.Random(0), files_of(tmp_path / "step-000001")
    whole = {path: path.read_bytes() for path in files}
    for number in range(count):
        path = files[number % len(files)]
        path.write_bytes(whole[path][: rng.randrange(len(whole[path]))])
        assert refused(store), path
        path.write_bytes(whole[path])
    store.load(1)


def flips(tmp_path, count):
    store = saved(tmp_path)
    rng, files = random.Random(1), files_of(tmp_path / "step-000001")
    whole = {path: path.read_bytes() for path in files}
    for number in range(count):
        path = files[number % len(files)]
        data = bytearray(whole[path])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert refused(store), path
        path.write_bytes(whole[path])
    store.load(1)


def test_truncated_files_are_refused(tmp_path):
    truncations(tmp_path, 80)


@pytest.mark.slow
def test_all_of_400_truncations_are_refused(tmp_path):
    truncations(tmp_path, TRUNCATIONS)


def test_flipped_bits_are_refused(tmp_path):
    flips(tmp_path, 80)


@pytest.mark.slow
def test_all_of_300_flipped_bits_are_refused(tmp_path):
    flips(tmp_path, FLIPS)


def test_every_single_bit_of_a_manifest_counts(tmp_path):
    store = saved(tmp_path)
    path = tmp_path / "step-000001" / MANIFEST
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert refused(store), bit


@pytest.mark.parametrize(("old", "new"), [(b"e-05", b"E-05"), (b",", b", "), (b"}", b"}\n")])
def test_another_spelling_of_a_manifest_is_damage(tmp_path, old, new):
    store = CheckpointStore(tmp_path)
    path = store.save(1, state(), score=2e-05) / MANIFEST
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert refused(store)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, name):
    store = saved(tmp_path, [1, 2, 3])
    (tmp_path / "step-000003" / name).unlink()
    (tmp_path / "step-000002" / name).write_bytes(b"")
    with pytest.warns(CheckpointWarning, match=rf"step-000003.*{name}.*step-000001"):
        found = store.load_latest()
    assert found.step == 1
    assert equal(found.state, state(1.0))


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    store = saved(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / "state.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"no checkpoint.*resume=False"):
        store.load_latest()


def test_another_format_is_no_damage(tmp_path):
    store = saved(tmp_path, [1, 2])
    path = tmp_path / "step-000002"
    body = body_of(path) | {"format_version": FORMAT_VERSION + 1}
    (path / MANIFEST).write_bytes(forged_manifest(body))
    with pytest.raises(CheckpointVersion, match=f"format {FORMAT_VERSION + 1}.*reads"):
        store.load_latest()


def test_a_renamed_checkpoint_is_refused(tmp_path):
    store = saved(tmp_path)
    (tmp_path / "step-000001").rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointCorrupt, match="holds step 1"):
        store.load(9)


def test_names_shapes_and_dtypes_are_compared():
    live = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    require_same_tensors(dict(live), live, "model")
    for stored, message in [
        ({"a": torch.zeros(3, 2), "b": live["b"]}, r"'a' is float32\[3, 2\].*float32\[2, 3\] here"),
        ({"a": live["a"].double(), "b": live["b"]}, "float64"),
        ({"a": live["a"]}, "'b' is nothing in the checkpoint"),
        ({**live, "c": live["b"]}, "'c' is float32.* and nothing here"),
    ]:
        with pytest.raises(CheckpointMismatch, match=message):
            require_same_tensors(stored, live, "model")


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_format_that_was_ever_written_is_read(version):
    """Files of the past: they stay as they are when the format changes."""
    found = CheckpointStore(GOLDEN / f"format-{version}").load(1)
    assert equal(found.state, state(1.0))


def test_a_manifest_reads_back(tmp_path):
    saved(tmp_path)
    manifest = read_manifest(tmp_path / "step-000001")
    assert replace(manifest).to_bytes() == (tmp_path / "step-000001" / MANIFEST).read_bytes()
