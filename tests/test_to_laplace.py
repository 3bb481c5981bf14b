"""A result becomes a laplace-torch object: same evidence, its predictives, nothing hijacked.

Wherever both libraries mean the same (expand also for biases, zero padding, one block per tensor)
every number equals laplace-torch's own; elsewhere dense algebra is the oracle.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.curvature.exact import _jacobian
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, DataWarning
from margeq.integrations.laplace_torch import to_laplace
from margeq.laplace import accumulate, log_marginal_likelihood
from margeq.layers import FactoredLinear2d, ResidualPathways, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_weights
from margeq.priors import GaussianPrior
from tests.oracles import F64, data_for, net

ROOT = Path(__file__).parent.parent
LIKELIHOODS = pytest.mark.parametrize(
    "likelihood", [Categorical(), Gaussian(0.7)], ids=["classification", "regression"]
)
FAST = {
    "n_epochs": 4,
    "n_epochs_burnin": 2,
    "marglik_frequency": 2,
    "seed": 0,
    "optimizer_kwargs": {"lr": 0.01},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore::margeq.errors.ConvergenceWarning", "ignore:By default `link_approx`:UserWarning"
)


@pytest.fixture(autouse=True)
def _oracle(laplace_torch):
    """Skips all of it where laplace-torch is not installed."""


def cnn(dtype=F64):
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, stride=2)
    return net(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).to(dtype)


def loader_for(model, likelihood, n=20, dtype=F64):
    x, y = data_for(model.double(), likelihood, n, 2, 6, 6)
    model.to(dtype)
    y = y.to(dtype) if likelihood.name == "regression" else y
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size=8)


def layerwise(model, structure="layerwise"):
    names = dict.fromkeys(GaussianPrior(model, structure).log_prior_precision)
    precisions = {name: 1.0 + 0.7 * number for number, name in enumerate(names)}
    return GaussianPrior(model, structure, precisions)


def ours_and_theirs(laplace_torch, likelihood, dtype=F64):
    """The two posteriors of one network, with settings that mean the same in both libraries."""
    model = cnn(dtype)
    loader, prior = loader_for(model, likelihood, dtype=dtype), layerwise(model)
    own = to_laplace(model, loader, prior, likelihood, KfacOptions(bias_approx="expand"))
    noise = {"sigma_noise": likelihood.sigma_noise} if likelihood.name == "regression" else {}
    precisions = torch.stack(list(prior.prior_precision.values()))
    other = laplace_torch.Laplace(
        model, likelihood.name, "all", "kron", prior_precision=precisions, **noise
    )
    other.fit(loader)
    return model, own, other


def mixed():
    """Paths of several layouts, tied factors, a bare gain and a layer without data."""
    sparse = SparseConv2d(2, 3, 3, padding=1, padding_mode="circular")
    paths = {"conv": nn.Conv2d(2, 3, 3, padding=1), "fc": FactoredLinear2d(2, 3, (4, 4), (4, 4))}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparse, self.paths = sparse, ResidualPathways(paths)
            self.grouped = nn.Conv2d(3, 6, 3, groups=3)
            self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(24, 3)
            self.gain, self.unused = nn.Parameter(torch.ones(24)), nn.Linear(2, 2)

        def forward(self, x):
            x = torch.tanh(self.sparse(x) + self.paths(x))
            return self.head(self.gain * torch.tanh(self.norm(self.grouped(x))).flatten(1))

    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def dense_variance(model, posterior, x):
    """From materialised Jacobians and the dense covariance."""
    weights = list(named_weights(model).values())
    jacobian = _jacobian(model(x), weights).detach()
    covariance = posterior.posterior_precision.to_matrix(exponent=-1)
    return torch.einsum("nkp,pq,nlq->nkl", jacobian, covariance, jacobian)


# -- parity with laplace-torch -------------------------------------------------------------------


@LIKELIHOODS
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_evidence_equals_laplace_torch(laplace_torch, likelihood, dtype):
    _, own, other = ours_and_theirs(laplace_torch, likelihood, dtype)
    expected = float(other.log_marginal_likelihood())
    assert float(own.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("pred_type", "link"),
    [("glm", "probit"), ("glm", "bridge"), ("glm", "bridge_norm"), ("glm", "mc"), ("nn", "mc")],
)
def test_predictives_of_classes_equal_laplace_torch(laplace_torch, pred_type, link, dtype):
    """Samples too: the symmetric root of the covariance is the same in any eigenvectors."""
    _, own, other = ours_and_theirs(laplace_torch, Categorical(), dtype)
    x = torch.randn(7, 2, 6, 6, dtype=dtype)
    found = []
    for posterior in (own, other):
        torch.manual_seed(3)
        found.append(posterior(x, pred_type=pred_type, link_approx=link, n_samples=20))
    assert found[0].dtype == dtype
    tolerance = 1e-10 if dtype == F64 else 1e-6
    torch.testing.assert_close(*found, rtol=0, atol=tolerance)


@pytest.mark.parametrize("joint", [False, True])
def test_predictives_of_regression_equal_laplace_torch(laplace_torch, joint):
    _, own, other = ours_and_theirs(laplace_torch, Gaussian(0.7))
    x = torch.randn(7, 2, 6, 6, dtype=F64)
    for a, b in zip(own(x, joint=joint), other(x, joint=joint), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    diagonal = own(x, diagonal_output=True)[1]
    torch.testing.assert_close(diagonal, other(x)[1].diagonal(dim1=1, dim2=2))


def test_samples_densities_and_tuning_equal_laplace_torch(laplace_torch):
    _, own, other = ours_and_theirs(laplace_torch, Categorical())
    x = torch.randn(4, 2, 6, 6, dtype=F64)
    draws = [p.sample(3, torch.Generator().manual_seed(1)) for p in (own, other)]
    torch.testing.assert_close(*draws)
    torch.testing.assert_close(own.log_prob(draws[0][0]), other.log_prob(draws[0][0]))
    values = [
        p.functional_samples(x, n_samples=5, generator=torch.Generator().manual_seed(2))
        for p in (own, other)
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(own.posterior_precision.diag(), other.posterior_precision.diag())
    for structure in ("scalar", "layerwise"):
        for posterior in (own, other):
            posterior.optimize_prior_precision(n_steps=3, prior_structure=structure)
        torch.testing.assert_close(own.prior_precision, other.prior_precision)


# -- what laplace-torch does not have ------------------------------------------------------------


@LIKELIHOODS
@pytest.mark.parametrize("structure", ["layerwise", "tied", "pathwise", "scalar"])
def test_evidence_and_variances_of_margeq_layers(likelihood, structure):
    model = mixed()
    x, y = data_for(model, likelihood, 12, 2, 4, 4)
    prior, options = layerwise(model, structure), KfacOptions()
    posterior = to_laplace(model, [(x, y)], prior, likelihood, options)
    state = accumulate(model, [(x, y)], likelihood)
    expected = float(log_marginal_likelihood(state, prior, likelihood))
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)
    mean, variance = posterior._glm_predictive_distribution(x)
    torch.testing.assert_close(mean, model(x).detach())
    torch.testing.assert_close(
        variance, dense_variance(model, posterior, x), rtol=1e-10, atol=1e-12
    )


@LIKELIHOODS
@pytest.mark.parametrize("curvature", ["ekfac", "diag"])
def test_other_flavours(likelihood, curvature):
    model = cnn()
    loader, prior = loader_for(model, likelihood), layerwise(model)
    posterior = to_laplace(model, loader, prior, likelihood, KfacOptions(curvature=curvature))
    state = accumulate(model, loader, likelihood, curvature=curvature)
    expected = float(log_marginal_likelihood(state, prior, likelihood))
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "likelihood", [Categorical(temperature=2.0), Gaussian(0.7, temperature=2.0)]
)
def test_temperature(likelihood):
    model = cnn()
    loader, prior = loader_for(model, likelihood), layerwise(model)
    posterior = to_laplace(model, loader, prior, likelihood)
    expected = float(
        log_marginal_likelihood(accumulate(model, loader, likelihood), prior, likelihood)
    )
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-10)


def test_evidence_is_differentiable_in_precisions_and_noise():
    model, likelihood = cnn(), Gaussian(0.7)
    posterior = to_laplace(model, loader_for(model, likelihood), layerwise(model), likelihood)
    logs = posterior.prior_precision.log().requires_grad_()
    log_sigma = posterior.sigma_noise.log().requires_grad_()

    def value(precisions, noise):
        return posterior.log_marginal_likelihood(precisions.exp(), noise.exp())

    assert torch.autograd.gradcheck(value, (logs, log_sigma))


# -- from a result -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "classification"},
        {"likelihood": "classification", "hessian_root": "mc", "kfac_approx": {"0": "reduce"}},
        {"likelihood": "classification", "curvature": "ekfac", "hessian_root": "exact"},
        {"likelihood": "regression", "prior": "scalar", "temperature": 1.5},
        {"likelihood": "classification", "parameters": ["2", "5.weight"]},
    ],
    ids=["adaptive", "mc", "ekfac", "regression", "subset"],
)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_a_result_hands_over_its_evidence(options, dtype):
    model = cnn(dtype)
    likelihood = Gaussian() if options["likelihood"] == "regression" else Categorical()
    loader = loader_for(model, likelihood, dtype=dtype)
    model.train()
    result = margeq.optimize_marglik(model, loader, **FAST, **options)
    posterior = result.to_laplace(loader)
    found = float(posterior.log_marginal_likelihood())
    assert found == pytest.approx(result.log_marginal_likelihood, rel=1e-6)
    assert all(module.training for module in model.modules())
    assert not hasattr(model, "output_size")
    x = next(iter(loader))[0]
    assert torch.isfinite(posterior._glm_predictive_distribution(x)[1]).all()
    assert len(posterior.sample(2)[0]) == sum(w.numel() for w in posterior.params)


def test_result_with_paths_lengthscales_and_other_data():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparse = SparseConv2d(2, 3, 3, padding=1)
            self.head = nn.Linear(48, 3)

        def forward(self, picture):
            return self.head(torch.tanh(self.sparse(picture)).flatten(1))

    x, y = torch.randn(20, 2, 4, 4), torch.randint(3, (20,))

    def as_pair(batch):
        return {"picture": batch["x"]}, batch["y"]

    result = margeq.optimize_marglik(Net(), [{"x": x, "y": y}], batch_fn=as_pair, **FAST)
    posterior = result.to_laplace([{"x": x, "y": y}])
    found = float(posterior.log_marginal_likelihood())
    assert found == pytest.approx(result.log_marginal_likelihood, rel=1e-6)
    assert posterior({"picture": x}).shape == (20, 3)
    with pytest.warns(DataWarning, match="20 other data"):
        result.to_laplace([{"x": x + 1, "y": y}])
    with torch.no_grad():
        result.model.head.weight.mul_(1.1)
    with pytest.raises(ConfigError, match=r"head\.weight.*before the model is changed"):
        result.to_laplace([{"x": x, "y": y}])


# -- what must not happen ------------------------------------------------------------------------

FRESH = """
import torch, margeq
from benchmarks.peers import import_laplace
laplace = import_laplace()
from margeq import GaussianPrior, Categorical
from margeq.integrations.laplace_torch import to_laplace
model = torch.nn.Linear(2, 2)
def theirs():
    return type(laplace.Laplace(model, "classification", "all", "kron")).__name__
before = theirs()
own = to_laplace(model, [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))],
                 GaussianPrior(model), Categorical())
assert isinstance(own, laplace.KronLaplace)
built = laplace.Laplace(model, "classification", "all", "margeq_kron")
print(before, *(theirs() for _ in range(5)), type(own).__name__, type(built).__name__)
"""


def test_laplace_torch_keeps_its_own_class():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["KronLaplace"] * 6 + ["MargeqKronLaplace"] * 2


def test_import_of_margeq_does_not_import_laplace_torch():
    code = (
        "import sys; from margeq import optimize_marglik, MargLikResult; import margeq.integrations"
        ".laplace_torch; print('laplace' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"


def test_sampling_leaves_the_model_as_it_was():
    model = cnn()
    loader = loader_for(model, Categorical())
    posterior = to_laplace(model, loader, layerwise(model), Categorical())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model[1].eval()
    posterior(next(iter(loader))[0], pred_type="nn", link_approx="mc", n_samples=2)
    posterior.predictive_samples(next(iter(loader))[0], pred_type="nn", n_samples=2)
    with pytest.raises(RuntimeError):
        posterior(torch.zeros(2, 5, dtype=F64), pred_type="nn", link_approx="mc", n_samples=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [module.training for module in model] == [True, False, True, True, True, True]


def test_state_dict_round_trip(laplace_torch):
    model, likelihood = cnn(), Gaussian(0.7)
    posterior = to_laplace(model, loader_for(model, likelihood), layerwise(model), likelihood)
    file = io.BytesIO()
    torch.save(posterior.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = laplace_torch.Laplace(model, "regression", "all", "margeq_kron")
    other.load_state_dict(state)
    x = torch.randn(3, 2, 6, 6, dtype=F64)
    assert torch.equal(other(x)[1], posterior(x)[1])
    expected = posterior.log_marginal_likelihood()
    assert torch.equal(other.log_marginal_likelihood(), expected)
    wrong = {
        "cls_name": ("KronLaplace", "build that class"),
        "likelihood": ("classification", "likelihood='classification'"),
        "temperature": (2.0, r"temperature=2\.0"),
        "mean": (state["mean"] + 1, "other weights"),
        "H": (state["H"][1:], "this posterior about"),
    }
    for key, (value, message) in wrong.items():
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict({**state, key: value})


def test_a_posterior_can_be_fitted_by_laplace_torch_s_own_call(laplace_torch):
    model, likelihood = cnn(), Categorical()
    loader = loader_for(model, likelihood)
    posterior = laplace_torch.Laplace(
        model, "classification", "all", "margeq_kron", prior_precision=2.0
    )
    posterior.fit(loader)
    prior = GaussianPrior(model, prior_precision=2.0)
    expected = log_marginal_likelihood(accumulate(model, loader, likelihood), prior, likelihood)
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-10)


def test_refusals(laplace_torch):
    model, likelihood = cnn(), Categorical()
    loader, prior = loader_for(model, likelihood), layerwise(model)
    with pytest.raises(ConfigError, match="curvature='full' has no Kronecker form"):
        to_laplace(model, loader, prior, likelihood, KfacOptions(curvature="full"))
    state = accumulate(model, loader, likelihood, curvature="full")
    with pytest.raises(ConfigError, match="FullCurvature has no block per weight"):
        to_laplace(model, state, prior, likelihood)
    with pytest.raises(ConfigError, match="Gaussian likelihood, not of Categorical"):
        to_laplace(model, accumulate(model, [(torch.zeros(2, 2, 6, 6, dtype=F64),
            torch.zeros(2, 3, dtype=F64))], "regression"), prior, likelihood)  # fmt: skip
    build = laplace_torch.Laplace
    for option in ({"enable_backprop": True}, {"damping": True}, {"backend": object}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            build(model, "classification", "all", "margeq_kron", **option)
    unfitted = build(model, "classification", "all", "margeq_kron")
    for call in (unfitted.log_marginal_likelihood, unfitted.state_dict, unfitted.sample):
        with pytest.raises(ConfigError, match="not fitted"):
            call()
    with pytest.raises(ConfigError, match="override=False"):
        unfitted.fit(loader, override=False)
    with pytest.raises(ConfigError, match="the state is about"):
        unfitted.fit_state(accumulate(model, loader, parameters=["5"]))


def test_penalty_of_hyperparameters_belongs_to_the_evidence():
    class Penalised(nn.Linear):
        def log_hyperprior(self):
            return torch.tensor(-3.5)

    model, likelihood = net(nn.Linear(4, 3)), Categorical()
    batch, prior = data_for(model, likelihood, 9, 4), GaussianPrior(model)
    plain = to_laplace(model, [batch], prior, likelihood).log_marginal_likelihood()
    model[0].log_hyperprior = Penalised(1, 1).log_hyperprior
    penalised = to_laplace(model, [batch], prior, likelihood).log_marginal_likelihood()
    assert float(penalised - plain) == pytest.approx(-3.5)
