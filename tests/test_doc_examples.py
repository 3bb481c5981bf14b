"""The Python in the documents runs: with few data, and for two epochs."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import margeq
from margeq import data
from tests.documents import DOCS, ROOT, python_blocks
from tests.test_trackers import FakeModule

FEW = 40
QUICK = {"n_epochs": 2, "n_epochs_burnin": 0, "marglik_frequency": 1, "progress": "none"}
FIXED = {"hyper_solver": "fixed"}  # few data take MacKay's steps long to settle

pytestmark = [
    pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::margeq.errors.NumericalWarning"),
]
_REPORTS: list[str] = []
"""What would have been written; other tests draw reports."""


@pytest.fixture(autouse=True)
def _few_data_and_epochs(monkeypatch, tmp_path):
    """Whatever a document asks for; files go to a directory of their own."""
    train, place = margeq.optimize_marglik, data.place_digits

    def few(*arguments, **options):
        task = place(*arguments, **options)
        return replace(
            task, train_images=task.train_images[:FEW], train_labels=task.train_labels[:FEW],
            test_images=task.test_images[:FEW], test_labels=task.test_labels[:FEW],
        )  # fmt: skip

    def quick(*arguments, **options):
        solver = {} if "hyperparameters" in options else FIXED
        return train(*arguments, **(options | QUICK | solver))

    monkeypatch.setattr(margeq, "optimize_marglik", quick)
    monkeypatch.setattr(data, "place_digits", few)
    monkeypatch.setattr(margeq.MargLikResult, "report", lambda self, path: _REPORTS.append(path))
    _REPORTS.clear()
    monkeypatch.chdir(tmp_path)


def run(page, **names):
    """The names that the blocks of a page, one after the other, leave behind."""
    blocks = python_blocks(page)
    assert blocks
    space = {"__name__": "document", **names}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), space)
    return space


def pictures_of(size):
    return torch.randn(4, 1, size, size), torch.tensor([0, 1, 2, 3])


def test_readme(laplace_torch):
    found = run(ROOT / "README.md")
    assert set(found["result"].selected) == {"0", "3"}  # of the relaxed network
    assert found["probabilities"].shape == (5, 10)
    assert _REPORTS == ["runs/first"]
    assert not any(type(m).__module__.startswith("margeq") for m in found["shipped"].modules())


def test_tutorial(capsys):
    found = run(DOCS / "tutorial.md")
    assert _REPORTS == ["runs/first"]
    assert set(found["answer"].selected) == {"0", "2"}
    assert len(found["result"].restarts) == 4
    assert capsys.readouterr().out.count("verdict") == 3
    shown = (DOCS / "tutorial.md").read_text()
    for layer in ("0", "2"):  # the table of the page is about the network of the page
        for path, module in found["network"](10)[int(layer)].paths.items():
            count = sum(parameter.numel() for parameter in module.parameters())
            assert re.search(rf"^{layer} +{path} +{count:,} ", shown, re.MULTILINE)


def test_low_level():
    found = run(DOCS / "low-level.md")
    assert torch.isfinite(found["value"])
    assert found["gradients"]


def test_own_layer():
    found = run(DOCS / "own-layer.md")
    assert found["block"](torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    x = torch.randn(20, 5)
    result = margeq.optimize_marglik(
        found["Smooth"](5), [(x, x[:, :1])], likelihood="regression", hyperparameters=(), seed=0
    )
    assert list(result.hyperparameters) == ["log_width"]


def test_relax_and_harden():
    images, labels = pictures_of(8)
    found = run(DOCS / "relax-and-harden.md", train_loader=[(images, labels)])
    assert found["plain"](images).shape == (4, 10)


def test_groups():
    images, _ = pictures_of(28)
    found = run(DOCS / "groups.md", pictures=images)
    assert found["model"](images).shape == (4, 10)


def test_partial():
    found = run(DOCS / "partial.md", train_loader=[pictures_of(28)])
    assert set(found["result"].learned_subsets)


class Gained(nn.Module):
    """A sparsified layer, and a gain that is no weight."""

    def __init__(self, gain):
        super().__init__()
        self.conv = margeq.layers.SparseConv2d(3, 6, 3, padding=1, anchors=0.5)
        self.gain = gain

    def forward(self, x):
        return self.gain[0] * self.conv(x).mean((-2, -1))


def test_hyperparameters():
    gain = torch.ones(())
    loader = [(torch.randn(6, 3, 6, 6), torch.arange(6))]
    names = {"model": Gained([gain]), "train_loader": loader, "my_gain": gain}
    found = run(DOCS / "hyperparameters.md", **names)
    inside = {"conv.basis.log_lengthscale", "hyperparameters[0]"}
    assert set(found["result"].hyperparameters) == inside


def test_callbacks(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    trackio = FakeModule()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    loader = [(torch.randn(20, 3), torch.arange(20) % 2)]
    run(DOCS / "callbacks.md", margeq=margeq, model=nn.Linear(3, 2), train_loader=loader)
    assert capsys.readouterr().out
    assert (tmp_path / "events.jsonl").read_text().count('"epoch"') >= 2
    assert trackio.runs[0].logged
    assert list((tmp_path / "runs" / "first" / "tensorboard" / "current").iterdir())
