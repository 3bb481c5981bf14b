"""What users do without thinking: forks, forgotten shares, own generators, typing errors."""

import multiprocessing as mp
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import margeq
from benchmarks.networks import digits, lenet
from margeq import cli
from margeq.checkpoint import Checkpoints
from margeq.distributed import shard
from margeq.errors import (
    CheckpointMismatch,
    CheckpointWarning,
    ConfigError,
    DeterminismWarning,
    NonFiniteError,
)
from margeq.runs import tasks
from tests.rank_trainings import call, paths_net
from tests.ranks import on_ranks
from tests.resume_cases import digest, pictures
from tests.run_files import FLAGS, TINY

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

ALWAYS = float("inf")


class Noisy(nn.Module):
    """Adds noise from a generator of its own while it is trained."""

    def __init__(self):
        super().__init__()
        self.draws = torch.Generator().manual_seed(5)

    def forward(self, x):
        if not self.training:
            return x
        return x + 0.1 * torch.randn(x.shape, generator=self.draws)


def network(*first, built=0):
    torch.manual_seed(built)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model, loader, directory=None, gap=0.0, **options):
    where = directory and Checkpoints(directory, max_overhead=ALWAYS, longest_gap=gap)
    return margeq.optimize_marglik(
        model, loader,
        **{
            "n_epochs": 4, "n_epochs_burnin": 1, "marglik_frequency": 2, "seed": 0,
            "optimizer_kwargs": {"lr": 0.02}, "progress": "none", "checkpoint_dir": where,
            "marglik_loader": [pictures()], **options,
        },
    )  # fmt: skip


def stopping(number, which=signal.SIGUSR1):
    seen = []

    def batch_fn(raw):
        seen.append(raw)
        if len(seen) == number:
            signal.raise_signal(which)
        return raw

    return batch_fn


# -- processes that are forked meanwhile


def for_ever():
    signal.pause()


def test_processes_forked_during_a_call_get_their_signals(tmp_path):
    children = []

    def start(event):
        if event.kind == "epoch" and not children:
            children.append(mp.get_context("fork").Process(target=for_ever, daemon=True))
            children[0].start()

    train(network(), DataLoader(TensorDataset(*pictures()), 16), tmp_path, callbacks=[start])
    children[0].terminate()
    children[0].join(10)
    alive = children[0].is_alive()
    children[0].kill()
    assert not alive
    assert children[0].exitcode == -signal.SIGTERM


def test_an_error_after_a_signal_is_told(tmp_path):
    def failing(event):
        if event.kind == "epoch":
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("my bug")

    loader = DataLoader(TensorDataset(*pictures()), 16)
    with (
        pytest.warns(CheckpointWarning, match=r"ValueError: my bug; .* see the last checkpoint in"),
        pytest.raises(SystemExit),
    ):
        train(network(), loader, tmp_path, callbacks=[failing])


# -- generators of their own


class Drawn(Dataset):
    """Changes its pictures by a generator of its own."""

    def __init__(self, generator):
        self.x, self.y = pictures()
        self.own = generator

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if isinstance(self.own, torch.Generator):
            noise = torch.randn((), generator=self.own)
        else:
            noise = torch.tensor(self.own.normal(), dtype=torch.float32)
        return self.x[index] + 0.1 * noise, self.y[index]


@pytest.mark.parametrize("number", [4, 9])
@pytest.mark.parametrize("who", ["data", "module"])
def test_generators_of_torch_go_on_wherever_they_are_held(who, number, tmp_path):
    def made():
        if who == "module":
            return network(Noisy()), DataLoader(TensorDataset(*pictures()), 16, shuffle=True)
        data = Drawn(torch.Generator().manual_seed(2))
        return network(), DataLoader(torch.utils.data.Subset(data, range(40)), 16, shuffle=True)

    expected = digest(train(*made()))
    with pytest.raises(SystemExit):
        train(*made(), tmp_path, batch_fn=stopping(number))
    assert digest(train(*made(), tmp_path, batch_fn=lambda raw: raw)) == expected


def test_generators_of_numpy_are_warned_of(tmp_path):
    loader = DataLoader(Drawn(np.random.default_rng(0)), 16, shuffle=True)
    with pytest.raises(SystemExit):
        train(network(), loader, tmp_path, batch_fn=stopping(9))
    with pytest.warns(DeterminismWarning, match="the order of batches of DataLoader cannot be"):
        train(network(), loader, tmp_path, batch_fn=lambda raw: raw)


# -- another number of threads


def lenet_run(threads, directory=None, epochs_until_signal=None):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, data, seen = lenet(), digits().dataset, []

    def signal_after(event):
        seen.extend([1] * (event.kind == "epoch"))
        if len(seen) == epochs_until_signal:
            signal.raise_signal(signal.SIGTERM)

    result = train(
        model, DataLoader(data, 128, shuffle=True), directory, float("inf"), n_epochs=6,
        marglik_loader=[data.tensors], optimizer_kwargs={"lr": 1e-3}, callbacks=[signal_after],
    )  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, result.log_marginal_likelihood


@pytest.mark.slow
def test_another_number_of_threads_moves_results_by_rounding_only(tmp_path, torch_as_before):
    weights, evidence = lenet_run(1)
    with pytest.raises(SystemExit):
        lenet_run(1, tmp_path, epochs_until_signal=3)
    with pytest.warns(DeterminismWarning, match="threads 1 there, 2 here"):
        found, found_evidence = lenet_run(2, tmp_path)
    assert float((found - weights).norm() / weights.norm()) < 1e-5
    assert found_evidence == pytest.approx(evidence, rel=1e-5)


# -- other batches than before


def in_batches(size, drop_last=False):
    data = TensorDataset(*pictures())
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, drop_last))


def share(size, seed=0):
    return shard(TensorDataset(*pictures()), size, shuffle=True, seed=seed)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (in_batches(16), in_batches(20), "batch_size"),
        (share(16), share(20), "batch_size"),
        (share(16), share(16, seed=1), "seed"),
    ],
    ids=["batch sampler", "share", "seed of a share"],
)
def test_other_batches_are_refused_by_name(before, after, said, tmp_path):
    with pytest.raises(SystemExit):
        train(network(), before, tmp_path, batch_fn=stopping(9))
    with pytest.raises(CheckpointMismatch, match=said):
        train(network(), after, tmp_path, batch_fn=lambda raw: raw)


def test_an_empty_name_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="environment variable"):
        margeq.optimize_marglik(network(), [pictures()], checkpoint_dir="", n_epochs=20)
    assert not list(tmp_path.iterdir())


# -- ranks


def whole_on_every_rank(rank):
    data = DataLoader(
        TensorDataset(*(t.double() if t.is_floating_point() else t for t in pictures())), 20
    )
    found = []
    for model in (paths_net(), paths_net().add_module("more", nn.Identity()) or paths_net()):
        try:
            call(model, data, restarts=["symmetric"])
        except margeq.errors.MargeqError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_ranks_with_the_same_data_are_refused():
    for found in on_ranks(2, whole_on_every_rank):
        assert all("DataError: ranks 0, 1 hold the same 40 data" in text for text in found)
        assert all("shard(dataset" in text for text in found)


def another_seed(rank):
    part = shard(TensorDataset(*pictures()), 20)
    try:
        call(paths_net().float(), part, seed=rank + 7)
    except margeq.errors.DistributedMismatchError as error:
        return str(error)
    return None


def test_differences_between_ranks_are_shown_with_their_values():
    for text in on_ranks(2, another_seed):
        assert "'seed' differs between ranks: on [1]" in text
        assert "(rank 0: 7; rank 1: 8)" in text


# -- memory, half precision


class TooLarge(nn.Linear):
    """Runs out of memory, whatever it gets."""

    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_no_memory_at_the_first_look_is_torchs_own_error():
    model = nn.Sequential(nn.Flatten(), TooLarge(16, 2))
    model[1].requires_grad_(False)
    with pytest.raises(torch.OutOfMemoryError):
        train(nn.Sequential(nn.Linear(4, 4), *model), [pictures()])


def test_adam_in_float16_is_told_the_way_out():
    x, y = pictures()
    half = network().half()
    with pytest.raises(NonFiniteError, match=r"'eps': 1e-4.*bfloat16"):
        train(half, [(x.half(), y)], marglik_loader=[(x.half(), y)])
    options = {"lr": 1e-3, "eps": 1e-4}
    train(half, [(x.half(), y)], marglik_loader=[(x.half(), y)], optimizer_kwargs=options)


# -- the command line


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    path = tmp_path / "mine.py"
    path.write_text(TINY)
    return path


def run(factory, out, *flags):
    return cli.main(
        ["run", "--factory", str(factory), "--out", str(out), "--quiet", *FLAGS, *flags]
    )


def test_a_seed_out_of_range_is_a_configuration_error(factory, tmp_path, capsys):
    assert run(factory, tmp_path / "run", "--seed", "99999999999999999999999") == 2
    assert "seed=99999999999999999999999" in capsys.readouterr().err


def test_a_typing_error_does_not_take_the_place_of_the_run(factory, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(factory, out, "--lr-hyp", "-1") == 2
    assert run(factory, out) == 0, capsys.readouterr().err
    assert run(factory, out, "--lr-hyp", "0.2") == 2
    assert "another run (lr_hyp: 0.1 there, 0.2 here)" in capsys.readouterr().err
