"""``backend="backpack"`` and ``"asdl"``: the same factors as margeq's own, from other libraries.

To 1e-10 in float64 and 1e-6 in float32, batch by batch, for standard and for margeq layers; what
a library cannot do is an error that names the layer, never a silent omission.
"""

from __future__ import annotations

import importlib
from copy import deepcopy

import pytest
import torch
from torch import nn

import margeq
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, MissingRuleError, UnsupportedLayerError
from margeq.integrations import borrowed
from margeq.laplace import accumulate, decompose, log_marginal_likelihood
from margeq.layers import FactoredLinear2d, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.priors import GaussianPrior
from tests.layer_cases import LAYER_CASES
from tests.oracles import F64, data_for, net, worst_difference

BACKENDS = pytest.mark.parametrize("backend", ["backpack", "asdl"])
LIKELIHOODS = pytest.mark.parametrize(
    "likelihood", [Categorical(), Gaussian()], ids=["classification", "regression"]
)


@pytest.fixture(autouse=True)
def _libraries():
    pytest.importorskip("backpack")
    pytest.importorskip("asdl")


def mlp():
    return net(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)
    ), (5,)


def cnn():
    return net(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1, stride=2, bias=False), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(12, 3),
    ), (2, 6, 6)  # fmt: skip


def unusual():
    """Padding, groups, dilation and activations that neither library knows."""
    return net(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(inplace=True), nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 2, dilation=2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3),
    ), (2, 6, 6)  # fmt: skip


def margeq_layers():
    return net(
        SparseConv2d(2, 3, 3, padding=1), nn.Tanh(), FactoredLinear2d(3, 2, (4, 4), (3, 3)),
        nn.Tanh(), nn.Flatten(), nn.Linear(18, 3),
    ), (2, 4, 4)  # fmt: skip


def other_dimensions():
    return net(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(6, 3)), (
        2,
        6,
    )


NETWORKS = pytest.mark.parametrize("network", [mlp, cnn, unusual, margeq_layers, other_dimensions])


@BACKENDS
@LIKELIHOODS
@NETWORKS
@pytest.mark.parametrize("bias_approx", ["exact", "expand"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-6)])
def test_factors_are_margeq_s_own(backend, likelihood, network, bias_approx, dtype, tolerance):
    model, shape = network()
    x, y = data_for(model.eval(), likelihood, 9, *shape)
    model.to(dtype)
    x, y = x.to(dtype), y.to(dtype) if likelihood.name == "regression" else y
    own = accumulate(model, [(x, y)], likelihood, bias_approx=bias_approx)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = accumulate(model, batches, likelihood, bias_approx=bias_approx, backend=backend)
    assert worst_difference(found, own) < tolerance
    for name, block in own.kron.items():
        assert (found.kron[name].layout, found.kron[name].numel) == (block.layout, block.numel)
    assert found.checksum == own.checksum
    assert found.n_data == 9
    found.flavour.require_same(own.flavour)
    prior = GaussianPrior(model)
    expected = float(log_marginal_likelihood(own, prior, likelihood))
    evidence = float(log_marginal_likelihood(found, prior, likelihood))
    assert evidence == pytest.approx(expected, rel=1e-6)


REFUSED = {
    # functions between modules
    "backpack": {"MultiheadAttention", "SubgroupConv2d"},
    "asdl": {"MultiheadAttention"},
}


@BACKENDS
@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_every_layer_type(backend, case):
    """In float64 under a head."""
    layer = case.make().double()
    features = layer(torch.zeros(case.input_shape, dtype=F64)).flatten(1).shape[1]
    model = net(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)).eval()
    batch = data_for(model, Categorical(), *case.input_shape)
    own = accumulate(model, [batch])
    if case.name.split("-")[0] in REFUSED[backend]:
        with pytest.raises(UnsupportedLayerError, match="use backend='margeq'"):
            accumulate(model, [batch], backend=backend)
    else:
        assert worst_difference(accumulate(model, [batch], backend=backend), own) < 1e-10


@BACKENDS
def test_nothing_of_the_model_is_changed(backend):
    model, shape = unusual()
    batch = data_for(model.eval(), Categorical(), 9, *shape)
    model.train()
    model[1].eval()
    flags, state = [m.training for m in model.modules()], deepcopy(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    accumulate(model, [batch], backend=backend)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_asdl_has_its_table_back():
    core = importlib.import_module("asdl.core")
    before = core.get_op_class, core.module_wise_assignments
    model, shape = mlp()
    accumulate(model, [data_for(model, Categorical(), 9, *shape)], backend="asdl")
    assert (core.get_op_class, core.module_wise_assignments) == before


@BACKENDS
def test_part_of_the_weights(backend):
    model, shape = cnn()
    model[0].weight.requires_grad_(False)
    batch = data_for(model, Categorical(), 9, *shape)
    own = accumulate(model, [batch], parameters=["0", "6.bias"])
    found = accumulate(model, [batch], parameters=["0", "6.bias"], backend=backend)
    assert list(found.kron) == ["0.bias", "6.bias"]
    assert worst_difference(found, own) < 1e-10


@BACKENDS
@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_training_is_the_same(backend):
    model, shape = mlp()
    batch = data_for(model, Categorical(), 30, *shape)
    results = [
        margeq.optimize_marglik(
            deepcopy(model), [batch], hessian_root="exact", n_epochs=3, n_epochs_burnin=1,
            marglik_frequency=1, seed=0, backend=name,
        )
        for name in ("margeq", backend)
    ]  # fmt: skip
    values = [result.log_marginal_likelihood for result in results]
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    assert abs(results[0].log_bayes_factor(results[1])) < 1e-6


# -- what is refused -----------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(
    "option",
    [
        {"hessian_root": "mc", "mc_samples": 10},
        {"hessian_root": "adaptive"},
        {"curvature": "ekfac"},
        {"kfac_approx": "reduce"},
        {"position_fraction": 0.5},
    ],
)
def test_options_that_other_libraries_do_not_have(backend, option):
    with pytest.raises(ConfigError, match=rf"backend='{backend}' has {next(iter(option))}="):
        KfacOptions(backend=backend, **option)


def test_unknown_back_end():
    model, shape = mlp()
    batch = data_for(model, Categorical(), 9, *shape)
    with pytest.raises(ConfigError, match="backend='other': use one of"):
        accumulate(model, [batch], backend="other")
    with pytest.raises(ConfigError, match="backend='other'"):
        margeq.optimize_marglik(model, [batch], backend="other", hessian_root="exact")
    with pytest.raises(ConfigError, match=r"give it to curvature=KfacOptions"):
        margeq.optimize_marglik(model, [batch], backend="asdl", curvature=KfacOptions())


class Functional(nn.Module):
    """Calls a function between its modules, which BackPACK cannot see."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(x + self.one(x))


class Doubled(nn.Module):
    """A silent error: memory is shared, so that a changed value would look like the module's."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(self.one(x).mul_(2.0))


@pytest.mark.parametrize("network", [Functional, Residual, Doubled])
def test_functions_between_modules(network):
    model = network().double()
    batch = data_for(model, Categorical(), 9, 5)
    own = accumulate(model, [batch])
    assert worst_difference(accumulate(model, [batch], backend="asdl"), own) < 1e-10
    with pytest.raises(UnsupportedLayerError, match="backend='backpack'"):
        accumulate(model, [batch], backend="backpack")


@BACKENDS
def test_layer_called_twice(backend):
    layer = nn.Linear(4, 4)
    model = net(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    batch = data_for(model, Categorical(), 9, 4)
    with pytest.raises(UnsupportedLayerError, match=r"0 \(Linear\) is called several times"):
        accumulate(model, [batch], backend=backend)


@BACKENDS
def test_bare_parameter(backend):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.gain * x

    model = net(Gain(), nn.Tanh(), nn.Linear(5, 3))
    batch = data_for(model, Categorical(), 9, 5)
    with pytest.raises(MissingRuleError, match=r"0 \(Gain\) is no layer that backend="):
        accumulate(model, [batch], backend=backend)


@BACKENDS
def test_unused_weight(backend):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Part().double()
    batch = data_for(model, Categorical(), 9, 5)
    with pytest.raises(MissingRuleError, match=r"no curvature for unused\.bias, unused\.weight"):
        accumulate(model, [batch], backend=backend)


def test_a_wrong_factor_of_the_library_does_not_pass(monkeypatch):
    """ASDL's division by the number of positions is taken away: 16 times too large."""
    conv = importlib.import_module("asdl.operations").Conv2d
    right = conv.cov_kron_A
    wrong = staticmethod(lambda module, data: right(module, data) * data.shape[-1])
    monkeypatch.setattr(conv, "cov_kron_A", wrong)
    model = net(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    batch = data_for(model, Categorical(), 9, 1, 6, 6)
    with pytest.raises(UnsupportedLayerError, match=r"gives '0\.weight' factors with trace"):
        accumulate(model, [batch], backend="asdl")


@pytest.mark.parametrize(
    ("backend", "package"), [("backpack", "backpack-for-pytorch"), ("asdl", "asdfghjkl")]
)
def test_versions(backend, package, monkeypatch):
    model, shape = mlp()
    batch = data_for(model, Categorical(), 9, *shape)
    monkeypatch.setattr(borrowed, "version", lambda name: "9.9")
    with pytest.raises(ConfigError, match=rf"{package} 9\.9 is installed; .* known for"):
        accumulate(model, [batch], backend=backend)

    def missing(name):
        raise borrowed.PackageNotFoundError(name)

    monkeypatch.setattr(borrowed, "version", missing)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        accumulate(model, [batch], backend=backend)


def test_sums_without_data_are_zero():
    from margeq.accumulation import empty_state

    model, shape = mlp()
    batch = data_for(model, Categorical(), 9, *shape)
    options = KfacOptions(backend="asdl")
    none = empty_state(model, Categorical(), options)
    state = accumulate(model, [batch], backend="asdl")
    assert worst_difference(none + state, state) == 0.0
    assert decompose(none).clamped == 0
