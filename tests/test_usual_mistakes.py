"""Mistakes of a first hour are met with the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.errors import ConfigError, DataError

# labels of noise: the evidence is that of guessing
pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(12) % 2


class FromList(torch.utils.data.Dataset):
    """Yields whole batches, as any sequence does."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return X[6 * index : 6 * index + 6], LABELS[6 * index : 6 * index + 6]


def network(n_outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double()


def optimize(model, loader, **settings):
    settings = {"n_epochs": 4, "n_epochs_burnin": 2, "seed": 0, **settings}
    return margeq.optimize_marglik(model, loader, **settings)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (TensorDataset(X, LABELS), r"batch 0 is a single sample.*DataLoader\(dataset"),
        ((X, LABELS), r"batch 0 is a Tensor.*\[\(inputs, targets\)\]"),
        ([{"image": X, "label": LABELS}], r"dict with the keys 'image', 'label'.*batch_fn"),
        ([(X.numpy(), LABELS.numpy())], r"tuple of 2 \(ndarray, ndarray\).*tensor targets"),
        (DataLoader(TensorDataset(X), 4), r"list of 1 \(Tensor\)"),
        ([(X, X, X, X, X)], r"tuple of 5 \(Tensor, Tensor, Tensor, Tensor, …\)"),
        ([(X.float(), LABELS)], r"the weights are torch\.float64: convert the inputs"),
        ([(X.abs().byte(), LABELS)], r"the weights are torch\.float64: convert the inputs"),
    ],
)
def test_loader_that_yields_no_pairs_of_its_kind(loader, message):
    with pytest.raises(DataError, match=message):
        optimize(network(), loader)


def test_data_set_of_batches_is_a_loader():
    assert optimize(network(), FromList(), n_epochs=12).n_data == 12


def test_wrong_width_is_no_matter_of_dtype():
    with pytest.raises(DataError, match="cannot process") as caught:
        optimize(network(), [(X[:, :2], LABELS)])
    assert "convert" not in str(caught.value)


def test_real_targets_without_a_likelihood_are_pointed_to_regression():
    with pytest.raises(DataError, match="likelihood='regression'"):
        optimize(network(1), [(X, X[:, :1])])
    with pytest.raises(DataError) as caught:
        optimize(network(), [(X, LABELS + 5)])
    assert "regression" not in str(caught.value)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda net: net[2].parameters(), r"holds a Parameter.*here '2\.weight'"),
        (lambda net: [net[2].bias], r"here '2\.bias'"),
        (lambda net: [net[2]], r"holds a Linear.*here '2'"),
        (lambda net: net[2], r"holds a Linear.*here '2'"),
        (lambda net: [3], r"holds a int.*of the model instead$"),
    ],
)
def test_parameters_by_tensor_are_told_their_names(choose, message):
    net = network()
    with pytest.raises(ConfigError, match=message):
        optimize(net, [(X, LABELS)], parameters=choose(net))


def test_names_come_from_any_iterable():
    result = optimize(network(), [(X, LABELS)], parameters=(n for n in ["2"]), n_epochs=12)
    assert result.parameters == ("2",)
    assert set(result.prior.groups) == {"2.weight", "2.bias"}


def test_result_prints_as_a_few_lines():
    result = optimize(network(), [(X, LABELS)], n_epochs=12)
    shown = repr(result)
    assert shown == str(result)
    assert len(shown.splitlines()) <= 6
    assert f"{result.log_marginal_likelihood:.2f} nats" in shown
    assert f"{result.log_marginal_likelihood / 12:.4g} per datum of 12" in shown
    assert result.message in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100
