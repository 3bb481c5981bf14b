"""Networks and data that are awkward for gradients inside the network, bounds and comparisons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import margeq
from margeq.adjoint import Revisit, network_gradient
from margeq.curvature import exact
from margeq.curvature.options import KfacOptions
from margeq.errors import DataError, FlavourMismatchError, UnsupportedLayerError
from margeq.laplace import accumulate, eigen_bases, log_marginal_likelihood
from margeq.layers import SparseConv2d
from margeq.likelihoods import Categorical
from margeq.parameters import named_hyperparameters
from margeq.priors import GaussianPrior
from tests.oracles import F64, net

LIKELIHOOD = Categorical()


def gradient(model, batches, state=None, options=None, **how):
    """Of the first lengthscale."""
    state = state or accumulate(model, batches)
    prior, hyper = GaussianPrior(model), named_hyperparameters(model)
    options = options or KfacOptions()
    found = network_gradient(
        model, batches, state, prior, LIKELIHOOD, hyper, options, revisit=Revisit(**how)
    )
    return float(next(iter(found.values())).flatten()[0])


def images(n_data=9, channels=1, size=6, classes=3):
    return torch.randn(n_data, channels, size, size, dtype=F64), torch.arange(n_data) % classes


def split(batch, sizes):
    return list(zip(*(t.split(sizes) for t in batch), strict=True))


@pytest.mark.parametrize("normalisation", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
def test_a_batch_of_one_behind_a_normalisation(normalisation, activation):
    model = net(
        SparseConv2d(1, 4, 3, padding=1), normalisation(4, affine=False), activation(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    batch = images()
    whole = gradient(model, [batch])
    for sizes in ([8, 1], [1] * 9):
        assert gradient(model, split(batch, sizes)) == pytest.approx(whole, rel=1e-9)


class TiedDecoder(nn.Module):
    """Uses a weight outside its module's forward, where no rule sees it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(36, 3)

    def forward(self, x):
        code = torch.tanh(self.encoder(x.flatten(1)))
        return nn.functional.linear(code, self.encoder.weight.T)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
@pytest.mark.parametrize("root", ["exact", "adaptive"])
def test_a_weight_that_is_used_elsewhere_is_refused_by_hand_too(curvature, root):
    model, (x, _) = TiedDecoder().double(), images()
    with pytest.raises(UnsupportedLayerError, match=r"encoder\.weight"):
        accumulate(model, [(x, x.flatten(1))], "regression", curvature=curvature, hessian_root=root)


class SideBranch(nn.Module):
    """Calls a layer whose output leads nowhere."""

    def __init__(self):
        super().__init__()
        self.first = SparseConv2d(1, 2, 3)
        self.nowhere, self.head = nn.Linear(32, 5), nn.Linear(32, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x)).flatten(1)
        self.nowhere(h)
        return self.head(h)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_layer_that_leads_nowhere():
    model, batch = SideBranch().double(), images()
    assert gradient(model, [batch]) == pytest.approx(gradient(model, split(batch, [5, 4])))
    result = margeq.optimize_marglik(
        model, [batch], n_epochs=2, n_epochs_burnin=1, marglik_frequency=1,
        network_gradient="exact", seed=0,
    )  # fmt: skip
    assert result.spectrum.n_data == 9


def test_training_after_inference_mode():
    model = nn.Sequential(SparseConv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).double()
    for lengthscale in named_hyperparameters(model).values():
        lengthscale.requires_grad_(False)
    x, y = images()
    with torch.inference_mode():
        model(x)
    nn.functional.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_lengthscale_of_two_layers_takes_one_step():
    model = net(
        SparseConv2d(1, 2, 3), nn.ReLU(), SparseConv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )
    model[2].basis.log_lengthscale = model[0].basis.log_lengthscale
    assert list(named_hyperparameters(model)) == ["0.basis.log_lengthscale"]
    result = margeq.optimize_marglik(
        model, [images()], n_epochs=2, n_epochs_burnin=1, marglik_frequency=1, lr_hyp=0.1,
        network_gradient="exact", seed=0,
    )  # fmt: skip
    moves = [u.hyperparameters["0.basis.log_lengthscale"][0] for u in result.history.updates]
    assert abs(moves[1] - moves[0]) == pytest.approx(0.1, rel=1e-3)


def test_a_state_of_something_else_is_refused():
    model = net(SparseConv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    batches = split(images(), [5, 4])
    reduced = accumulate(model, batches, kfac_approx="reduce")
    with pytest.raises(FlavourMismatchError, match="kfac_approx"):
        gradient(model, batches, reduced)
    with pytest.raises(FlavourMismatchError, match="kfac_approx"):
        gradient(model, batches, options=KfacOptions(kfac_approx="reduce"))
    with pytest.raises(FlavourMismatchError, match="weights"):
        gradient(model, batches, accumulate(model, batches, parameters=["0"]))
    with pytest.raises(DataError, match="5 data, 9 before"):
        gradient(model, batches[:1], accumulate(model, batches))


def test_an_empty_batch_counts_as_a_batch():
    model = net(SparseConv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    (x, y), empty = images(), torch.zeros(0, 1, 6, 6, dtype=F64)
    batches = [(x, y), (empty, y[:0])]
    shares = [gradient(model, batches, share=0.5, seed=seed) for seed in (0, 1)]
    assert sum(shares) / 2 == pytest.approx(gradient(model, batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_bases_still_give_a_bound(dtype):
    model = net(nn.Linear(4, 3))
    x = torch.randn(1, 4, dtype=F64)
    batch = (x, torch.zeros(1, dtype=torch.long))
    prior = GaussianPrior(model)
    bases = {
        name: tuple(0.9999 * side.to(dtype) for side in basis)
        for name, basis in eigen_bases(accumulate(model, [batch])).items()
    }
    state = accumulate(model, [batch], curvature="ekfac", bases=bases)
    assert state.flavour.is_bound
    dense = exact.ggn(model, [batch], LIKELIHOOD)
    occam = torch.logdet(torch.eye(len(dense)) + dense) + sum(state.square_norms.values())
    full = float(state.fit - 0.5 * occam)
    assert float(log_marginal_likelihood(state, prior, LIKELIHOOD)) <= full + 1e-12


def test_other_labels_are_other_data():
    (x, y), model = images(), net(nn.Flatten(), nn.Linear(36, 3))
    one, same, other = (accumulate(model, [(x, t)]).checksum for t in (y, y.clone(), (y + 1) % 3))
    assert one == same != other


def test_the_centre_of_the_penalty_travels_with_the_state():
    layer = SparseConv2d(1, 1, 3, lengthscale=2.0, lengthscale_spread=0.5)
    other = SparseConv2d(1, 1, 3, lengthscale=1.0, lengthscale_spread=0.5)
    other.load_state_dict(layer.state_dict())
    assert float(other.basis.log_hyperprior().detach()) == 0.0
    assert float(layer.basis.log_hyperprior().detach()) == 0.0


@pytest.mark.parametrize("names", ["log_scale", ("log_scale", "log_gain")])
def test_a_wrong_declaration_is_named(names):
    class Layer(nn.Linear):
        hyperparameter_names = names

    layer = Layer(2, 2)
    layer.log_scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(margeq.errors.ConfigError, match=r"Layer.*hyperparameter_names"):
        named_hyperparameters(nn.Sequential(layer))
