"""The exact evidence of a sum of nested paths finds the group that the data were made with."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from margeq.groups import C, D
from tests.group_kernels import Evidence, Tying, connect, convolve, kernels, moved
from tests.oracles import F64, relative_error

SUBGROUPS = {"C1": C(1), "C2": C(2), "C4": C(4), "D4": D(4)}
PATHS = ["FC", *SUBGROUPS]
NOISE = 0.01
EACH = pytest.mark.parametrize("name", SUBGROUPS)
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3)]


def random_maps(n_data, group=SUBGROUPS["D4"], generator=None):
    """Of mean square 1, so that weights of variance 1 give outputs of variance 1."""
    maps = torch.randn(n_data, group.order, 5, 5, dtype=F64, generator=generator)
    return maps / maps.square().mean().sqrt()


def random_outputs(name, maps, generator=None):
    """One draw of a path: its weights have variance 1."""
    if name == "FC":
        width = maps[0].numel()
        return connect(maps, torch.randn(width, width, dtype=F64, generator=generator))
    tying = Tying.of(SUBGROUPS["D4"], SUBGROUPS[name])
    weights = torch.randn(tying.shape, dtype=F64, generator=generator)
    return convolve(maps, tying.filters(weights))


def learned(truth, seed):
    """Evidence, its maximiser and the paths' shares of the function's variance."""
    generator = torch.Generator().manual_seed(seed)
    maps = random_maps(4, generator=generator)
    outputs = random_outputs(truth, maps, generator)
    noise = torch.randn(outputs.shape, dtype=F64, generator=generator)
    covariances = kernels(SUBGROUPS["D4"], SUBGROUPS, maps)
    evidence = Evidence(covariances.values(), outputs + math.sqrt(NOISE) * noise)
    best = evidence.maximum()
    return evidence, best, shares(best.exp()[:-1])


def shares(values):
    return dict(zip(PATHS, (values / values.sum()).tolist(), strict=True))


# --- the paths


def test_the_action_is_one_of_the_group():
    group, maps = SUBGROUPS["D4"], random_maps(1)
    for u in range(group.order):
        for v in range(group.order):
            twice = moved(group, u, moved(group, v, maps))
            assert torch.equal(twice, moved(group, group.compose(u, v), maps))
    rotated = moved(group, 1, maps)[:, 1]  # y points down: a quarter from x to y is clockwise
    assert torch.equal(rotated, torch.rot90(maps[:, 0], -1, (-2, -1)))


@EACH
def test_maps_commute_with_their_subgroup_and_shifts_and_with_nothing_else(name):
    group, maps = SUBGROUPS["D4"], random_maps(2)
    tying = Tying.of(group, SUBGROUPS[name])
    filters = tying.filters(torch.randn(tying.shape, dtype=F64))

    def error(move):
        return relative_error(convolve(move(maps), filters), move(convolve(maps, filters)))

    assert error(lambda f: f.roll((1, 2), (-2, -1))) < 1e-12
    inside = group.elements_of(SUBGROUPS[name])
    for u in range(group.order):
        assert (error(lambda f, u=u: moved(group, u, f)) < 1e-12) == (u in inside)


def test_dense_maps_commute_with_neither():
    group, maps = SUBGROUPS["D4"], random_maps(2)
    weights = torch.randn(200, 200, dtype=F64)
    for move in (lambda f: f.roll(1, -1), lambda f: moved(group, 1, f)):
        assert relative_error(connect(move(maps), weights), move(connect(maps, weights))) > 0.5


@EACH
def test_the_path_holds_every_convolution_that_commutes(name):
    """The mean of ``L_k^-1 M L_k`` over K, for an arbitrary convolution M, is one of its maps."""
    group, maps = SUBGROUPS["D4"], random_maps(4)
    inside = group.elements_of(SUBGROUPS[name])
    filters = torch.randn(8, 8, 3, 3, dtype=F64)

    def conjugate(k):
        return moved(group, int(group.inverse[k]), convolve(moved(group, k, maps), filters))

    mean = (sum(conjugate(k) for k in inside) / len(inside)).flatten()[:, None]
    tying = Tying.of(group, SUBGROUPS[name])
    design = tying.design(maps)
    assert design.shape[1] == math.prod(tying.shape) == 8 * 8 * 9 // len(inside)
    weights = torch.linalg.lstsq(design, mean).solution
    assert relative_error(design @ weights, mean) < 1e-10


@pytest.mark.parametrize("group", [C(4), D(4)], ids=repr)
def test_kernels_are_those_of_the_jacobians(group):
    maps = random_maps(2, group)
    subgroups = {n: k for n, k in SUBGROUPS.items() if group.has_subgroup(k)}
    found = kernels(group, subgroups, maps)
    for name, subgroup in subgroups.items():
        tying = Tying.of(group, subgroup)
        weights = torch.zeros(tying.shape, dtype=F64)
        jacobian = torch.func.jacrev(lambda v, t=tying: convolve(maps, t.filters(v)))(weights)
        design = jacobian.flatten(4).flatten(0, 3)
        assert relative_error(tying.design(maps), design) < 1e-12
        assert relative_error(found[name], design @ design.mT) < 1e-12


def test_dense_kernel_is_that_of_the_jacobian():
    maps = random_maps(2, C(2))  # 50 features
    weights = torch.zeros(50, 50, dtype=F64)
    design = torch.func.jacrev(lambda w: connect(maps, w))(weights).flatten(4).flatten(0, 3)
    assert relative_error(kernels(C(2), {}, maps)["FC"], design @ design.mT) < 1e-12


def test_all_paths_have_the_same_function_scale():
    """Mean variance of an output for weights of variance 1: the mean square of the maps, 1."""
    for kernel in kernels(SUBGROUPS["D4"], SUBGROUPS, random_maps(3)).values():
        assert kernel.diagonal().mean().item() == pytest.approx(1.0, abs=1e-12)


# --- the evidence


def small_problem():
    maps = random_maps(2, C(2))
    designs = [Tying.of(C(2), k).design(maps) for k in (C(1), C(2))]
    return designs, torch.randn(100, dtype=F64), torch.tensor([-0.3, 0.4, -1.2], dtype=F64)


def test_evidence_and_gradient_are_those_of_a_multivariate_normal():
    designs, outputs, point = small_problem()
    evidence = Evidence([d @ d.mT for d in designs], outputs)

    def log_density(log_variances):
        a, b, s = log_variances.exp()
        one, two = designs
        covariance = a * one @ one.mT + b * two @ two.mT + s * torch.eye(100, dtype=F64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(100, dtype=F64), covariance)
        return normal.log_prob(outputs), covariance

    value, gradient, _ = evidence(point)
    density, covariance = log_density(point)
    reference = multivariate_normal.logpdf(outputs.numpy(), cov=covariance.numpy())
    assert value.item() == pytest.approx(reference, rel=1e-12)
    assert value.item() == pytest.approx(density.item(), rel=1e-12)
    expected = torch.func.grad(lambda x: log_density(x)[0])(point)
    assert relative_error(gradient, expected) < 1e-10


def test_effective_parameters_are_those_of_the_posterior():
    designs, outputs, point = small_problem()
    gamma = Evidence([d @ d.mT for d in designs], outputs)(point)[2]
    sizes = [d.shape[1] for d in designs]
    joint, (a, b, s) = torch.cat(designs, 1), point.exp()
    prior = torch.cat([x.expand(n) for x, n in zip((a, b), sizes, strict=True)])
    posterior = torch.linalg.inv(joint.mT @ joint / s + torch.diag(1.0 / prior))
    kept = (1.0 - posterior.diagonal() / prior).split(sizes)
    assert relative_error(gamma, torch.stack([k.sum() for k in kept])) < 1e-10


# --- which path it picks


@pytest.mark.parametrize("seed", [0, *SLOW])
@pytest.mark.parametrize("truth", PATHS)
def test_the_true_group_takes_most_of_the_function(truth, seed):
    evidence, best, share = learned(truth, seed)
    assert max(share, key=share.__getitem__) == truth
    assert share[truth] > 0.7
    at_truth = torch.tensor([float(path == truth) for path in PATHS] + [NOISE], dtype=F64)
    assert evidence(best)[0] > evidence(at_truth.clamp_min(1e-5).log())[0]


@pytest.mark.parametrize("seed", [0, *SLOW])
@pytest.mark.parametrize("truth", ["C4", "D4"])
def test_effective_parameters_are_no_measure_of_the_path(truth, seed):
    """On few images the dense path resembles noise, and the evidence can hardly tell them apart.

    Half of the noise put there is some 1 % of the function, yet most effective parameters.
    """
    evidence, best, _ = learned(truth, seed)
    variances = best.exp()
    variances[0] = variances[-1] = 0.5 * (variances[0] + variances[-1])
    value, _, gamma = evidence(variances.log())
    assert (evidence(best)[0] - value).item() < 4.0  # of some hundred
    function, parameters = shares(variances[:-1]), shares(gamma)
    assert function["FC"] < 0.02 < 0.6 < function[truth]
    assert parameters["FC"] > 0.5 > 0.4 > parameters[truth]
