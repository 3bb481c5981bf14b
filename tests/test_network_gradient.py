"""Evidence gradients of hyperparameters inside the network, against double back-propagation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from margeq.accumulation import accumulate_with
from margeq.adjoint import Revisit
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError, DataError
from margeq.layers import (
    PolyphaseSubsample,
    ResidualPathways,
    SparseConv2d,
    SparseFactoredLinear2d,
)
from margeq.likelihoods import Categorical, Gaussian
from tests.network_problems import (
    Problem,
    by_double_backward,
    central_difference,
    conv,
    factored,
    network,
    problem,
)
from tests.oracles import F64, Lambda, net
from tests.random_networks import Twice


def largest(grads):
    return max(float(g.abs().max()) for g in grads.values() if g is not None)


def assert_exact(p: Problem, differences=True):
    found, expected = p.gradient(), by_double_backward(p)
    scale = largest(expected)
    assert found.keys() == p.hyper.keys() == expected.keys()
    for name, tensor in p.hyper.items():
        if expected[name] is None:
            assert not found[name].any(), name
            continue
        assert (found[name] - expected[name]).abs().max() <= 1e-10 * scale, name
        if differences:
            assert found[name].flatten()[-1].item() == pytest.approx(
                central_difference(p, tensor), rel=1e-6, abs=1e-7 * (1.0 + scale)
            )


# --- layers, activations, pooling


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        mode: lambda mode=mode: network(conv(padding_mode=mode), nn.Tanh())
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "per-filter": lambda: network(conv(per_filter=True), nn.Tanh(), factored(6, per_filter=True)),
    "anchors": lambda: network(conv(learn_anchors=True), nn.Tanh()),
    "exponential": lambda: network(conv(basis="exponential", anchors="grid"), nn.Tanh()),
    "groups": lambda: network(
        conv(channels=(2, 4), groups=2, stride=2, per_filter=True), nn.Tanh()
    ),
    "s-fc": lambda: network(
        conv(), nn.ReLU(), factored(6, learn_anchors=True), nn.Tanh(), SparseConv2d(2, 2, 2)
    ),
    "max-pool": lambda: network(conv(), nn.ReLU(), nn.MaxPool2d(2), factored(3)),
    "polyphase": lambda: network(
        conv(padding_mode="circular"), nn.ReLU(), PolyphaseSubsample(), factored(3)
    ),
    "in-place": lambda: network(conv(), nn.ReLU(inplace=True), factored(6), nn.ELU(inplace=True)),
    "pathways": lambda: network(
        ResidualPathways({"conv": conv(), "fc": SparseFactoredLinear2d(2, 3, (6, 6), (6, 6))}),
        nn.Tanh(),
    ),
    "tied": lambda: network(Twice(conv(channels=(2, 2), lengthscale=0.8)), nn.ReLU()),
    "no-bias": lambda: network(conv(bias=False), nn.Softplus(), factored(6, bias=False)),
    "linear": lambda: network(conv(), factored(6)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("likelihood", [Categorical(0.7), Gaussian(0.6, 1.3)], ids=["c", "g"])
def test_two_phases_are_double_back_propagation(name, likelihood):
    assert_exact(problem(NETWORKS[name](), 9, 2, 6, 6, likelihood=likelihood))


OPTIONS = {
    "reduce": KfacOptions(kfac_approx="reduce"),
    "reduce-one": KfacOptions(kfac_approx={"0": "reduce"}),
    "bias": KfacOptions(bias_approx="expand"),
    "positions": KfacOptions(position_fraction=0.4, seed=3),
    "positions-reduce": KfacOptions(position_fraction=0.4, kfac_approx={"2": "reduce"}),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_each_approximation_of_the_factors_has_its_own_gradient(options):
    model = network(conv(), nn.Tanh(), conv(channels=(3, 2), padding_mode="circular"), nn.ReLU())
    assert_exact(problem(model, 9, 2, 6, 6, options=OPTIONS[options]))


@pytest.mark.parametrize("splits", [(), (1,), (2, 2, 2, 2)])
def test_any_batch_split_gives_the_same(splits):
    assert_exact(problem(NETWORKS["max-pool"](), 9, 2, 6, 6, splits=splits), differences=False)


def test_a_path_that_is_off_has_no_gradient():
    model = NETWORKS["pathways"]()
    model[0].switch_off("fc")
    p = problem(model, 9, 2, 6, 6)
    assert_exact(p)
    assert not p.gradient()["0.paths.fc.basis_v.log_lengthscale"].any()


def test_a_penalty_enters_once_whatever_share_is_visited():
    model = network(conv(lengthscale_spread=0.5), nn.Tanh())
    with torch.no_grad():
        model[0].basis.log_lengthscale += 0.7
    p = problem(model, 9, 2, 6, 6)
    assert_exact(p)
    assert p.state().log_hyperprior == pytest.approx(-0.5 * (0.7 / 0.5) ** 2)


def test_single_precision_is_as_close_as_it_can_be():
    model = NETWORKS["s-fc"]()
    p = problem(model, 9, 2, 6, 6)
    expected = p.gradient()
    p.model.float()
    p.batches = [(x.float(), y) for x, y in p.batches]
    found = p.gradient()
    for name, grad in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), grad, rtol=2e-3, atol=2e-3)


# --- tensors of the user


class Gain(nn.Module):
    """Scales its input; an ordinary module that no curvature rule knows."""

    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter

    def forward(self, x):
        return x * self.parameter.exp()


@pytest.mark.parametrize("kind", ["module", "closure"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_tensors_of_the_user(kind, activation):
    gain = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))
    if kind == "closure":
        gain = gain.detach().clone()
    layers = [Gain(gain) if kind == "module" else Lambda(lambda x: x * gain.exp()) for _ in "ab"]
    model = net(layers[0], nn.Linear(2, 2), activation(), layers[1], nn.Linear(2, 3))
    gain.requires_grad_(False)
    p = problem(model, 9, 2, outside=[gain], likelihood=Gaussian(0.6))
    assert_exact(p)
    assert p.gradient()["outside[0]"].abs().min() > 1e-3
    assert not gain.requires_grad
    assert gain.grad is None


def test_a_tensor_that_nothing_depends_on_gets_zeros():
    p = problem(NETWORKS["linear"](), 9, 2, 6, 6, outside=[torch.ones(3, dtype=F64)])
    assert torch.equal(p.gradient()["outside[0]"], torch.zeros(3, dtype=F64))


# --- estimates of it


def test_the_sketch_is_unbiased():
    """300 seeds, 5 standard errors of each entry."""
    p = problem(network(conv(), nn.Tanh()), 9, 2, 6, 6)
    state, exact = p.state(), p.gradient()
    draws = [p.gradient(state, sketched=True, seed=seed) for seed in range(300)]
    for name, expected in exact.items():
        samples = torch.stack([draw[name] for draw in draws])
        error = samples.std(0) / len(samples) ** 0.5
        assert (error > 0).all()
        assert ((samples.mean(0) - expected).abs() <= 5.0 * error).all()


@pytest.mark.parametrize(("share", "period"), [(0.5, 2), (0.4, 2), (0.34, 3), (0.1, 3), (0.9, 1)])
@pytest.mark.parametrize("sized", [True, False])
def test_a_share_of_batches_is_exact_in_the_mean_over_all_offsets(share, period, sized):
    model = network(conv(lengthscale_spread=0.5), nn.Tanh())
    with torch.no_grad():
        model[0].basis.log_lengthscale += 0.7  # away from the maximum of the penalty
    p = problem(model, 9, 2, 6, 6, splits=(5, 1))
    exact, batches, state = p.gradient(), p.batches, p.state()
    if not sized:
        p.batches = type("Stream", (), {"__iter__": lambda _: iter(batches)})()
    draws = [p.gradient(state, share=share, seed=seed) for seed in range(period)]
    assert (period == 1) == torch.equal(*(next(iter(d.values())) for d in (draws[0], exact)))
    for name, expected in exact.items():
        torch.testing.assert_close(torch.stack([d[name] for d in draws]).mean(0), expected)


@pytest.mark.parametrize("root", ["adaptive", "mc"])
def test_other_roots_are_visited_with_the_exact_columns(root):
    """At the same sums: with all columns kept, adaptive sums are the exact ones."""
    options = KfacOptions(hessian_root=root, captured_trace=1.0)
    p = problem(NETWORKS["max-pool"](), 9, 2, 6, 6)
    exact, state = p.gradient(), p.state()
    for name, grad in replace(p, options=options).gradient(state).items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-12, atol=1e-12)


# --- what is left behind


class Mark(torch.autograd.Function):
    """Hands its input on, and knows how many of its nodes are alive."""

    tokens: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.token = type("Token", (), {})()
        Mark.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("sketched", [False, True])
def test_no_graph_outlives_its_batch(sketched):
    p = problem(network(conv(), Lambda(Mark.apply), nn.Tanh(), factored(6)), 9, 2, 6, 6)
    state, batches, alive = p.state(), p.batches, []

    class Watched:
        def __iter__(self):
            for batch in batches:
                alive.append(sum(token() is not None for token in Mark.tokens))
                yield batch

    Mark.tokens.clear()
    p.batches = Watched()
    p.gradient(state, sketched=sketched)
    assert len(Mark.tokens) == 3
    assert alive == [0, 0, 0]


def test_flags_modes_and_gradients_stay_as_they_are():
    p = problem(NETWORKS["s-fc"](), 9, 2, 6, 6)
    p.model.train()
    p.model[1].eval()
    state, good = p.state(), p.batches
    p.batches = [*good, (good[0][0][:, :1], good[0][1])]  # the last batch cannot be processed
    with pytest.raises(RuntimeError):
        p.gradient(state)
    p.batches = good
    p.gradient(state)
    assert [m.training for m in p.model][:3] == [True, False, True]
    assert all(t.grad is None for t in p.model.parameters())
    assert not any(t.requires_grad for t in p.hyper.values())
    assert not any(m._forward_hooks for m in p.model.modules())


def test_what_cannot_work_is_refused():
    p = problem(NETWORKS["linear"](), 9, 2, 6, 6)
    state = accumulate_with(p.model, p.batches, p.likelihood, KfacOptions(curvature="diag"))
    with pytest.raises(ConfigError, match=r"'diag'.*curvature='kfac'"):
        p.gradient(state)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"share=.* \(0, 1\]"):
            Revisit(share=share)
    state, p.batches = p.state(), type("Liar", (list,), {"__len__": lambda _: 9})(p.batches)
    with pytest.raises(DataError, match="yielded 3 batches and its length says 9"):
        p.gradient(state, share=0.1, seed=8)
