"""``optimize_marglik`` as users meet it: every data, model and numerics case of the baseline table.

Each failure is checked for its type, for what its message names, and for an unchanged model,
random state and argument dictionary.
"""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margeq
from margeq.errors import (
    ConfigError,
    ConvergenceWarning,
    CurvatureError,
    DataError,
    DataWarning,
    FlavourMismatchError,
    MissingRuleError,
    NonFiniteError,
    NumericalWarning,
    UnsupportedLayerError,
)
from margeq.layers import FactoredLinear2d, ResidualPathways
from margeq.training.solvers import hyper_solver, mackay_step

FAST = {"n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "seed": 0}
LR = {"lr": 0.02}

pytestmark = pytest.mark.filterwarnings("ignore::margeq.errors.ConvergenceWarning")


def data(n=60, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long() * (classes > 2)


def loader(x, y, batch=25, **kwargs):
    return DataLoader(TensorDataset(x, y), batch, **kwargs)


def mlp(*middle):
    return nn.Sequential(nn.Linear(4, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, 3))


def fit(model, batches, **kwargs):
    return margeq.optimize_marglik(model, batches, **{"optimizer_kwargs": LR, **FAST, **kwargs})


def snapshot(model):
    state = {k: copy.deepcopy(v) for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    return state, flags, hooks, frozen, set(vars(model)), torch.get_rng_state()


@contextmanager
def unchanged(model, *arguments):
    """The body may raise; model, random state and arguments are then as before."""
    before, copies = snapshot(model), copy.deepcopy(arguments)
    yield
    after = snapshot(model)
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())
    assert after[1:5] == before[1:5]
    assert torch.equal(after[5], before[5])
    assert arguments == copies


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_names_batch_index_and_feature(value):
    x, y = data()
    x[30, 2] = value
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match=r"batch 1, index 5, feature \(2,\)"):
        fit(model, loader(x, y))


def test_label_out_of_range_names_label_index_and_outputs():
    x, y = data()
    y[0] = 7
    model = mlp()
    with (
        unchanged(model),
        pytest.raises(DataError, match="label 7 at index 0, model has 3 outputs"),
    ):
        fit(model, loader(x, y))


def test_a_bad_label_in_a_later_batch_is_found_too():
    x, y = data()
    y[59] = -1
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match="batch 2: label -1 at index 9"):
        fit(model, loader(x, y))


def test_empty_loader():
    x, y = data()
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match="loader yielded 0 samples"):
        fit(model, loader(x[:0], y[:0]))


def test_exhausted_generator_is_an_empty_loader_in_the_second_pass():
    x, y = data()
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match="re-iterable"):
        fit(model, iter([(x, y)]))


def test_loader_without_a_length_works_and_counts():
    x, y = data()

    class Stream:
        def __iter__(self):
            return iter([(x[:40], y[:40]), (x[40:], y[40:])])

    assert fit(mlp(), Stream()).n_data == 60


def test_drop_last_counts_what_was_seen_and_says_what_was_not():
    x, y = data()
    with pytest.warns(DataWarning, match="10 of 60 samples unseen"):
        result = fit(mlp(), loader(x, y, drop_last=True))
    assert result.n_data == 50


def test_a_loader_that_changes_its_length_is_refused():
    x, y = data()
    passes = iter([60, 60, 50, 60])

    class Shrinking:
        def __iter__(self):
            n = next(passes)
            return iter([(x[:n], y[:n])])

    model = mlp()
    with unchanged(model), pytest.raises(DataError, match="yielded 50 samples, 60 in the first"):
        fit(model, Shrinking(), marglik_loader=[(x, y)])


def test_single_sample_and_single_class():
    x, y = data()
    assert math.isfinite(fit(mlp(), [(x[:1], y[:1])]).log_marginal_likelihood)
    result = fit(mlp(), [(x, torch.zeros_like(y))])
    assert math.isfinite(result.log_marginal_likelihood)


def test_float_int32_and_one_hot_labels_mean_the_same():
    x, y = data()
    values = [
        fit(_same_mlp(), [(x, labels)]).log_marginal_likelihood
        for labels in (y, y.float(), y.int(), nn.functional.one_hot(y, 3), y[:, None])
    ]
    assert values == [values[0]] * 5


def _same_mlp():
    torch.manual_seed(3)
    return mlp()


def test_one_dimensional_regression_target_is_refused_before_the_first_step():
    x, y = data()
    model = nn.Linear(4, 1)
    with unchanged(model), pytest.raises(DataError, match=r"\(25,\).*\(25, 1\)"):
        fit(model, loader(x, y.float()), likelihood="regression")


def test_dictionary_batches_need_a_function_and_then_work():
    x, y = data()
    batches = [{"features": x, "labels": y}]
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match="batch_fn"):
        fit(model, batches)
    assert fit(model, batches, batch_fn=lambda b: (b["features"], b["labels"])).n_data == 60


def test_inputs_that_the_model_cannot_process_are_described():
    x, y = data()
    model = mlp()
    with unchanged(model), pytest.raises(DataError, match=r"\(25, 4\) torch\.float64.*dtype"):
        fit(model, loader(x.double(), y))


def test_several_inputs_go_by_position_or_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    x, y = data()
    pair, named = (x[:, :2], x[:, 2:]), {"right": x[:, 2:], "left": x[:, :2]}
    torch.manual_seed(0)
    first = Two()
    second = copy.deepcopy(first)
    values = [fit(m, [(i, y)]).log_marginal_likelihood for m, i in ((first, pair), (second, named))]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# -- models ----------------------------------------------------------------------------------------


def test_frozen_layer_is_a_row_of_its_own():
    x, y = data()
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    result = fit(model, loader(x, y))
    assert torch.equal(model[0].weight, before)
    assert result.effective_dimension().of("0", "").verdict == "frozen"
    assert "nan" not in str(result.effective_dimension())


def test_frozen_weight_with_free_bias():
    x, y = data()
    model = mlp()
    model[0].weight.requires_grad_(False)
    result = fit(model, loader(x, y))
    assert set(result.prior.groups) == {"0.bias", "2.weight", "2.bias"}


def test_shared_module_and_tied_weight_train():
    x, y = data()
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3))
    assert "2.weight" not in fit(twice, loader(x, y)).prior.groups
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[2].weight = tied[0].weight
    assert set(fit(tied, loader(x, y)).prior.groups) == {
        "0.weight", "0.bias", "2.bias", "3.weight", "3.bias",
    }  # fmt: skip


def test_two_parameters_on_one_storage_are_refused():
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(UnsupportedLayerError, match=r"'0\.weight' and '2\.weight'"):
        fit(model, loader(x, y))


class Gain(nn.Linear):
    """A layer with a forward of its own, for which its parent's rule is wrong."""

    def __init__(self, size):
        super().__init__(1, size, bias=False)

    def forward(self, x):
        return x * self.weight.squeeze(1)


@pytest.mark.parametrize(
    ("middle", "name"),
    [(nn.GRU(6, 6), r"1 \(GRU\)"), (nn.LSTM(6, 6), r"1 \(LSTM\)")],
)
def test_layers_without_a_rule_are_named_with_the_ways_out(middle, name):
    x, y = data()
    model = mlp(middle)
    with unchanged(model), pytest.raises(MissingRuleError, match=name) as caught:
        fit(model, loader(x, y))
    for remedy in ("freeze", "exclude", "register"):
        assert remedy in str(caught.value)


def test_each_way_out_of_a_missing_rule_works():
    x, y = data()
    fit(mlp(nn.BatchNorm1d(6, affine=False)), loader(x, y))
    frozen = mlp(Gain(6))
    frozen[1].requires_grad_(False)
    fit(frozen, loader(x, y))
    excluded = mlp(Gain(6))
    before = excluded[1].weight.clone()
    result = fit(excluded, loader(x, y), parameters=["0", "2"])
    assert set(result.prior.groups) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not torch.equal(excluded[1].weight, before)  # trained, without a prior


def test_weight_used_outside_its_module_is_noticed():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(nn.functional.linear(self.lin(x), self.lin.weight)))

    x, y = data()
    model = Functional()
    with unchanged(model), pytest.raises(UnsupportedLayerError, match=r"'lin\.weight'"):
        fit(model, loader(x, y))


def test_dropout_is_on_in_training_and_off_in_curvature_and_flags_come_back():
    x, y = data()
    model = mlp(nn.Dropout(0.5), nn.Tanh())
    model[1].register_forward_hook(lambda m, a, o: seen.append(m.training))
    seen: list[bool] = []
    for flag in (True, False):
        model.train(flag)
        fit(model, loader(x, y))
        assert all(m.training is flag for m in model.modules())
    assert set(seen) == {True, False}
    assert seen[-20:].count(True) > 0  # still on in the last epochs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    x, y = data()
    model = mlp().to(dtype)
    result = fit(model, loader(x.to(dtype), y))
    assert math.isfinite(result.log_marginal_likelihood)
    assert model[0].weight.dtype == dtype


def test_half_precision_factors_are_close_to_double():
    x, y = data()
    model = _same_mlp()
    exact = margeq.laplace.accumulate(model.double(), [(x.double(), y)])
    for dtype in (torch.bfloat16, torch.float16):
        half = margeq.laplace.accumulate(copy.deepcopy(model).to(dtype), [(x.to(dtype), y)])
        for name, kron in half.kron.items():
            reference = exact.kron[name].to_dense()
            assert (kron.to_dense() - reference).norm() < 5e-2 * reference.norm()


def test_unused_layer_and_zero_inputs_stay_finite():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x) + 0.0 * self.unused(x)

    x, y = data()
    table = fit(Detour(), loader(x, y)).effective_dimension()
    assert table.of("unused", "").effective == pytest.approx(0.0, abs=1e-6)
    result = fit(mlp(), loader(torch.zeros_like(x), y))
    assert result.diagnostics.clamped_eigenvalues == 0
    assert math.isfinite(result.log_marginal_likelihood)


def test_user_hooks_and_in_place_activations_survive():
    x, y = data()
    calls: list[int] = []
    torch.manual_seed(0)
    plain = mlp(nn.ReLU())
    inplace = mlp(nn.ReLU(inplace=True))
    inplace.load_state_dict(plain.state_dict())
    inplace[0].register_forward_hook(lambda *_: calls.append(1))
    a, b = fit(plain, loader(x, y)), fit(inplace, loader(x, y))
    assert a.log_marginal_likelihood == b.log_marginal_likelihood
    assert calls
    assert len(inplace[0]._forward_hooks) == 1


# -- numerics and arguments ------------------------------------------------------------------------


def test_huge_prior_precision_is_clamped_and_flagged():
    x, y = data()
    result = fit(mlp(), loader(x, y), prior_prec_init=1e38, n_epochs_burnin=6)
    assert math.isfinite(result.log_marginal_likelihood)
    first = result.history.updates[0].prior_precision
    assert all(value < 1e10 for value in first.values())


def test_absurd_hyper_step_is_halved_with_a_warning():
    x, y = data()
    with pytest.warns(NumericalWarning, match="step size halved"):
        result = fit(mlp(), loader(x, y), hyper_solver="adam", lr_hyp=30.0)
    assert math.isfinite(result.log_marginal_likelihood)


def test_hopeless_hyper_step_ends_in_a_typed_error_and_the_old_weights():
    x, y = data()
    model = mlp()
    with (
        unchanged(model),
        pytest.warns(NumericalWarning, match="step size halved"),
        pytest.raises(CurvatureError, match="lr_hyp"),
    ):
        fit(model, loader(x, y), hyper_solver="adam", lr_hyp=1e6)


def test_diverging_weights_end_in_a_typed_error_and_the_old_weights():
    x, _ = data()
    model = nn.Linear(4, 1)
    kwargs = {"lr": 1e30}
    with unchanged(model, kwargs), pytest.raises(NonFiniteError):
        margeq.optimize_marglik(
            model, [(x, 1e30 * x[:, :1])], likelihood="regression", **FAST,
            optimizer_cls=torch.optim.SGD, optimizer_kwargs=kwargs,
        )  # fmt: skip


def test_a_failed_restart_is_listed_and_another_one_kept():
    x, y = data()

    class Fragile(nn.Module):
        """Overflows once path b is off."""

        def __init__(self):
            super().__init__()
            self.sum = ResidualPathways({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, "sum")

        def forward(self, x):
            return self.sum(x) * (float("inf") if self.sum.active == ("a",) else 1.0)

    model = Fragile()
    result = fit(model, loader(x, y), restarts=["only:a", "only:b"])
    assert [r.kept for r in result.restarts] == [False, True]
    assert result.diagnostics.failed_restarts == ("only:a",)
    assert "NonFiniteError" in result.restarts[0].error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_epochs_burnin": 9}, "n_epochs_burnin=9 > n_epochs=6"),
        ({"n_epochs": 0}, "n_epochs=0"),
        ({"lr_hyp": -1.0}, "lr_hyp"),
        ({"temperature": 0.0}, "temperature"),
        ({"likelihood": "poisson"}, "poisson"),
        ({"hessian_root": "approximate"}, "hessian_root"),
        ({"kfac_approx": "both"}, "kfac_approx"),
        ({"hyper_solver": "newton"}, "hyper_solver"),
        ({"prior": "spike"}, "structure='spike'"),
        ({"prior": "diagonal"}, "layerwise"),
        ({"prior_prec_init": "large"}, "prior_prec_init"),
        ({"restarts": "sideways"}, "sideways"),
        ({"restarts": []}, "restarts is empty"),
        ({"parameters": ["nowhere"]}, "nowhere"),
        ({"progress": "loud"}, "progress"),
        ({"optimizer_kwargs": {"weight_decay": 0.1}}, "weight_decay"),
        ({"checkpoint_dir": 5}, "checkpoint_dir=5"),
        ({"backend": "asdl"}, "backend"),
        ({"curvature": "hessian"}, "curvature"),
        ({"hyperparameters": (torch.zeros(1),)}, "hyperparameters"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    x, y = data()
    model = mlp()
    with unchanged(model), pytest.raises(ConfigError, match=message):
        fit(model, loader(x, y), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_epochs": 12.5}, "n_epochs=12.5"),
        ({"lr_hyp": "x"}, "lr_hyp='x'"),
        ({"seed": -1}, "seed=-1"),
        ({"restarts": 3}, "restarts=3"),
        ({"callbacks": [None]}, "callbacks"),
        ({"optimizer_cls": "adam"}, "optimizer_cls='adam'"),
        ({"optimizer_kwargs": {"lr": -1}}, "lr"),
        ({"scheduler_cls": torch.optim.lr_scheduler.CosineAnnealingLR}, "T_max"),
        ({"scheduler_cls": torch.optim.lr_scheduler.ReduceLROnPlateau}, "metric"),
        ({"kfac_approx": {"nowhere": "reduce"}}, "nowhere"),
        ({"likelihood": margeq.Categorical(), "temperature": 7.0}, "likelihood is an object"),
        ({"prior": margeq.GaussianPrior(nn.Linear(2, 2))}, "other weights"),
        ({"prior": margeq.GaussianPrior(mlp()), "prior_prec_init": 3.0}, "prior_prec_init"),
    ],
)
def test_arguments_that_contradict_each_other_or_themselves_are_refused(arguments, message):
    x, y = data()
    model = mlp()
    with unchanged(model), pytest.raises(ConfigError, match=message):
        fit(model, loader(x, y), **arguments)


def test_wrong_model_and_loader_types_are_refused():
    x, y = data()
    with pytest.raises(ConfigError, match="NoneType"):
        fit(None, loader(x, y))
    with pytest.raises(DataError, match="not iterable"):
        fit(mlp(), 5)
    with pytest.raises(ConfigError, match="lazy module"):
        fit(nn.Sequential(nn.LazyLinear(3)), loader(x, y))


def test_training_works_without_gradients_around_it_but_not_in_inference_mode():
    x, y = data()
    with torch.no_grad():
        losses = fit(mlp(), loader(x, y)).history.losses
    assert losses[-1] < losses[0]
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        fit(mlp(), loader(x, y))


def test_a_single_update_does_not_claim_to_have_settled():
    x, y = data()
    result = fit(mlp(), loader(x, y), n_epochs=1, n_epochs_burnin=0)
    assert not result.success
    assert "single update" in result.message


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_weights_that_the_data_leave_at_zero_are_no_success(likelihood):
    x, y = data()
    targets = y if likelihood == "classification" else x[:, :3] + 5.0
    options = {"likelihood": likelihood, "hyper_solver": "fixed", "n_epochs": 9}
    weights = {"0.weight": 1e9, "2.weight": 1e9}
    prior = {"0.bias": 1.0, "2.bias": 1.0, **weights}
    with pytest.warns(
        ConvergenceWarning, match=r"determine none of the weights \(.*prior_prec_init"
    ):
        assert not fit(mlp(), loader(x, targets), prior_prec_init=prior, **options).success
    # a bias alone has nothing to do with the inputs
    alone = fit(mlp(), loader(x, targets), parameters=["0.bias", "2.bias"], **options)
    assert "none of the weights" not in alone.message


def test_a_branch_that_is_not_needed_is_a_success():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip, self.branch = nn.Linear(3, 1), nn.Linear(1, 1)

        def forward(self, x):
            return self.skip(x[:, :3]) + self.branch(x[:, 3:])

    torch.manual_seed(0)
    x, model = torch.randn(200, 4), Branched()
    y = x[:, :3].sum(1, keepdim=True) + 0.3 * torch.randn(200, 1)
    y = y - x[:, 3:] * (x[:, 3:] * y).sum() / x[:, 3:].square().sum()
    options = {"likelihood": "regression", "optimizer_kwargs": {"lr": 0.02}, "n_epochs": 200}
    result = fit(model, loader(x, y), parameters=["branch"], **options)
    assert result.history.updates[-1].effective["branch.weight"] < 0.5
    assert result.success, result.message


def test_an_evidence_of_guessing_is_no_success():
    x, _ = data()
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    options = {"n_epochs": 20, "prior_prec_init": 1e-3, "hyper_solver": "fixed"}
    with pytest.warns(ConvergenceWarning, match=r"guessing among 3 classes \(-65.92\).*prior_prec"):
        result = fit(mlp(), loader(x, labels), **options)
    assert not result.success
    assert "noise" not in result.message
    assert result.log_marginal_likelihood < -60 * math.log(3)
    with pytest.warns(ConvergenceWarning, match=r"guessing among 3 classes \(-32.96\)"):
        fit(mlp(), loader(x, labels), temperature=2.0, **options)


def test_loader_generators_and_loose_buffers_come_back_on_failure():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    def fail(event):
        if event.kind == "update":
            raise RuntimeError("stop")

    x, y = data()
    generator, model = torch.Generator().manual_seed(5), Counting()
    state = generator.get_state()
    with unchanged(model), pytest.raises(RuntimeError, match="stop"):
        fit(model, loader(x, y, shuffle=True, generator=generator), callbacks=[fail], seed=None)
    assert torch.equal(generator.get_state(), state)
    assert float(model.calls) == 0.0


def test_evidence_of_less_data_than_training_is_announced():
    x, y = data()
    with pytest.warns(DataWarning, match="that of 20 data, training uses 60"):
        fit(mlp(), loader(x, y), marglik_loader=[(x[:20], y[:20])])


def test_arguments_are_not_changed():
    x, y = data()
    options, plan = {"lr": 0.02}, {"T_max": 18}
    likelihood, prior = margeq.Gaussian(0.7), margeq.GaussianPrior(nn.Linear(4, 1))
    before = (
        float(likelihood.log_sigma_noise),
        {k: float(v) for k, v in prior.prior_precision.items()},
    )
    fit(
        nn.Linear(4, 1), [(x, y[:, None].float())], likelihood=likelihood, prior=prior,
        optimizer_kwargs=options, scheduler_kwargs=plan,
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
    )  # fmt: skip
    after = (
        float(likelihood.log_sigma_noise),
        {k: float(v) for k, v in prior.prior_precision.items()},
    )
    assert (options, plan, after) == ({"lr": 0.02}, {"T_max": 18}, before)


def test_same_seed_twice_is_bit_equal_even_with_a_shuffling_generator():
    x, y = data()

    def once():
        generator = torch.Generator().manual_seed(5)
        model = _same_mlp()
        result = fit(model, loader(x, y, shuffle=True, generator=generator))
        return result.log_marginal_likelihood, model[0].weight

    (a, first), (b, second) = once(), once()
    assert a == b
    assert torch.equal(first, second)


def test_global_random_state_is_untouched():
    x, y = data()
    state = torch.get_rng_state()
    fit(mlp_from(state), loader(x, y, shuffle=True))
    torch.set_rng_state(state)
    model = mlp()
    after_model = torch.get_rng_state()
    fit(model, loader(x, y, shuffle=True))
    assert torch.equal(after_model, torch.get_rng_state())


def mlp_from(state):
    torch.set_rng_state(state)
    return mlp()


# -- the method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["layerwise", "scalar", {"0": "first", "2": "second"}])
@pytest.mark.parametrize("solver", ["mackay", "lbfgs", "adam"])
def test_mackay_condition_holds_at_convergence(solver, prior):
    """delta = gamma / |theta|^2 to 1e-3 for every group inside its bounds."""
    x, y = data()
    result = fit(mlp(), loader(x, y), prior=prior, hyper_solver=solver, n_epochs=20)
    assert_mackay(result)


def test_mackay_condition_holds_for_paths_and_noise():
    x = torch.randn(80, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    y = x.sum((1, 2, 3))[:, None] + 0.1 * torch.randn(80, 1)
    paths = {"conv": nn.Conv2d(2, 3, 3, padding=1), "fc": FactoredLinear2d(2, 3, (4, 4), (4, 4))}
    model = nn.Sequential(
        ResidualPathways(paths), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)
    )
    result = fit(
        model, loader(x, y), prior="pathwise", likelihood="regression", n_epochs=20,
        restarts="free",
    )  # fmt: skip
    assert "0.paths.fc" in result.prior.log_prior_precision
    assert_mackay(result)
    gammas = margeq.laplace.effective_parameters(result.spectrum, result.prior, result.likelihood)
    free = result.n_data - float(sum(gammas.values()))
    noise = float(result.spectrum.fit.sum()) / free
    assert float(result.likelihood.sigma_noise) ** 2 == pytest.approx(noise, rel=1e-3)


def assert_mackay(result):
    gammas = margeq.laplace.effective_parameters(result.spectrum, result.prior, result.likelihood)
    checked = 0
    for group, precision in result.prior.prior_precision.items():
        if group in result.diagnostics.at_bounds:
            continue
        members = result.prior.members(group)
        gamma = sum(float(gammas[name]) for name in members)
        norm = sum(float(result.spectrum.square_norms[name]) for name in members)
        assert float(precision) == pytest.approx(gamma / norm, rel=1e-3)
        checked += 1
    assert checked


def test_damped_mackay_never_lowers_the_evidence_with_more_weights_than_observations():
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 1))
    spectrum = margeq.laplace.decompose(
        margeq.laplace.accumulate(model, [(x, 100 * x[:, :1])], "regression")
    )
    prior, likelihood = margeq.GaussianPrior(model), margeq.Gaussian()
    values = []
    for _ in range(50):
        values.append(float(margeq.log_marginal_likelihood(spectrum, prior, likelihood)))
        mackay_step(spectrum, prior, likelihood)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(values))


def test_solvers_agree_on_the_optimum_and_beat_the_start():
    x, y = data()
    state = margeq.laplace.accumulate(_same_mlp(), loader(x, y))
    spectrum = margeq.laplace.decompose(state)
    likelihood = margeq.Categorical()

    values = {}
    for name in ("mackay", "lbfgs", "adam"):
        prior = margeq.GaussianPrior(_same_mlp())
        hyper_solver(name, 20, 0.1).converge(spectrum, prior, likelihood)
        values[name] = float(margeq.log_marginal_likelihood(spectrum, prior, likelihood))
    start = float(
        margeq.log_marginal_likelihood(spectrum, margeq.GaussianPrior(_same_mlp()), likelihood)
    )
    assert values["mackay"] == pytest.approx(values["lbfgs"], abs=1e-3)
    assert values["adam"] == pytest.approx(values["lbfgs"], abs=1e-3)
    assert values["mackay"] > start


def test_a_path_alone_is_the_single_path_model():
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()

    def network(names):
        paths = {n: p for n, p in candidates().items() if n in names}
        head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        return nn.Sequential(ResidualPathways(paths, "sum"), *head)

    def candidates():
        return {"conv": nn.Conv2d(1, 3, 3, padding=1), "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4))}

    both = fit(network(("conv", "fc")), [(x, y)], restarts="only:conv")
    alone = fit(network(("conv",)), [(x, y)], restarts="symmetric")
    assert both.log_marginal_likelihood == pytest.approx(alone.log_marginal_likelihood, rel=1e-12)
    assert both.effective_dimension().of("0", "fc").verdict == "off"


def test_auto_restarts_visit_every_corner_and_keep_the_highest_evidence():
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0, 0, 0] > 0).long()
    paths = {"conv": nn.Conv2d(1, 3, 3, padding=1), "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4))}
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    result = fit(nn.Sequential(ResidualPathways(paths), *head), [(x, y)])
    assert [r.start for r in result.restarts] == ["symmetric", "free", "only:conv", "only:fc"]
    best = max(result.restarts, key=lambda r: r.log_marginal_likelihood)
    assert best.kept
    assert result.log_marginal_likelihood == best.log_marginal_likelihood


def test_evidence_of_other_flavours_or_data_is_refused():
    x, y = data()
    exact = fit(mlp(), loader(x, y), hessian_root="exact")
    sampled = fit(mlp(), loader(x, y), hessian_root="mc")
    with pytest.raises(FlavourMismatchError, match="hessian_root: 'exact' against 'mc\\(1\\)'"):
        exact.log_bayes_factor(sampled)
    with pytest.raises(ConfigError, match="60 data against evidence of 30 data"):
        exact.log_bayes_factor(fit(mlp(), loader(x[:30], y[:30]), hessian_root="exact"))
    for inputs, labels in ((x + 5, y), (x, y.flip(0))):
        with pytest.raises(ConfigError, match="other inputs or targets"):
            exact.log_bayes_factor(fit(mlp(), loader(inputs, labels), hessian_root="exact"))
    with pytest.raises(FlavourMismatchError, match="temperature"):
        exact.log_bayes_factor(fit(mlp(), loader(x, y), hessian_root="exact", temperature=7.0))
    again = fit(mlp(), loader(x, y), hessian_root="exact")
    assert exact.log_bayes_factor(again) == -again.log_bayes_factor(exact)


def test_state_and_likelihood_of_different_kinds_are_refused():
    x, y = data()
    state = margeq.laplace.accumulate(mlp(), [(x, y)])
    prior = margeq.GaussianPrior(mlp())
    with pytest.raises(ConfigError, match="Categorical"):
        margeq.log_marginal_likelihood(state, prior, margeq.Gaussian())


def test_one_datum_gives_no_verdict_and_switches_nothing_off():
    x = torch.randn(1, 1, 4, 4)
    paths = {"conv": nn.Conv2d(1, 3, 3, padding=1), "fc": FactoredLinear2d(1, 3, (4, 4), (4, 4))}
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = nn.Sequential(ResidualPathways(paths, "sum"), *head)
    result = fit(model, [(x, torch.tensor([1]))], restarts="free", n_epochs=10)
    assert model[0].active == ("conv", "fc")
    assert result.selected == {}
    assert {row.verdict for row in result.effective_dimension().paths} == {""}


def test_temperature_and_multi_output_reach_loss_and_evidence_alike():
    x, _ = data()
    y = torch.stack([x[:, 0], x[:, 1] - x[:, 2], x[:, 3]], 1)
    result = fit(nn.Linear(4, 3), [(x, y)], likelihood="regression", temperature=2.0, n_epochs=20)
    assert result.likelihood.temperature == 2.0
    assert_mackay(result)


def test_callbacks_hear_every_event(tmp_path):
    x, y = data()
    from margeq.callbacks import JsonlCallback

    kinds: list[str] = []
    log = tmp_path / "events.jsonl"
    fit(mlp(), loader(x, y), callbacks=[lambda e: kinds.append(e.kind), JsonlCallback(log)])
    assert kinds.count("epoch") == 6
    assert kinds.count("update") == 3
    assert (kinds[0], kinds[-1]) == ("start", "result")
    assert len(log.read_text().splitlines()) == len(kinds)


def test_result_is_plain_data_for_json():
    import json

    x, y = data()
    text = json.dumps(fit(mlp(), loader(x, y)).to_dict(), default=float)
    assert "log_marginal_likelihood" in json.loads(text)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    json.dumps(fit(frozen, loader(x, y)).to_dict(), default=float, allow_nan=False)


def test_path_sums_inside_paths_have_rows_of_their_own():
    x = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    inner = ResidualPathways({"a": nn.Conv2d(2, 3, 3, padding=1), "b": nn.Conv2d(2, 3, 1)})
    fc = FactoredLinear2d(2, 3, (4, 4), (4, 4))
    outer = ResidualPathways({"in": inner, "fc": fc})
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    table = fit(nn.Sequential(outer, *head), [(x, y)], restarts="free").effective_dimension()
    rows = [(row.layer, row.path) for row in table.paths]
    assert rows == [("0", "in"), ("0", "fc"), ("0.paths.in", "a"), ("0.paths.in", "b"), ("4", "")]
    inside = table.of("0.paths.in", "a").parameters + table.of("0.paths.in", "b").parameters
    assert table.of("0", "in").parameters == inside
