"""Data: what cannot be used is named, what can be used counts once, and nothing else changes.

Every failure is checked for its type, for what the message names, and for an unchanged model
(values, gradients, flags, hooks), random states and arguments.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.errors import DataError, DataWarning, DeterminismWarning, MissingRuleError
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.likelihoods import Categorical
from margeq.priors import GaussianPrior
from tests.oracles import worst_difference
from tests.snapshots import unchanged

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def data(n=60):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()


def used():
    """A model in the middle of somebody's work: gradients, flags, hooks, a buffer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 3))
    model[1].eval()
    model[0].weight.grad = torch.ones(6, 4)
    model[0].register_buffer("seen", torch.zeros(()), persistent=False)
    model[0].register_forward_hook(lambda *_: None)
    model[2].register_full_backward_hook(lambda *_: None)
    model[3].weight.register_hook(lambda grad: None)
    return model


class Passes:
    """Gives one list of batches after the other, the last one for ever; without a length."""

    def __init__(self, *passes):
        self.passes, self.count = passes, 0

    def __iter__(self):
        self.count += 1
        return iter(self.passes[min(self.count, len(self.passes)) - 1])


def fit(model, batches, **kwargs):
    return margeq.optimize_marglik(
        model, batches,
        **{
            "n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "seed": 0,
            "optimizer_kwargs": {"lr": 0.02}, "progress": "none", **kwargs,
        },
    )  # fmt: skip


def arguments():
    """Containers of the caller, which a call might write to."""
    return {
        "optimizer_kwargs": {"lr": 0.02, "betas": (0.9, 0.99)},
        "scheduler_cls": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_kwargs": {"T_max": 18},
        "prior": {"0": "first", "3": "second"},
        "prior_prec_init": {"first": 2.0, "second": 3.0},
        "parameters": ["0", "3"],
        "kfac_approx": {"0": "reduce", "3": "expand"},
        "restarts": ["current"],
    }


def spoiled(row, column, value):
    x, y = data()
    x[row, column] = value
    return [(x[:25], y[:25]), (x[25:50], y[25:50]), (x[50:], y[50:])]


def relabelled(row, label):
    x, y = data()
    y[row] = label
    return [(x[:25], y[:25]), (x[25:50], y[25:50]), (x[50:], y[50:])]


def good():
    return relabelled(0, int(data()[1][0]))


REFUSED = {
    "D1 NaN": (lambda: spoiled(30, 2, math.nan), r"batch 1, index 5, feature \(2,\): .* nan"),
    "D1 Inf": (lambda: spoiled(59, 0, math.inf), r"batch 2, index 9, feature \(0,\): .* inf"),
    "D1 -Inf": (lambda: spoiled(0, 3, -math.inf), r"batch 0, index 0, feature \(3,\): .* -inf"),
    "D2 label": (lambda: relabelled(0, 7), r"label 7 at index 0, model has 3 outputs.*0 to 2"),
    "D2 late": (lambda: relabelled(59, -1), r"batch 2: label -1 at index 9, model has 3"),
    "D3 empty": (list, r"loader yielded 0 samples; it must be re-iterable"),
    "D3 no data": (lambda: [(torch.zeros(0, 4), torch.zeros(0).long())], "yielded 0 samples"),
    "NaN later": (
        lambda: Passes(good(), good(), spoiled(26, 1, math.nan)),
        r"batch 1, index 1, feature \(1,\)",
    ),
    "label later": (
        lambda: Passes(good(), good(), relabelled(1, 9)),
        "label 9 at index 1, model has 3 outputs",
    ),
    "D13 shorter": (
        lambda: Passes(good(), good(), good()[:2]),
        "epoch 2: the training loader yielded 50 samples, 60 in the first pass",
    ),
    "D13 longer": (
        lambda: Passes(good()[:2], good()),
        "epoch 1: the training loader yielded 60 samples, 50 in the first pass",
    ),
    "D13 gone": (lambda: Passes(good(), good(), []), "yielded 0 samples"),
    "D15 half": (
        lambda: [(data()[0], data()[1] + 0.5)],
        r"label 0\.5 at index|label 1\.5 at index|label 2\.5 at index",
    ),
    "D15 two hot": (
        lambda: [(data()[0], torch.ones(60, 3).long())],
        r"target row 0 is no one-hot label: \[1, 1, 1\]",
    ),
    "D15 uint8": (
        lambda: [((data()[0] * 20 + 100).clamp(0, 255).to(torch.uint8), data()[1])],
        r"batch 0 with inputs \(60, 4\) torch\.uint8",
    ),
    "lengths": (
        lambda: [(data()[0], data()[1][:50])],
        r"inputs \(60, 4\) and targets \(50,\) differ in their first axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_data_are_named_and_nothing_changes(case):
    build, message = REFUSED[case]
    model, given = used(), arguments()
    with unchanged(model, given), pytest.raises(DataError, match=message) as caught:
        fit(model, build(), **given)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("case", [name for name in REFUSED if "later" not in name])
def test_the_low_level_pass_names_unusable_data_too(case):
    build, _ = REFUSED[case]
    batches, model = build(), used()
    if isinstance(batches, Passes):
        pytest.skip("one pass cannot know of another")
    error = RuntimeError if case == "D15 uint8" else DataError  # torch's own: one call of a layer
    with unchanged(model), pytest.raises(error):
        accumulate(model, batches)


class Noisy(torch.utils.data.Dataset):
    """Draws from the global random states of all three, and ends with a bad label."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return torch.full((4,), noise), 7 if index == 19 else index % 3


def test_a_failure_puts_all_global_random_states_back():
    model = used()
    with unchanged(model), pytest.raises(DataError, match="label 7 at index 9"):
        fit(model, DataLoader(Noisy(), 10))


# -- D3: the loader of the evidence ----------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(30), slice(0)])
def test_an_evidence_loader_that_changes_its_length_is_refused(rows):
    x, y = data()
    evidence = Passes([(x, y)], [(x[rows], y[rows])])
    model, given = used(), arguments()
    match = "30 samples, 60 at the update before" if rows.stop else "yielded 0 samples"
    with unchanged(model, given), pytest.raises(DataError, match=match):
        fit(model, good(), marglik_loader=evidence, **given)


# -- D4–D6: what is counted ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 1, 10_000])
def test_the_length_of_a_loader_is_not_believed(length):
    """Counted are the data that come, whatever ``len`` says."""

    class Loader(Passes):
        dataset = None

    if length is not None:
        Loader.__len__ = lambda self: length  # pyright: ignore[reportAttributeAccessIssue]
    expected = fit(used(), good())
    result = fit(used(), Loader(good()))
    assert result.n_data == 60
    assert result.log_marginal_likelihood == expected.log_marginal_likelihood


@pytest.mark.parametrize("root", ["exact", "adaptive", "mc"])
@pytest.mark.parametrize("batch", [1, 59, 60, 61, 7])
def test_partial_batches_give_the_evidence_of_the_full_batch(batch, root):
    """D5 and D17, N = batch - 1, batch, batch + 1 among them; 1e-12 in float64."""
    x, y = data()
    model = used().double()
    whole = accumulate(model, [(x.double(), y)], hessian_root=root)
    loader = DataLoader(TensorDataset(x.double(), y), batch)
    state = accumulate(model, loader, hessian_root=root)
    assert worst_difference(state, whole) <= 1e-12
    prior = GaussianPrior(model)
    values = [float(log_marginal_likelihood(s, prior, Categorical())) for s in (state, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (2, 1), (6, 7), (7, 7), (8, 7)])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_training_with_one_datum_and_with_batches_one_off(n, batch, likelihood):
    x, y = data(n)
    if likelihood == "regression":
        y = x[:, :3] + 0.5
    result = fit(
        used(), DataLoader(TensorDataset(x, y), batch, shuffle=True), likelihood=likelihood
    )
    assert result.n_data == n
    assert math.isfinite(result.log_marginal_likelihood)
    assert all(math.isfinite(loss) for loss in result.history.losses)


def test_dropped_data_are_counted_out_in_training_and_evidence():
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), 25, drop_last=True)
    with pytest.warns(DataWarning, match=r"10 of 60 samples unseen.*that of 50 samples"):
        result = fit(used(), loader)
    expected = fit(used(), good()[:2])
    assert result.n_data == 50
    assert result.log_marginal_likelihood == expected.log_marginal_likelihood


# -- D7–D12 and the further rows: models of the baseline table -------------------------------------


def small(*middle):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("middle", "name"),
    [
        (lambda: nn.GRU(6, 6), r"'1\.weight_ih_l0' of 1 \(GRU\)"),
        (lambda: nn.Bilinear(6, 6, 6), r"'1\.weight' of 1 \(Bilinear\)"),
        (lambda: nn.LSTM(6, 6), r"'1\.weight_ih_l0' of 1 \(LSTM\)"),
    ],
)
def test_layers_without_a_rule_leave_everything_unchanged(middle, name):
    model, given = small(middle()), arguments() | {"parameters": "all", "prior": "layerwise"}
    given |= {"prior_prec_init": 1.0, "kfac_approx": "expand"}
    model[0].weight.grad = torch.ones(6, 4)
    with unchanged(model, given), pytest.raises(MissingRuleError, match=name) as caught:
        fit(model, good(), **given)
    assert isinstance(caught.value, NotImplementedError)
    for remedy in ("freeze", "exclude", "replace", "register"):
        assert remedy in str(caught.value)


# -- D14: other data from pass to pass -------------------------------------------------------------


def test_an_evidence_loader_with_other_data_in_each_pass_is_reported():
    x, y = data()
    noisy = Passes(*([(x + 0.01 * i, y)] for i in range(40)))
    with pytest.warns(DeterminismWarning, match="other data than at the update before") as caught:
        fit(used(), good(), marglik_loader=noisy)
    assert "without augmentation" in str(caught[0].message)


def test_other_labels_for_the_same_inputs_are_reported():
    x, y = data()
    with pytest.warns(DeterminismWarning):
        fit(used(), good(), marglik_loader=Passes([(x, y)], [(x, y.flip(0))]))


def test_another_order_of_the_same_data_is_no_other_data():
    x, y = data()
    orders = [torch.randperm(60) for _ in range(10)]
    fit(used(), good(), marglik_loader=Passes(*([(x[o], y[o])] for o in orders)))


# -- D15, D16: labels and pictures -----------------------------------------------------------------

LABELS = {
    "int32": lambda y: y.int(),
    "int16": lambda y: y.short(),
    "uint8": lambda y: y.to(torch.uint8),
    "float32": lambda y: y.float(),
    "float64": lambda y: y.double(),
    "one-hot": lambda y: nn.functional.one_hot(y, 3),
    "one-hot float": lambda y: nn.functional.one_hot(y, 3).float(),
    "column": lambda y: y[:, None],
}


@pytest.mark.parametrize("kind", LABELS)
def test_every_spelling_of_labels_gives_the_same_evidence(kind):
    x, y = data()
    expected = fit(used(), [(x, y)])
    found = fit(used(), [(x, LABELS[kind](y))])
    assert found.log_marginal_likelihood == expected.log_marginal_likelihood


class Scaled(nn.Module):
    """Takes bytes and computes with floats, as models with their own preprocessing do."""

    def forward(self, x):
        return x.double() / 255.0


def test_pictures_of_bytes_work_where_the_model_converts_them():
    torch.manual_seed(0)
    pictures, y = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 3
    net = nn.Sequential(Scaled(), nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    net.double()
    found = accumulate(net, [(pictures[:11], y[:11]), (pictures[11:], y[11:])])
    expected = accumulate(net[1:], [(pictures.double() / 255.0, y)])
    prior, inner = GaussianPrior(net), GaussianPrior(net[1:])
    assert float(log_marginal_likelihood(found, prior, Categorical())) == pytest.approx(
        float(log_marginal_likelihood(expected, inner, Categorical())), rel=1e-12
    )
    assert math.isfinite(fit(net, [(pictures, y)]).log_marginal_likelihood)


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_class_is_finite(label, outputs):
    """D16: nothing to tell apart; with a single output the evidence is that of a certain event."""
    if label >= outputs:
        pytest.skip("no such label")
    torch.manual_seed(0)
    x, _ = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
    result = fit(model, [(x, torch.full((60,), label))], n_epochs=20)
    assert math.isfinite(result.log_marginal_likelihood)
    assert result.log_marginal_likelihood <= 1e-9
    if outputs == 1:
        assert result.history.losses[-1] == 0.0


# -- D18: a thousand classes -----------------------------------------------------------------------

THOUSAND = """
import sys, warnings
import torch
from torch import nn
import margeq
torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.randn(500, 512), torch.arange(500) * 2
model = nn.Linear(512, 1000)
batches = list(zip(x.split(100), y.split(100)))
root = sys.argv[1]
if root == "mc":
    warnings.simplefilter("ignore", margeq.errors.ConvergenceWarning)
    result = margeq.optimize_marglik(
        model, batches, hessian_root=root, n_epochs=1, n_epochs_burnin=1, marglik_frequency=1,
        seed=0, progress="none",
    )
    assert result.log_marginal_likelihood < 0
else:
    batches = [(x[:4], y[:4])]
state = margeq.laplace.accumulate(model, batches, hessian_root=root)
kron = state.kron["weight"]
size = sum(t.numel() for t in (kron.grad_cov, kron.input_cov))
# of this program alone: ru_maxrss also knows the process that it was forked from
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(size, peak.split()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("root", ["mc", pytest.param("exact", marks=pytest.mark.slow)])
def test_a_thousand_classes_need_less_than_a_gigabyte(root):
    """The dense GGN of 513,000 weights would take 2.1 TB in float64, the factors 1.26 M numbers.

    Training on 500 data with the Monte-Carlo root; one pass over 4 data with all 999 columns.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", THOUSAND, root], capture_output=True, text=True, env=environment,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    numbers, kilobytes = map(int, done.stdout.split())
    assert numbers == 1000**2 + 512**2
    assert numbers * 4 <= 5.1e6  # in float32; sums are kept in float64 where that is cheap
    assert kilobytes < 1_000_000
