"""Recording calls: what users do to models changes no factor, or is refused by name."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from margeq.accumulation import accumulate_with
from margeq.curvature.explained import check_rules
from margeq.curvature.factors import InputCovCache
from margeq.curvature.options import KfacOptions
from margeq.errors import MissingRuleError, UnsupportedLayerError
from margeq.groups import P4
from margeq.laplace import accumulate
from margeq.layers import FactoredLinear2d, LiftingConv2d
from margeq.likelihoods import Categorical
from margeq.parameters import named_weights
from tests.oracles import F64, data_for, errors, net, worst_difference

SOFTMAX = Categorical()


def small_net(activation=None):
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    return net(conv, activation or nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))


def small_data(model, n_data=6):
    return data_for(model, SOFTMAX, n_data, 2, 3, 3)


def test_in_place_activations_change_nothing():
    model = small_net()
    in_place = small_net(nn.ReLU(inplace=True))
    in_place.load_state_dict(model.state_dict())
    batch = small_data(model)
    assert worst_difference(accumulate(in_place, [batch]), accumulate(model, [batch])) <= 1e-12


def test_frozen_weights_are_left_out_and_change_nothing():
    model = small_net()
    batch = small_data(model)
    whole = accumulate(model, [batch])
    model[0].weight.requires_grad_(False)
    state = accumulate(model, [batch])
    assert set(state.kron) == set(whole.kron) - {"0.weight"}
    assert worst_difference(state, whole) <= 1e-12


def test_excluded_weights_are_left_out_and_change_nothing():
    model = small_net()
    batch = small_data(model)
    state = accumulate(model, [batch], parameters=["3", "0.bias"])
    assert set(state.kron) == {"0.bias", "3.weight", "3.bias"}
    assert worst_difference(state, accumulate(model, [batch])) <= 1e-12


def test_hooks_of_the_user_stay_and_count():
    model = net(nn.Linear(4, 3), nn.Linear(3, 3))
    handle = model[0].register_forward_hook(lambda module, args, y: torch.tanh(y))
    batch = data_for(model, SOFTMAX, 1, 4)
    assert max(errors(model, batch, SOFTMAX).values()) <= 1e-10
    assert list(model[0]._forward_hooks) == [handle.id]


def test_dropout_is_off_and_flags_come_back():
    model = small_net(nn.Dropout(0.5))
    model[3].train(False)
    batch = small_data(model)
    flags = [module.training for module in model.modules()]
    assert worst_difference(accumulate(model, [batch]), accumulate(model, [batch])) == 0.0
    assert [module.training for module in model.modules()] == flags


def test_flags_and_hooks_come_back_after_an_error():
    model = net(nn.Linear(4, 3), nn.ReLU())
    model[1].train(False)
    with pytest.raises(ValueError, match="regression targets"):
        accumulate(model, [(torch.zeros(2, 4, dtype=F64), torch.zeros(2, 1))], "regression")
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not model[0]._forward_hooks


def test_a_weight_without_a_rule_is_refused_by_name():
    model = net(nn.Linear(4, 3), nn.GRU(3, 3))
    x, y = torch.zeros(2, 4, dtype=F64), torch.zeros(2, dtype=torch.long)
    with pytest.raises(MissingRuleError, match=r"'1.weight_ih_l0' of 1 \(GRU\)"):
        accumulate(model, [(x, y)])


class UsesWeightOutside(nn.Module):
    """Reads a weight past the forward of its module, which no hook can see."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)

    def forward(self, x):
        return self.map(x) @ self.map.weight


def test_a_weight_used_outside_its_module_is_found():
    model = net(UsesWeightOutside())
    with pytest.raises(UnsupportedLayerError, match=r"'0.map.weight' does not explain"):
        check_rules(model, named_weights(model), torch.randn(4, 3, dtype=F64))


def test_positions_folded_into_the_data_axis_are_refused():
    fold = nn.Flatten(0, 1)
    model = net(fold, nn.Linear(4, 3), nn.Unflatten(0, (-1, 5)), nn.Flatten())
    batch = data_for(model, SOFTMAX, 2, 5, 4)
    with pytest.raises(UnsupportedLayerError, match=r"1 \(Linear\) was called with 10 rows for 2"):
        accumulate(model, [batch])


class LooksSideways(nn.Module):
    """A path that the network does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


def test_an_unused_weight_has_no_curvature():
    model = net(LooksSideways())
    kron = accumulate(model, [data_for(model, SOFTMAX, 4, 3)]).kron["0.unused.weight"]
    assert kron.numel == 6
    assert kron.to_dense().abs().sum() == 0
    assert torch.isneginf(kron.log_eigenvalues()[0]).all()


@pytest.mark.parametrize("root", ["exact", "adaptive"])
def test_cached_input_factors_follow_the_data(root):
    model, cache, options = small_net(), InputCovCache(), KfacOptions(hessian_root=root)
    x, y = small_data(model)
    accumulate_with(model, [(x, y)], SOFTMAX, options, cache=cache)
    assert set(cache.factors) == {"0.weight", "0.bias"}
    moved = deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.3)
    for data in (x, x.flip(0), x + 1):  # the same data, in another order, other data
        batches = [(data[:4], y[:4]), (data[4:], y[4:])]
        cached = accumulate_with(moved, batches, SOFTMAX, options, cache=cache)
        fresh = accumulate_with(moved, batches, SOFTMAX, options)
        assert worst_difference(cached, fresh) <= 1e-12


@pytest.mark.parametrize("root", ["exact", "adaptive"])
def test_layers_with_a_state_that_moves_are_never_cached(root):
    """Running statistics are no weights, but decide what the weights of the layer see."""
    model = net(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4))
    batch, cache, options = small_data(model), InputCovCache(), KfacOptions(hessian_root=root)
    accumulate_with(model, [batch], SOFTMAX, options, cache=cache)
    assert cache.factors == {}
    model[0].running_mean += 0.5
    model[0].running_var *= 3.0
    cached = accumulate_with(model, [batch], SOFTMAX, options, cache=cache)
    fresh = accumulate_with(model, [batch], SOFTMAX, options)
    assert worst_difference(cached, fresh) == 0.0


def test_products_of_factors_are_never_cached():
    """What the second factor sees moves with the first one."""
    model = net(FactoredLinear2d(2, 3, (3, 3), (2, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    batch, cache, options = small_data(model), InputCovCache(), KfacOptions()
    accumulate_with(model, [batch], SOFTMAX, options, cache=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    cached = accumulate_with(model, [batch], SOFTMAX, options, cache=cache)
    fresh = accumulate_with(model, [batch], SOFTMAX, options)
    assert worst_difference(cached, fresh) == 0.0


def test_layers_whose_buffers_follow_from_their_arguments_are_cached():
    model = net(LiftingConv2d(2, 2, 3, group=P4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    cache = InputCovCache()
    accumulate_with(model, [small_data(model)], SOFTMAX, KfacOptions(), cache=cache)
    assert set(cache.factors) == {"0.weight", "0.bias"}


def test_in_place_activation_on_an_output_that_is_a_view():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = FactoredLinear2d(2, 3, (4, 4), (2, 2)), nn.Linear(12, 2)

        def forward(self, x):
            return self.out(torch.relu_(self.fc(x)).flatten(1))

    model, x = Net().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    check_rules(model, named_weights(model), x)
