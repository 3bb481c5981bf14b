"""Roots of the output Hessian: exact, adaptive and Monte Carlo; float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from margeq import data_pass
from margeq.curvature.packing import ColumnPlan, kept_columns, like_groups, regrouped
from margeq.curvature.roots import (
    GaussianRoot,
    MonteCarloGaussianRoot,
    MonteCarloSoftmaxRoot,
    SoftmaxRoot,
    TraceHistogram,
)
from margeq.curvature.sampling import checksum, sample_keys, sample_positions, uniforms
from margeq.laplace import accumulate
from margeq.likelihoods import Categorical, Gaussian
from tests.oracles import F64, data_for, net, relative_error, worst_difference


def matrix(root, n_data):
    """The root of each datum, ``[n, K, v]``."""
    everyone = torch.arange(n_data)
    columns = [root.columns(everyone, torch.full((n_data,), v)) for v in range(root.n_columns)]
    return torch.stack(columns, -1)


def gram(root, n_data):
    columns = matrix(root, n_data)
    return columns @ columns.mT


# --- exact roots


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 50.0])
def test_softmax_root_is_the_hessian(n_classes, scale):
    logits = scale * torch.randn(8, n_classes, dtype=F64)
    root = SoftmaxRoot(logits)
    assert root.n_columns == n_classes - 1
    expected = Categorical().hessian(logits)
    torch.testing.assert_close(gram(root, 8), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    "root", [SoftmaxRoot, GaussianRoot, lambda f: MonteCarloSoftmaxRoot(f, torch.arange(6), 4)]
)
def test_square_norms_are_those_of_the_columns(root):
    built = root(2.0 * torch.randn(6, 5, dtype=F64))
    expected = matrix(built, 6).square().sum(1)
    torch.testing.assert_close(built.square_norms(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_confident_predictions_stay_finite(dtype):
    logits = torch.zeros(3, 4, dtype=dtype)
    logits[0, 1] = logits[1, 2] = 50.0
    logits[2] = torch.tensor([50.0, 50.0, -50.0, -500.0])
    logits.requires_grad_(True)
    root = SoftmaxRoot(logits)
    columns = matrix(root, 3)
    assert columns.dtype == dtype
    assert torch.isfinite(columns).all()
    assert torch.isfinite(root.square_norms()).all()
    exact = Categorical().hessian(logits.detach().double())
    # 1 - p of the sure class is below float64's resolution of p: an absolute comparison
    torch.testing.assert_close(gram(root, 3).double(), exact, rtol=0.0, atol=1e-7)


def test_gaussian_root_is_the_identity():
    outputs = torch.randn(4, 3, dtype=F64)
    assert torch.equal(gram(GaussianRoot(outputs), 4), Gaussian().hessian(outputs))


# --- Monte Carlo: 40,000 samples, means within 5 standard errors of each entry

N_SAMPLES = 40_000


def assert_unbiased(samples, expected):
    """``samples [M, ...]`` average to ``expected`` within 5 standard errors (and 1e-12)."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() <= 5.0 * error + 1e-12).all()


@pytest.mark.parametrize("n_columns", [1, 3])
def test_monte_carlo_softmax_root_is_unbiased(n_columns):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]], dtype=F64).expand(N_SAMPLES, -1)
    root = MonteCarloSoftmaxRoot(logits, torch.arange(N_SAMPLES), n_columns)
    assert root.n_columns == n_columns
    assert_unbiased(gram(root, N_SAMPLES), Categorical().hessian(logits[:1])[0])


@pytest.mark.parametrize("n_columns", [1, 3])
def test_monte_carlo_gaussian_root_is_unbiased(n_columns):
    outputs = torch.zeros(N_SAMPLES, 3, dtype=F64)
    root = MonteCarloGaussianRoot(outputs, torch.arange(N_SAMPLES), n_columns)
    assert_unbiased(gram(root, N_SAMPLES), torch.eye(3, dtype=F64))


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["softmax", "squares"])
def test_monte_carlo_factors_are_unbiased(likelihood):
    """300 seeds, 5 standard errors."""
    model = net(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    batch = data_for(model, likelihood, 6, 3)
    exact = accumulate(model, [batch], likelihood).kron
    draws = [accumulate(model, [batch], likelihood, hessian_root="mc", seed=s) for s in range(300)]
    for name, kron in exact.items():
        samples = torch.stack([draw.kron[name].grad_cov for draw in draws])
        assert_unbiased(samples, kron.grad_cov)
        assert relative_error(draws[0].kron[name].input_cov, kron.input_cov) <= 1e-12


# --- the adaptive root


def histogram(*parts):
    built = TraceHistogram()
    for part in parts:
        built.add(part)
    return built


@given(
    st.lists(st.floats(1e-30, 1e3), min_size=1, max_size=50),
    st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_threshold_keeps_at_least_the_share(norms, share):
    values = torch.tensor(norms, dtype=F64)
    edge, reported = histogram(values).threshold(share)
    kept = float(values[values > edge].sum() / values.sum())
    assert kept >= share * (1 - 1e-12)
    assert reported == pytest.approx(kept, rel=1e-9)


def test_threshold_keeps_at_most_one_bin_too_many():
    values = torch.rand(5000, dtype=F64) ** 4
    edge, _ = histogram(values).threshold(0.9)
    one_bin_higher = values > edge * 2 ** (1.01 / 8)
    assert float(values[one_bin_higher].sum() / values.sum()) < 0.9


def test_histogram_is_additive():
    values = torch.rand(40, 3, dtype=F64)
    parts = histogram(values[:7], values[7:8], values[8:])
    assert parts.threshold(0.9) == pytest.approx(histogram(values).threshold(0.9), rel=1e-14)


@pytest.mark.parametrize("value", [1.0, 0.5, 0.25, 3.0**-1, 0.1])
def test_columns_of_one_size_are_all_kept(value):
    edge, share = histogram(torch.full((6, 3), value, dtype=F64)).threshold(0.999)
    assert edge < value
    assert share == 1.0


def test_histogram_of_nothing_keeps_everything():
    assert histogram(torch.zeros(3, 2)).threshold(0.999) == (0.0, 1.0)


def confident_net(likelihood, n_data=24):
    model = net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    with torch.no_grad():
        model[2].weight *= 6.0
    return model, data_for(model, likelihood, n_data, 4)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_adaptive_root_captures_the_share(share):
    model, batch = confident_net(Categorical())
    exact = accumulate(model, [batch])
    state = accumulate(model, [batch], hessian_root="adaptive", captured_trace=share)
    assert share <= state.captured_trace <= 1.0
    # the head's bias block is the sum of the output Hessians: its trace is the captured one
    found, whole = (float(s.kron["2.bias"].to_dense().trace()) for s in (state, exact))
    assert found / whole == pytest.approx(state.captured_trace, rel=1e-9)
    assert worst_difference(state, exact) > 1e-6


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["softmax", "squares"])
def test_adaptive_root_that_keeps_everything_is_exact(likelihood):
    model, batch = confident_net(likelihood)
    state = accumulate(model, [batch], likelihood, hessian_root="adaptive", captured_trace=1.0)
    assert state.captured_trace == 1.0
    assert worst_difference(state, accumulate(model, [batch], likelihood)) <= 1e-12


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["softmax", "squares"])
def test_adaptive_root_of_an_untrained_head_keeps_its_columns(likelihood):
    """Equal outputs give equal columns, whose size may lie on the edge of a bin."""
    for n_outputs in (2, 4):
        model = net(nn.Linear(4, n_outputs))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        batch = data_for(model, likelihood, 6, 4)
        state = accumulate(model, [batch], likelihood, hessian_root="adaptive")
        exact = accumulate(model, [batch], likelihood)
        assert worst_difference(state, exact) <= 0.04
        assert state.captured_trace >= 0.999


def test_kept_columns_come_largest_first():
    root = SoftmaxRoot(3.0 * torch.randn(9, 6, dtype=F64))
    order, counts = kept_columns(root, 0.01)
    norms = root.square_norms().gather(1, order)
    assert (norms[:, :-1] >= norms[:, 1:]).all()
    assert torch.equal(counts, (norms > 0.01).sum(1))


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@given(COUNTS, st.integers(1, 16))
def test_groups_hold_each_datum_once(counts, largest):
    groups = like_groups(torch.tensor(counts), largest)
    assert all(0 < len(group) <= largest for group in groups)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(counts)))


@given(COUNTS, st.integers(1, 16))
def test_regrouping_keeps_the_data_that_need_a_column(counts, size):
    inputs, needed = torch.arange(len(counts))[:, None], torch.tensor(counts)
    batches = zip(inputs.split(size), needed.split(size), strict=True)
    found = [int(datum) for group in regrouped(batches) for datum in group]
    assert sorted(found) == [number for number, count in enumerate(counts) if count]


def test_plan_remembers_the_number_of_columns_by_content():
    plan, keys = ColumnPlan(0.75), torch.tensor([70, -3, 12])
    plan.add(keys[:2], torch.tensor([[4.0, 4.0], [8.0, 1.0]], dtype=F64))
    plan.add(keys[2:], torch.tensor([[2.0, 1.0]], dtype=F64))
    plan.close()
    assert plan.captured == 0.8
    assert plan.counts(torch.tensor([12, 70, 5, -3])).tolist() == [0, 2, -1, 1]


@pytest.mark.parametrize("size", [24, 7])
def test_packing_gives_the_factors_of_masking(monkeypatch, size):
    model, (x, y) = confident_net(Categorical())
    batches = list(zip(x.split(size), y.split(size), strict=True))
    options = {"hessian_root": "adaptive", "captured_trace": 0.95}
    packed = accumulate(model, batches, **options)
    monkeypatch.setattr(data_pass, "regrouped", lambda pairs: (x for x, _ in pairs))
    assert worst_difference(accumulate(model, batches, **options), packed) <= 1e-12


# --- draws by content


def test_keys_depend_on_the_content_alone():
    x = torch.randn(9, 2, 3)
    keys, order = sample_keys(x), torch.randperm(9)
    assert torch.equal(sample_keys(x[order]), keys[order])
    assert torch.equal(torch.cat([sample_keys(part) for part in x.split(4)]), keys)
    assert torch.equal(sample_keys(x.transpose(1, 2).contiguous().transpose(1, 2)), keys)
    assert len(set(keys.tolist())) == 9
    assert checksum(keys) == checksum(keys[order])


def test_keys_see_every_value_tensor_and_seed():
    x = torch.zeros(1, 4)
    changed = x.clone()
    changed[0, 2] = 1e-30
    keys = [
        sample_keys(x),
        sample_keys(x, seed=1),
        sample_keys(changed),
        sample_keys((x, x)),
        sample_keys((x, changed)),
        sample_keys((changed, x)),
        sample_keys(x.double()),
        sample_keys(x.long()[:, :3]),
    ]
    numbers = [int(key) for key in keys]
    different = len(set(numbers))
    assert different >= len(numbers) - 2  # zeros of another dtype or length may share a key
    assert len(set(numbers[:6])) == 6


def test_uniforms_are_uniform_and_independent_of_the_batch():
    """40,000 keys: mean within 5 standard errors, lag correlations below 5 / sqrt(40,000)."""
    keys = sample_keys(torch.arange(N_SAMPLES)[:, None])
    draws = uniforms(keys, 3, 4)
    assert ((draws > 0) & (draws < 1)).all()
    assert_unbiased(draws, torch.full((4,), 0.5, dtype=F64))
    correlations = torch.corrcoef(torch.cat([draws.mT, uniforms(keys, 4, 1).mT]))
    assert (correlations - torch.eye(5, dtype=F64)).abs().max() <= 5 / N_SAMPLES**0.5
    assert torch.equal(uniforms(keys[7:9], 3, 4), draws[7:9])


@pytest.mark.parametrize(("n_positions", "fraction"), [(9, 0.4), (10, 0.5), (16, 0.1), (7, 0.9)])
def test_each_position_is_sampled_equally_often(n_positions, fraction):
    """40,000 data, 5 standard errors."""
    positions = sample_positions(torch.arange(N_SAMPLES), 2, n_positions, fraction)
    assert positions.shape == (N_SAMPLES, round(fraction * n_positions))
    counts = nn.functional.one_hot(positions, n_positions).sum(1).double()
    expected = torch.full((n_positions,), positions.shape[1] / n_positions, dtype=F64)
    assert_unbiased(counts, expected)


def test_all_positions_need_no_sample():
    assert sample_positions(torch.arange(3), 2, 10, 1.0) is None
    assert sample_positions(torch.arange(3), 2, 1, 0.1) is None


@pytest.mark.parametrize("groups", [1, 2])
def test_position_sampling_is_unbiased(groups):
    """400 seeds, 5 standard errors; gradient covariances and counts are not sampled."""
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=groups)
    model = net(conv, nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    batch = data_for(model, Categorical(), 3, 2, 3, 3)
    exact = accumulate(model, [batch]).kron["0.weight"]
    draws = [
        accumulate(model, [batch], position_fraction=0.3, seed=seed).kron["0.weight"]
        for seed in range(400)
    ]
    assert_unbiased(torch.stack([draw.input_cov for draw in draws]), exact.input_cov)
    assert relative_error(draws[0].grad_cov, exact.grad_cov) <= 1e-12
    assert float(draws[0].n_shared) == float(exact.n_shared)
    assert relative_error(draws[0].input_cov, exact.input_cov) > 1e-2


def test_position_sampling_does_not_depend_on_the_memory_format():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    model = net(conv, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x, y = data_for(model, Categorical(), 3, 3, 4, 4)
    plain = accumulate(model, [(x, y)], position_fraction=0.3)
    strided = x.contiguous(memory_format=torch.channels_last)
    state = accumulate(model, [(strided, y)], position_fraction=0.3)
    assert worst_difference(state, plain) <= 1e-12


def test_columns_beyond_the_memory_of_the_plan_are_counted_again_by_a_forward_pass(monkeypatch):
    """With very many columns the norms are not kept; the factors are the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (20,), generator=generator)
    model = torch.nn.Linear(4, 5).double()
    with torch.no_grad():
        model.weight.mul_(8.0)  # confident, so that columns are dropped
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    remembered = accumulate(model, batches, hessian_root="adaptive")
    monkeypatch.setattr("margeq.curvature.packing._REMEMBERED_NORMS", 30)
    counted_again = accumulate(model, batches, hessian_root="adaptive")
    assert remembered.captured_trace == counted_again.captured_trace < 1.0
    for name, kron in remembered.kron.items():
        torch.testing.assert_close(counted_again.kron[name].to_dense(), kron.to_dense())
