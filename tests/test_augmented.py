"""Learned input augmentation: exact limits, its maps, and gradients of the widths."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import scipy.linalg
import torch
from torch import nn

import margeq
from margeq.accumulation import accumulate
from margeq.curvature.copies import one_copy
from margeq.curvature.options import KfacOptions
from margeq.data import load_digits
from margeq.data.geometry import rotated, warped
from margeq.errors import ConfigError, DataError, MissingRuleError
from margeq.groups import P4
from margeq.laplace import log_marginal_likelihood
from margeq.layers import GroupConv2d, GroupPool, LiftingConv2d, SparseConv2d
from margeq.likelihoods import Categorical, Gaussian
from margeq.models import AugmentedInputs
from margeq.models.augmented import AFFINE
from margeq.parameters import named_hyperparameters, named_weights
from margeq.priors import GaussianPrior
from tests.network_problems import by_double_backward, central_difference, network, problem
from tests.oracles import F64, Lambda, MeanPool, errors, net

FULL = {"rotation": math.pi}
ROUNDED = 1e-6
"""Logits of widths are made in single precision."""


def conv_net(n_out=3, size=5):
    """One convolution and a head, ``[n, 2, size, size]`` in."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    return net(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * size**2, n_out))


def augmented(model=None, n_samples=3, **options):
    """Away from the start, whose turns by 30 degrees take pixels to pixels, a kink in the width."""
    options = {"widths": 0.3, **options}
    wrapped = AugmentedInputs(conv_net() if model is None else model, n_samples, **options)
    return wrapped.double().eval()


def pictures(*shape):
    return torch.randn(shape or (4, 2, 5, 5), dtype=F64)


# --- exact limits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_no_width_is_the_bare_network(training, padding):
    generators = [*AFFINE, "mirror"]
    model = augmented(widths=0.0, generators=generators, padding=padding).train(training)
    x = pictures()
    torch.testing.assert_close(model(x), model.model(x), rtol=0, atol=1e-12)
    assert max(model.named_widths().values()) < 1e-16


@pytest.mark.parametrize("curvature", ["kfac", "kfac reduce", "ekfac", "diag", "full"])
def test_no_width_has_the_evidence_of_the_bare_network(curvature):
    """Copies that were taken for shared positions would lose most of the curvature."""
    model = augmented(n_samples=5, widths=0.0, generators=["rotation", "mirror"])
    # more data than a filter has weights: the eigenvectors are then unique
    data = [(pictures(24, 2, 5, 5), torch.randint(3, (24,)))]
    options = dict(zip(("curvature", "kfac_approx"), curvature.split(), strict=False))
    values = []
    for candidate in (model, model.model):
        state = accumulate(candidate, data, **options)
        values.append(log_marginal_likelihood(state, GaussianPrior(candidate), Categorical()))
    torch.testing.assert_close(values[0], values[1], rtol=1e-11, atol=0)


@pytest.mark.parametrize("n_samples", [4, 8])
@pytest.mark.parametrize("mirror", [False, True])
def test_full_width_is_the_average_over_a_group(n_samples, mirror):
    generators = ["rotation", "mirror"] if mirror else ["rotation"]
    model, x = augmented(n_samples=n_samples, widths=1.0, generators=generators), pictures()
    expected = model(x)
    for turned in (x.rot90(k, (2, 3)) for k in range(4)):
        torch.testing.assert_close(model(turned), expected, rtol=0, atol=1e-12)
        is_invariant = torch.allclose(model(turned.flip(3)), expected, atol=1e-3)
        assert is_invariant == mirror
    assert not torch.allclose(model.model(x.rot90(1, (2, 3))), model.model(x), atol=1e-3)


def test_mirrored_pictures_have_the_share_that_is_their_width():
    model, x = augmented(n_samples=1, generators=["mirror"], widths={"mirror": 0.2}), pictures()
    expected = 0.8 * model.model(x) + 0.2 * model.model(x.flip(3))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=ROUNDED)


# --- the maps


def test_the_average_is_that_of_pictures_turned_by_equal_steps():
    widths = {"rotation": 0.9}
    model, x = augmented(n_samples=3, generators=["rotation"], widths=widths), pictures()
    degrees = [-0.6 * 180 / math.pi, 0.0, 0.6 * 180 / math.pi]  # middles of three intervals
    # a picture that is turned is read at places turned the other way: the steps are symmetric
    turned = [rotated(x, torch.full((4,), angle, dtype=F64)) for angle in degrees]
    expected = torch.stack([model.model(t) for t in turned]).mean(0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=ROUNDED)


def test_all_generators_are_those_of_affine_maps():
    widths = dict(zip(AFFINE, (0.7, 0.3, 0.2, 0.4, 0.5, 0.6), strict=True))
    model = augmented(Lambda(lambda x: x), n_samples=4, widths=widths)
    x = pictures()
    total = 0.0
    for draws in model.points.tolist():
        turn, right, down, wide, high, shear = (
            e * w for e, w in zip(draws, widths.values(), strict=True)
        )
        generator = [[wide, shear - turn, right], [shear + turn, high, down], [0, 0, 0]]
        matrix = torch.as_tensor(scipy.linalg.expm(generator))[:2]
        total = total + warped(x, matrix.expand(4, 2, 3)) / 4
    torch.testing.assert_close(model(x), total, rtol=0, atol=ROUNDED)


def test_points_are_the_middles_of_equal_intervals_along_each_generator():
    points = augmented(n_samples=5).points
    middles = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8], dtype=F64)
    torch.testing.assert_close(points.sort(0).values, middles[:, None].expand(5, 6))
    assert len(points.T.unique(dim=0)) == 6  # no two generators go together


def test_shifts_move_by_whole_pixels():
    model = augmented(Lambda(lambda x: x), 2, generators=["shift_x"], widths={"shift_x": 0.5})
    x = torch.zeros(1, 1, 8, 8, dtype=F64)
    x[..., 3:5, 3:5] = torch.rand(2, 2, dtype=F64)
    expected = 0.5 * (x.roll(1, 3) + x.roll(-1, 3))  # half of 0.5 is 2 / 8, a pixel
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_turn_of_an_oblong_picture_is_a_turn_in_pixels():
    model = augmented(Lambda(lambda x: x), n_samples=2, widths=FULL, generators=["rotation"])
    square = torch.rand(1, 1, 4, 4, dtype=F64)
    oblong = nn.functional.pad(square, (3, 3, 1, 1))
    expected = 0.5 * (square.rot90(1, (2, 3)) + square.rot90(-1, (2, 3)))
    torch.testing.assert_close(model(oblong)[..., 1:5, 3:7], expected, rtol=0, atol=1e-12)


def test_padding_decides_what_lies_outside():
    model = augmented(Lambda(lambda x: x), 2, widths={"shift_x": 1.0}, generators=["shift_x"])
    ones = torch.ones(1, 1, 4, 4, dtype=F64)
    assert model(ones).min() < 0.6
    model.padding = "border"
    torch.testing.assert_close(model(ones), ones)


# --- draws


def test_evaluation_repeats_and_does_not_depend_on_the_batch():
    model, x = augmented(), pictures()
    state = torch.get_rng_state()
    whole = model(x)
    assert torch.equal(whole, model(x))
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole, rtol=0, atol=1e-12)
    assert torch.equal(state, torch.get_rng_state())


def test_training_draws_anew_for_each_picture():
    model = augmented(Lambda(lambda x: x)).train()
    x = pictures(1, 2, 5, 5).expand(6, 2, 5, 5)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    assert len(first.unique(dim=0)) == 6
    assert not torch.isclose(first, second).all()
    torch.manual_seed(1)
    assert torch.equal(model(x), first)


def test_training_with_draws_of_its_own_leaves_the_global_ones_alone():
    model = augmented(generator=torch.Generator().manual_seed(2)).train()
    x, state = pictures(), torch.get_rng_state()
    twin = deepcopy(model)
    first = model(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, twin(x))
    assert not torch.equal(first, twin(x))


def test_many_draws_have_the_mean_of_many_points():
    """Shifts of a ramp: the mean is the ramp, and the mean square tells the width."""
    model = augmented(Lambda(lambda x: x), n_samples=1, trained_by="loss",
                      generators=["shift_x"], widths={"shift_x": 0.5}).train()  # fmt: skip
    ramp = torch.arange(-7.5, 8.0, dtype=F64).expand(4000, 1, 1, 16)
    moved = (model(ramp) - ramp)[..., 8].flatten().detach()  # uniform on ±4 pixels of 16
    assert abs(float(moved.mean())) < 0.15
    assert float(moved.std()) == pytest.approx(4 / math.sqrt(3), rel=0.03)
    assert float(moved.abs().max()) < 4.0


# --- gradients


@pytest.mark.parametrize("training", [False, True])
def test_width_gradients_are_central_differences(training):
    model = augmented(generators=[*AFFINE, "mirror"]).train(training)
    x, step = pictures(), 1e-6

    def value():
        torch.manual_seed(4)
        return model(x).square().sum()

    (found,) = torch.autograd.grad(value(), [model.logit_widths])
    for i, slope in enumerate(found.tolist()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                model.logit_widths[i] += sign * step
                ends.append(float(value()))
                model.logit_widths[i] -= sign * step
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)
        assert slope != 0.0


def group_net():
    """Weights with frames, in front of a group pooling."""
    return net(
        LiftingConv2d(2, 2, 3, group=P4, padding=1), nn.Tanh(), GroupConv2d(2, 2, 3, group=P4),
        nn.Tanh(), GroupPool(P4), nn.Flatten(), nn.Linear(18, 3),
    )  # fmt: skip


PROBLEMS = {
    "conv": (conv_net, {"n_samples": 3, "generators": [*AFFINE, "mirror"]}, KfacOptions()),
    "reduce": (conv_net, {"generators": ["rotation", "mirror"]}, KfacOptions(kfac_approx="reduce")),
    "positions": (conv_net, {}, KfacOptions(position_fraction=0.4, bias_approx="expand")),
    "group": (group_net, {"generators": ["rotation"]}, KfacOptions()),
    "frames": (group_net, {}, KfacOptions(kfac_approx="expand/reduce")),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("likelihood", [Categorical(0.7), Gaussian(0.6)], ids=["c", "g"])
def test_evidence_gradients_of_widths_are_central_differences(name, likelihood):
    make, arguments, options = PROBLEMS[name]
    model = augmented(make(), **arguments)
    p = problem(model, 5, 2, 5, 5, likelihood=likelihood, options=options, splits=(2, 1))
    found = p.gradient()["logit_widths"]
    if make is conv_net:  # that oracle knows nothing of frames
        expected = by_double_backward(p)["logit_widths"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for index, slope in enumerate(found.tolist()):
        difference = central_difference(p, model.logit_widths[index : index + 1])
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-6)
        assert slope != 0.0


def test_a_network_with_hyperparameters_of_its_own():
    """Layers in front of the copies, behind them, and twice in them, all in one gradient."""

    def sparse():
        return SparseConv2d(2, 2, 3, padding=1, anchors=4)

    inner = sparse()
    model = network(sparse(), AugmentedInputs(nn.Sequential(inner, nn.Tanh(), inner), 2), sparse())
    p = problem(model, 5, 2, 6, 6, splits=(2, 1))
    assert len(p.hyper) == 4
    found, expected = p.gradient(), by_double_backward(p)
    for name, tensor in p.hyper.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
        difference = central_difference(p, tensor)
        assert float(found[name].flatten()[-1]) == pytest.approx(difference, rel=1e-6, abs=1e-6)


# --- curvature


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.5)], ids=["c", "g"])
def test_the_curvature_of_an_averaged_linear_map_is_exact_for_one_datum(likelihood):
    model = augmented(net(nn.Flatten(), nn.Linear(50, 3)), n_samples=4)
    x = pictures(1, 2, 5, 5)
    batch = (x, model(x).detach() if isinstance(likelihood, Gaussian) else torch.tensor([1]))
    assert max(errors(model, batch, likelihood).values()) < 1e-12


def test_copies_are_averaged_with_their_shares_before_products_are_formed():
    """By hand: rows are averaged, gradients are summed, positions are kept apart."""
    model = augmented(net(nn.Conv2d(2, 3, 1, bias=False), MeanPool()), 3,
                      generators=["rotation", "mirror"], widths=0.7)  # fmt: skip
    x = pictures(2, 2, 5, 5)
    kron = accumulate(model, [(x, torch.zeros(2, 3, dtype=F64))], "regression").kron
    (weight,) = kron.values()
    average = AugmentedInputs(Lambda(lambda x: x), 3, generators=["rotation", "mirror"],
                              widths=0.7).double().eval()(x)  # fmt: skip
    expected = torch.einsum("niyx,njyx->ij", average, average)
    torch.testing.assert_close(weight.input_cov[0], expected, rtol=1e-7, atol=1e-7)
    # 25 equal gradients of 1 / 25 for each of 2 data
    torch.testing.assert_close(weight.grad_cov[0], torch.eye(3, dtype=F64) * 2 / 25)
    assert float(weight.n_shared) == 50


def test_calls_in_two_averages_and_two_calls_in_a_copy_are_four_calls():
    layer = nn.Linear(2, 2, bias=False).double()

    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            total = 0.0
            for average in (object(), object()):
                for k in (1.0, 3.0):
                    with one_copy(average, 0.5):
                        total = total + 0.5 * (self.layer(k * x) + self.layer(2 * k * x))
            return total

    x = torch.randn(4, 2, dtype=F64)
    kron = accumulate(Averages(), [(x, x)], "regression").kron["layer.weight"]
    # means of 1 and 3, and of 2 and 6, each in two averages
    torch.testing.assert_close(kron.input_cov[0], 2 * (2**2 + 4**2) * x.T @ x)
    torch.testing.assert_close(kron.grad_cov[0], 4 * 4 * torch.eye(2, dtype=F64))


def test_weights_and_widths_are_told_apart():
    by_evidence, by_loss = augmented(), augmented(trained_by="loss")
    assert set(named_hyperparameters(by_evidence)) == {"logit_widths"}
    assert "logit_widths" not in named_weights(by_evidence)
    assert not named_hyperparameters(by_loss)
    with pytest.raises(MissingRuleError, match=r"'logit_widths'.*parameters="):
        accumulate(by_loss, [(pictures(), torch.zeros(4).long())])
    data = [(pictures(), torch.zeros(4).long())]
    assert accumulate(by_loss, data, parameters=["model"]).n_data == 4


def test_modules_copy_save_and_map():
    model, x = augmented(), pictures()
    other = augmented()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    assert torch.equal(deepcopy(model)(x), model(x))
    assert set(model.state_dict()) == {
        "logit_widths",
        *(f"model.{n}" for n in model.model.state_dict()),
    }
    mapped = torch.func.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(mapped, model(x))
    single = deepcopy(model).float()(x.float())
    torch.testing.assert_close(single.double(), model(x), rtol=1e-4, atol=1e-4)


# --- learning


def test_the_bonus_of_a_loss_widens():
    model = augmented(trained_by="loss", generators=["rotation", "shift_x"])
    before = model.widths.detach().clone()
    assert float(model.bonus(0.1).detach()) == pytest.approx(-0.1 * float(before.norm()))
    optimizer = torch.optim.SGD([model.logit_widths], lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        model.bonus().backward()
        optimizer.step()
    assert (model.widths > before).all()


def pair_of_digits(classes):
    """240 of two digits, in random order, and angles uniform on the circle."""
    digits, labels = load_digits()
    chosen = torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:240]]
    return digits[chosen][:, None], labels[chosen], 360 * torch.rand(240, generator=generator)


def learned_width(images, labels, start):
    """The width of the turns that a small network's evidence prefers."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    model = AugmentedInputs(network, generators=["rotation"], widths={"rotation": start})
    images = (images - images.mean()) / images.std()
    result = margeq.optimize_marglik(
        model, list(zip(images.split(40), labels.split(40), strict=True)), n_epochs=54,
        n_epochs_burnin=20, marglik_frequency=2, lr_hyp=0.3, optimizer_kwargs={"lr": 0.01},
        prior_prec_init=1.0, network_gradient="exact", progress="none", seed=0,
    )  # fmt: skip
    assert result.log_marginal_likelihood / 240 > -0.67  # a coin has -0.69
    return model.named_widths()["rotation"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_the_evidence_widens_the_turns_where_labels_do_not_turn():
    digits, labels, angles = pair_of_digits([0, 7])
    assert learned_width(rotated(digits, angles), (labels == 7).long(), 0.3) > 1.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_the_evidence_narrows_the_turns_where_they_are_the_question():
    digits, _, angles = pair_of_digits([6, 7])
    is_upside_down = (angles - 180).abs() < 90
    assert learned_width(rotated(digits, angles), is_upside_down.long(), 2.2) < 1.7


@pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")
def test_a_training_loss_moves_the_widths_that_are_left_to_it():
    model = augmented(trained_by="loss", generators=["rotation"])
    before = model.widths.detach().clone()
    result = margeq.optimize_marglik(
        model, [(pictures(), torch.arange(4) % 3)], parameters=["model"], n_epochs=2,
        n_epochs_burnin=1, marglik_frequency=1, progress="none", seed=0,
    )  # fmt: skip
    assert not result.hyperparameters
    assert not torch.equal(model.widths, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 1}, "n_samples=1; use a whole number of at least 2"),
        ({"n_samples": 0, "trained_by": "loss"}, "n_samples=0; use a whole number of at least 1"),
        ({"generators": ["turn"]}, r"generators=\['turn'\]; choose among .*'rotation'"),
        ({"generators": "shear"}, "generators='shear'; use a list"),
        ({"generators": []}, "use a list of different names"),
        ({"generators": ["shear", "shear"]}, "use a list of different names"),
        ({"trained_by": "me"}, "trained_by='me'; choose one of"),
        ({"padding": "circular"}, "padding='circular'; choose one of"),
        ({"widths": {"rotation": 1.0}}, r"widths for \['rotation'\], generators \['rotation', "),
        ({"widths": 1.1}, "the width of 'rotation' is 1.1 times its limit 3.142"),
        ({"widths": FULL | {"rotation": 4.0}, "generators": ["rotation"]}, "is 1.273 times"),
        ({"widths": float("nan")}, "is nan times"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AugmentedInputs(nn.Identity(), **arguments)


def test_inputs_have_to_be_pictures():
    with pytest.raises(DataError, match=r"got \(4, 8\); it changes pictures"):
        augmented()(torch.zeros(4, 8))
