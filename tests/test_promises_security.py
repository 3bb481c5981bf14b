"""Security: no network, nothing by dotted path, and strangers' checkpoints end in typed errors."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import tomllib
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import margeq
from margeq.checkpoint import CheckpointStore
from margeq.checkpoint.manifest import MANIFEST
from margeq.errors import CheckpointCorrupt, CheckpointError, CheckpointVersion, ConfigError
from tests import network_guard
from tests.checkpoint_files import adopt, body_of, equal, files_of, forged_manifest, saved
from tests.resume_cases import train
from tests.snapshots import unchanged

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def python(code, *arguments, prefix=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


# -- S2: memory of damaged files -------------------------------------------------------------------

DAMAGED = """
import random, resource, sys
from pathlib import Path
import torch
from margeq.checkpoint import disk
from margeq.checkpoint.tensors import decode_tensors, encode_tensors
from margeq.errors import CheckpointCorrupt

path, rng = Path(sys.argv[1]), random.Random(0)
names = {f"w{i}": torch.ones(2**20) for i in range(8)}
path.write_bytes(encode_tensors(names))
size = path.stat().st_size
del names
with path.open("rb") as file:
    start = file.read(8)
    header = file.read(int.from_bytes(start, "little"))

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

decode_tensors(encode_tensors({"a": torch.ones(2)}), "warm-up")
before, refused = peak(), 0
for number in range(80):
    new = bytearray(header)
    for _ in range(rng.randint(1, 4)):
        new[rng.randrange(len(new))] = rng.choice(b'0123456789{}[]",:e-\\x00\\xff')
    with path.open("r+b") as file:
        file.seek(8)
        file.write(new)
    try:
        decode_tensors(disk.read_file(path, 2**40), "file")
    except CheckpointCorrupt:
        refused += 1
print(size, before, peak(), refused)
"""


@pytest.mark.slow
@LINUX
def test_damaged_headers_take_at_most_twice_the_memory_of_the_file(tmp_path):
    """80 mutated headers of a file of 34 MB, whose digest nobody checks."""
    done = python(DAMAGED, tmp_path / "x.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    size, before, after, refused = map(int, done.stdout.split())
    assert refused > 50
    # the process itself held the file twice before; what is new stays below that
    assert after - before <= 2 * size


# -- S7: no network --------------------------------------------------------------------------------


def test_the_guard_of_all_tests_refuses_what_is_not_this_machine():
    for address in (("192.0.2.1", 80), ("2001:db8::1", 80)):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family) as s, pytest.raises(network_guard.NetworkUsed):
            s.connect(address)
    with pytest.raises(network_guard.NetworkUsed):
        socket.getaddrinfo("example.org", 80)
    assert len(network_guard.attempts) == 3
    network_guard.attempts.clear()
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    assert not network_guard.attempts


SILENT = """
import sys, warnings
import torch
events = []
WATCHED = ("socket.__new__", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
           "os.system", "os.exec", "os.posix_spawn", "urllib.Request", "http.client.connect")
sys.addaudithook(lambda event, args: event in WATCHED and events.append(event))
import margeq
from margeq import optimize_marglik
warnings.simplefilter("ignore", margeq.errors.ConvergenceWarning)
x, y = torch.randn(20, 4), torch.arange(20) % 3
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
result = optimize_marglik(
    model, [(x, y)], n_epochs=3, n_epochs_burnin=1, marglik_frequency=1, seed=0,
    checkpoint_dir=sys.argv[1],
)
str(result.effective_dimension()), result.to_dict()
print(events)
"""


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param((), id="watched"),
        pytest.param(("unshare", "-rn"), id="without a network", marks=pytest.mark.slow),
    ],
)
def test_training_opens_no_socket_and_starts_no_process(tmp_path, prefix):
    """Also in a namespace that has no network at all."""
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    done = python(SILENT, tmp_path / "run", prefix=prefix)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "[]\n"
    assert done.stderr == ""


# -- S8: names, not paths to code ------------------------------------------------------------------

NAMED = (
    "likelihood", "prior", "hyper_solver", "network_gradient", "curvature", "backend",
    "hessian_root", "kfac_approx", "restarts", "progress", "prior_prec_init",
)  # fmt: skip


@pytest.mark.parametrize("value", ["antigravity.fly", "os.system", "builtins:exec", "__import__"])
@pytest.mark.parametrize("option", NAMED)
def test_options_name_registered_things_only(option, value):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    loaded = set(sys.modules)
    with unchanged(model), pytest.raises(ConfigError, match=re.escape(value)):
        margeq.optimize_marglik(
            model, [(x, torch.arange(6) % 3)], seed=0,
            **{"progress": "none", option: value},
        )  # fmt: skip
    assert "antigravity" not in set(sys.modules) - loaded


# -- S9: requirements ------------------------------------------------------------------------------


def test_everything_that_continuous_integration_installs_by_name_is_pinned():
    """By version; hashes would tie it to one platform. pip-audit needs a network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    names = {re.split(r"[<>=! ]", requirement)[0].lower() for requirement in asked}
    assert names <= {pin.split("==")[0] for pin in pins}


# -- S10: the loader under fuzz --------------------------------------------------------------------


def mutated(data, draw):
    """Bytes changed, removed, doubled, inserted or cut off."""
    new = bytearray(data)
    for kind, where, length, value in draw:
        at = int(where * len(new)) if new else 0
        if kind == "change" and new:
            new[min(at, len(new) - 1)] = value
        elif kind == "remove":
            del new[at : at + length]
        elif kind == "double":
            new[at:at] = new[at : at + length]
        elif kind == "insert":
            new[at:at] = bytes([value]) * length
        else:
            del new[at:]
    return bytes(new)


KINDS = ["change", "change", "remove", "double", "insert", "cut"]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(1, 40),
        st.integers(0, 255),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
TYPED = (CheckpointCorrupt, CheckpointVersion)


def tried(checkpoint, name, data, vouched):
    """Load a checkpoint with one file replaced; the store is as before afterwards."""
    store = CheckpointStore(checkpoint.parent)
    kept = {path.name: path.read_bytes() for path in files_of(checkpoint)}
    expected = store.load(1).state
    try:
        if vouched and name == MANIFEST:
            (checkpoint / MANIFEST).write_bytes(forged_manifest(json.loads(data)))
        elif vouched:
            adopt(checkpoint, name, data)
        else:
            (checkpoint / name).write_bytes(data)
        try:
            found = store.load(1).state
        except TYPED:
            return
        # a file that nobody vouches for is read only if it is the very same
        assert vouched or data == kept[name]
        assert vouched or equal(found, expected)
    finally:
        for path in files_of(checkpoint):
            path.unlink()
        for kept_name, content in kept.items():
            (checkpoint / kept_name).write_bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    saved(tmp_path_factory.mktemp("fuzz") / "run")
    return tmp_path_factory.getbasetemp().glob("fuzz*/run/step-000001").__next__()


@settings(max_examples=400)
@given(which=st.integers(0, 3), changes=CHANGES, vouched=st.booleans())
def test_any_bytes_in_any_file_give_typed_errors_only(checkpoint, which, changes, vouched):
    """400 mutations of all four files, half of them with right digests."""
    path = files_of(checkpoint)[which]
    data = path.read_bytes()
    if vouched and path.name == MANIFEST:
        data = mutated(json.dumps(body_of(checkpoint)).encode(), changes)
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return
    else:
        data = mutated(data, changes)
    tried(checkpoint, path.name, data, vouched)


STRANGE = [None, True, -1, 0, 2**70, 1.5, "", "x", [], {}, [[]], {"a": 1}, {"$float": "nan"},
           {"$tuple": []}, {"$tensor": "model/none"}, {"$items": []}]  # fmt: skip


def with_another_leaf(state, rng):
    """The same JSON with one value, somewhere, replaced or removed."""
    copied = json.loads(json.dumps(state))
    place, path = copied, []
    while True:  # down a random branch, to its end or a part of the way
        path.append(rng.choice(list(place) if isinstance(place, dict) else range(len(place))))
        inner = place[path[-1]]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            break
        place = inner
    if rng.random() < 0.2:
        del place[path[-1]]
    else:
        place[path[-1]] = rng.choice(STRANGE)
    return copied, path


def interrupted_run(directory):
    """A run of which the middle is on the disk."""

    class Stop(BaseException):
        pass

    def stop(event):
        if event.kind == "epoch" and event.data["epoch"] == 6:
            raise Stop

    with pytest.raises(Stop):
        train("noise", directory, callbacks=[stop])
    step = CheckpointStore(directory).steps()[-1]
    for other in CheckpointStore(directory).steps()[:-1]:
        for path in files_of(directory / f"step-{other:06d}"):
            path.unlink()
        (directory / f"step-{other:06d}").rmdir()
    return directory / f"step-{step:06d}"


def resume_with_strange_states(directory, seconds, least):
    """Resume from states in which one value is another one; returns how many were refused."""
    newest = interrupted_run(directory)
    kept = {path.name: path.read_bytes() for path in files_of(newest)}
    state, rng, began = json.loads(kept["state.json"]), random.Random(0), time.monotonic()
    refused = count = 0
    while count < least or time.monotonic() - began < seconds:
        count += 1
        changed, path = with_another_leaf(state, rng)
        for old in CheckpointStore(directory).steps():
            for file in files_of(directory / f"step-{old:06d}"):
                file.unlink()
            (directory / f"step-{old:06d}").rmdir()
        newest.mkdir()
        for name, content in kept.items():
            (newest / name).write_bytes(content)
        adopt(newest, "state.json", json.dumps(changed).encode())
        try:
            train("noise", directory, built=3)
        except margeq.errors.MargeqError:
            refused += 1
        except Exception as error:
            # a forger who knows the digests can write nonsense of the right structure, such as
            # learning rates for no parameters: torch finds it in a step, nothing is executed
            frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if not frames & {"train_epoch", "update"}:
                raise AssertionError(f"state with another {path}: {error!r}") from error
    return refused, count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fuzz_of_the_loader_for_some_time(tmp_path):
    """For MARGEQ_FUZZ_SECONDS, 60 by default; states that lead into a training, too."""
    seconds = float(os.environ.get("MARGEQ_FUZZ_SECONDS", "60"))
    checkpoint = saved(tmp_path / "run").directory / "step-000001"
    rng, end = random.Random(time.time_ns()), time.monotonic() + 0.5 * seconds
    count = 0
    while time.monotonic() < end:
        changes = [
            (rng.choice(KINDS), rng.random(), rng.randint(1, 40), rng.randrange(256))
            for _ in range(rng.randint(1, 4))
        ]
        path = rng.choice(files_of(checkpoint))
        data, vouched = mutated(path.read_bytes(), changes), rng.random() < 0.7
        tried(checkpoint, path.name, data, vouched and path.name != MANIFEST)
        count += 1
    assert count
    refused, _ = resume_with_strange_states(tmp_path / "noise", 0.5 * seconds, 1)
    assert refused


def test_values_of_a_wrong_kind_in_a_state_are_typed_errors(tmp_path):
    refused, count = resume_with_strange_states(tmp_path, 0.0, 25)
    assert 0 < refused <= count


def test_the_typed_errors_are_checkpoint_errors():
    assert all(issubclass(error, CheckpointError) for error in TYPED)
