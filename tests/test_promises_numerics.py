"""Numbers: the same for every cut, order and naming, finite at the limits, also out of memory."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import margeq
from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit, network_gradient
from margeq.curvature.forms import BlockCurvature
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.errors import ConvergenceWarning, CurvatureError, NumericalWarning
from margeq.halving import Halving
from margeq.laplace import (
    accumulate,
    decompose,
    effective_parameters,
    hyper_gradient,
    log_marginal_likelihood,
)
from margeq.layers import ResidualPathways, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.parameters import named_hyperparameters
from margeq.priors import GaussianPrior
from tests.dense_evidence import random_prior
from tests.oracles import F64, data_for, net, worst_difference
from tests.random_networks import random_network

# -- N1: cuts, order, names, number of data --------------------------------------------------------


def renamed(model):
    """The same modules under other names, and a prior by the new names."""
    names = {str(i): f"layer_{len(model) - i}" for i in range(len(model))}
    copied = copy.deepcopy(model)
    return nn.Sequential(OrderedDict((names[n], m) for n, m in copied.named_children())), names


def evidence(model, batches, prior, likelihood, **options):
    state = accumulate(model, batches, likelihood, **options)
    return float(log_marginal_likelihood(state, prior, likelihood))


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    order=st.permutations(range(7)),
    cuts=st.sets(st.integers(1, 6)),
    root=st.sampled_from(["exact", "adaptive", "mc"]),
)
def test_evidence_does_not_depend_on_cuts_order_or_names(seed, order, cuts, root):
    """200 random networks, orders and cuts; relative 1e-11 in float64."""
    model, shape = random_network(seed)
    likelihood = Gaussian(0.7) if seed % 3 else Categorical()
    x, y = data_for(model, likelihood, 7, *shape)
    prior = random_prior(model)
    expected = evidence(model, [(x, y)], prior, likelihood, hessian_root=root, seed=seed)
    edges = [0, *sorted(cuts), 7]
    parts = [torch.tensor(order[a:b]) for a, b in pairwise(edges)]
    other, names = renamed(model)
    moved = GaussianPrior(other)
    moved.assign({
        f"{names[n.split('.', 1)[0]]}.{n.split('.', 1)[1]}": value
        for n, value in prior.log_prior_precision.items()
    })  # fmt: skip
    batches = [(x[part], y[part]) for part in parts]
    found = evidence(other, batches, moved, likelihood, hessian_root=root, seed=seed)
    assert found == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_data_seen_several_times_are_data_at_a_lower_temperature(copies):
    """``N`` enters through sums alone: no term of the evidence knows it besides."""
    model, shape = random_network(5)
    x, y = data_for(model, Categorical(), 6, *shape)
    prior = random_prior(model)
    several = evidence(model, [(x, y)] * copies, prior, Categorical())
    cold = Categorical(temperature=1.0 / copies)
    assert several == pytest.approx(evidence(model, [(x, y)], prior, cold), rel=1e-12)


# -- N4: ill-conditioned factors -------------------------------------------------------------------


def rotated(values):
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64)).Q
    return (basis * values) @ basis.mT


SPECTRA = {
    "condition 1e12": torch.logspace(0, -12, 6, dtype=F64),
    "condition 1": torch.ones(6, dtype=F64),
    "rank one": torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=F64),
    "zero": torch.zeros(6, dtype=F64),
    "huge": torch.logspace(300, 140, 6, dtype=F64),
}


@pytest.mark.parametrize("log_precision", [-70.0, 0.0, 70.0])
@pytest.mark.parametrize("inner", SPECTRA)
@pytest.mark.parametrize("outer", SPECTRA)
def test_ill_conditioned_factors_are_finite_and_repairs_are_counted(outer, inner, log_precision):
    model = net(nn.Linear(6, 6, bias=False))
    batch = data_for(model, Categorical(), 5, 6)
    state = accumulate(model, [batch])
    factors = [rotated(SPECTRA[name])[None] for name in (outer, inner)]
    kron = BlockKron(*factors, torch.tensor(5.0, dtype=F64), "obi", torch.finfo(F64).eps)
    prior = GaussianPrior(model)
    prior.assign({name: torch.tensor(log_precision, dtype=F64) for name in prior.groups})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = decompose(replace(state, curvature=BlockCurvature({"0.weight": kron})))
    assert bool(spectrum.clamped) == any("clamped" in str(w.message) for w in caught)
    value, gradient = hyper_gradient(spectrum, prior, Categorical())
    assert math.isfinite(value)
    assert all(math.isfinite(float(slope)) for slope in gradient.values())
    gamma = float(effective_parameters(spectrum, prior, Categorical())["0.weight"])
    assert 0.0 <= gamma <= 36.0
    if "zero" in (outer, inner):
        assert gamma == 0.0


# -- N6: half precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_factors_and_evidence_within_a_hundredth(dtype):
    """Against float64 at the same (rounded) weights and inputs; 200 data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(200, 6), torch.arange(200) % 4
    half = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(half).double()
    found = accumulate(half, [(x.to(dtype), y)])
    expected = accumulate(exact, [(x.to(dtype).double(), y)])
    for name, kron in expected.kron.items():
        assert found.kron[name].grad_cov.dtype in (torch.float32, F64)
        dense = kron.to_dense()
        assert (found.kron[name].to_dense() - dense).norm() <= 1e-2 * dense.norm()
    prior = GaussianPrior(exact)
    value = float(log_marginal_likelihood(expected, prior, Categorical()))
    assert float(log_marginal_likelihood(found, prior, Categorical())) == pytest.approx(
        value, rel=1e-2
    )


# -- N7: out of memory -----------------------------------------------------------------------------


class Hungry(nn.Module):
    """Has no room for more than some data at a time, forward, or backward after some patience.

    By then part of the failing batch has been added.
    """

    def __init__(self, room, error, backward=False, patience=2):
        super().__init__()
        self.room, self.error = room, error
        self.backward, self.patience = backward, patience
        self.sizes, self.passed = [], 0

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room and not self.backward:
            raise self.error
        if x.requires_grad and self.backward:
            x = x.clone()
            x.register_hook(self._refuse)
        return x

    def _refuse(self, grad):
        if len(grad) > self.room:
            self.passed += 1
            if self.passed > self.patience:
                self.passed = 0
                raise self.error
        return grad


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 b"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
    "numpy": MemoryError("Unable to allocate 1.00 GiB"),
}


def hungry_net(room, error="cuda", **how):
    torch.manual_seed(2)
    hungry = Hungry(room, ERRORS[error], **how)
    model = net(nn.Linear(4, 5), nn.Tanh(), hungry, nn.Linear(5, 3))
    with torch.no_grad():
        model[-1].weight *= 4.0
    return model, hungry


def eleven_and_two():
    """A batch that has to be cut unevenly, and a small one behind it."""
    torch.manual_seed(3)
    x, y = torch.randn(13, 4, dtype=F64), torch.arange(13) % 3
    return [(x[:11], y[:11]), (x[11:], y[11:])]


def difference(one, other):
    """Largest relative difference of evidence, fit and all that the curvature holds."""
    prior, likelihood = GaussianPrior(hungry_net(99)[0], prior_precision=2.0), Categorical()
    values = [float(log_marginal_likelihood(s, prior, likelihood)) for s in (one, other)]
    gaps = [abs(values[0] - values[1]) / abs(values[1])]
    if one.flavour.curvature == "kfac":
        gaps.append(worst_difference(one, other))
    elif one.flavour.curvature == "full":
        gaps.append(float((one.curvature.matrix - other.curvature.matrix).abs().max()))
    else:
        for name, block in one.curvature.blocks.items():
            gaps.append(float((block.moments - other.curvature.blocks[name].moments).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diag", "full"])
@pytest.mark.parametrize("root", ["exact", "adaptive", "mc"])
@pytest.mark.parametrize("room", [6, 3])
def test_out_of_memory_halves_the_batch_twice_and_changes_no_sum(room, root, curvature, backward):
    """Batches of 11 in halves (room 6) and in quarters (room 3); 1e-12 in float64."""
    options = {
        "curvature": curvature,
        "hessian_root": root,
        "mc_samples": 3,
        "captured_trace": 0.99,
    }
    roomy, _ = hungry_net(99)
    if curvature == "ekfac":
        options["bases"] = margeq.laplace.eigen_bases(accumulate(roomy, eleven_and_two()))
    expected = accumulate(roomy, eleven_and_two(), **options)
    model, hungry = hungry_net(room, backward=backward)
    with pytest.warns(NumericalWarning, match=f"batch of 11 .* at most {room} ") as caught:
        found = accumulate(model, eleven_and_two(), **options)
    assert len(caught) == 1
    assert difference(found, expected) <= 1e-12
    assert (found.n_data, found.checksum) == (expected.n_data, expected.checksum)
    assert found.captured_trace == pytest.approx(expected.captured_trace, rel=1e-12)
    if root != "adaptive":  # which regroups the data
        # 10: whether rows are data is asked by a run with one datum less
        assert set(hungry.sizes) <= {11, 10, 6, 5, 3, 2}


@pytest.mark.parametrize("error", ERRORS)
def test_every_allocator_is_understood(error):
    model, _ = hungry_net(6, error)
    expected = accumulate(hungry_net(99)[0], eleven_and_two())
    with pytest.warns(NumericalWarning, match="did not fit into memory"):
        assert difference(accumulate(model, eleven_and_two()), expected) <= 1e-12


def test_the_failed_batch_may_come_late():
    """What the batches before it had added by then does not count twice."""
    small, large = eleven_and_two()[1], eleven_and_two()[0]
    expected = accumulate(hungry_net(99)[0], [small, large])
    with pytest.warns(NumericalWarning):
        found = accumulate(hungry_net(6)[0], [small, large])
    assert found.n_data == 13
    assert difference(found, expected) <= 1e-12


@pytest.mark.parametrize("root", ["exact", "adaptive", "mc"])
def test_a_quarter_that_does_not_fit_is_a_typed_error(root):
    model, hungry = hungry_net(2)
    flags = [module.training for module in model.modules()]
    with pytest.raises(
        CurvatureError, match=r"batches of 11 data, halved 2 times to 3 .*batch_size below 3"
    ):
        accumulate(model, eleven_and_two(), hessian_root=root)
    assert hungry.sizes == [11, 6, 3]
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_single_data_are_not_halved():
    model, hungry = hungry_net(0)
    x, y = eleven_and_two()[0]
    with pytest.raises(CurvatureError, match="memory"):
        accumulate(model, [(x[:1], y[:1])])
    assert hungry.sizes == [1]


def test_other_errors_are_not_attempted_again():
    model, hungry = hungry_net(0)
    hungry.error = RuntimeError("a size does not match")
    with pytest.raises(RuntimeError, match="a size does not match"):
        accumulate(model, eleven_and_two())
    assert hungry.sizes == [11]


def test_what_fits_is_remembered_from_pass_to_pass():
    model, hungry = hungry_net(3)
    halving, options = Halving(), KfacOptions()
    with pytest.warns(NumericalWarning):
        accumulate_with(model, eleven_and_two(), Categorical(), options, halving=halving)
    hungry.sizes.clear()
    accumulate_with(model, eleven_and_two(), Categorical(), options, halving=halving)
    assert max(hungry.sizes) == 3


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_training_goes_on_with_smaller_batches_of_the_evidence():
    """Batches of 13 at every update, one warning, and the evidence of a run with room."""
    x, y = torch.cat([b[0] for b in eleven_and_two()]), torch.arange(13) % 3
    small = list(zip(x.split(5), y.split(5), strict=True))

    def value(room):
        return margeq.optimize_marglik(
            hungry_net(room)[0], small, marglik_loader=[(x, y)], n_epochs=4, n_epochs_burnin=1,
            marglik_frequency=1, seed=0, progress="none",
        ).log_marginal_likelihood  # fmt: skip

    expected = value(99)
    with pytest.warns(NumericalWarning) as caught:
        assert value(7) == pytest.approx(expected, rel=1e-9)
    assert len([w for w in caught if w.category is NumericalWarning]) == 1


def sparse(room, backward=False, patience=2):
    torch.manual_seed(4)
    hungry = Hungry(room, ERRORS["cuda"], backward, patience)
    model = net(SparseConv2d(1, 2, 3), nn.Tanh(), hungry, nn.Flatten(), nn.Linear(32, 3))
    return model, hungry


@pytest.mark.parametrize("how", [{}, {"sketched": True, "seed": 1}, {"share": 0.5, "seed": 1}])
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_in_the_second_phase_changes_no_gradient(backward, how):
    """Gradients in hyperparameters inside the network, 1e-11 relative in float64."""
    torch.manual_seed(5)
    x, y = torch.randn(12, 1, 6, 6, dtype=F64), torch.arange(12) % 3
    batches = list(zip(x.split([1, 9, 2]), y.split([1, 9, 2]), strict=True))
    state = accumulate(sparse(99)[0], batches)

    def gradient(room):
        model, _ = sparse(room, backward, 0 if how.get("sketched") else 2)
        return network_gradient(
            model, batches, state, GaussianPrior(model), Categorical(),
            named_hyperparameters(model), KfacOptions(), revisit=Revisit(**how),
        )  # fmt: skip

    expected = gradient(99)
    for room in (5, 3):
        with pytest.warns(NumericalWarning, match="did not fit"):
            found = gradient(room)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-11, atol=0.0)
    with pytest.raises(CurvatureError, match="memory"):
        gradient(1)


# -- N8: restarts ----------------------------------------------------------------------------------


class Overflows(nn.Module):
    """Gives infinities once path b is off."""

    def __init__(self):
        super().__init__()
        self.sum = ResidualPathways({n: nn.Linear(4, 3) for n in "abc"}, "sum")

    def forward(self, x):
        return self.sum(x) * (float("inf") if self.sum.active == ("a",) else 1.0)


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["mackay", "adam"])
@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_no_update_of_any_restart_beats_the_result_and_failures_are_listed(solver, lr):
    """Over five starts with five updates each, one of which fails."""
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()
    result = margeq.optimize_marglik(
        Overflows(), [(x, y)], n_epochs=10, n_epochs_burnin=2, marglik_frequency=2, seed=0,
        hyper_solver=solver, optimizer_kwargs={"lr": lr}, progress="none",
    )  # fmt: skip
    seen = [u.log_marginal_likelihood for r in result.restarts for u in r.history.updates]
    assert len(seen) == 20
    assert result.log_marginal_likelihood >= max(seen) - 1e-9 * abs(max(seen))
    assert result.log_marginal_likelihood == max(r.log_marginal_likelihood for r in result.restarts)
    assert result.diagnostics.failed_restarts == ("only:a",)
    failed = next(r for r in result.restarts if r.start == "only:a")
    assert (failed.kept, failed.log_marginal_likelihood) == (False, -math.inf)
    assert "NonFiniteError" in failed.error


def test_a_missing_device_is_torch_s_own_error():
    """There is no argument for devices: the model is where its user has put it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        nn.Linear(2, 2).to("cuda")


# -- convergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "n_epochs", "message"),
    [(0.05, 3, "still rises .* train longer"), (0.05, 1, "single update .* train longer")],
)
def test_an_evidence_that_still_moves_is_announced_and_no_success(lr, n_epochs, message):
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.warns(ConvergenceWarning, match=message):
        result = margeq.optimize_marglik(
            model, [(x, (x[:, 0] > 0).long())], n_epochs=n_epochs, n_epochs_burnin=0,
            marglik_frequency=1, optimizer_kwargs={"lr": lr}, seed=0, progress="none",
        )  # fmt: skip
    assert not result.success
    assert "train longer" in result.message
