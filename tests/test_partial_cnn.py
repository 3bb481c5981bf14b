"""The network of three gated convolutions."""

import pytest
import torch

from margeq.groups import P4, P4M, C, D
from margeq.layers import GroupGate
from margeq.models import partial_cnn
from tests.oracles import F64


def network(**options):
    torch.manual_seed(0)
    return partial_cnn(3, widths=(2, 2, 4), kernel_size=3, **options).double().eval()


@torch.no_grad()
def error(model, group):
    """Largest change of the output, relative to its size."""
    x = torch.randn(2, 1, 10, 10, dtype=F64)
    plain = model(x)
    moved = [model(torch.rot90(x, k, (2, 3))) for k in range(4)]
    moved += [model(torch.rot90(x, k, (2, 3)).flip(3)) for k in range(4)] if group == P4M else []
    return max(float((y - plain).norm() / plain.norm()) for y in moved)


@pytest.mark.parametrize("group", [P4, P4M], ids=repr)
def test_the_whole_group_leaves_outputs_alone(group):
    assert error(network(group=group, partial=False), group) < 1e-12
    assert error(network(group=group, width=1.0, mirror=1.0), group) < 1e-12
    assert error(network(group=group, width=0.6, mirror=0.5), group) > 1e-3


def test_gates_at_the_ends_are_the_networks_without_them():
    whole, without = network(width=1.0), network(partial=False)
    whole.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(2, 1, 10, 10, dtype=F64)
    torch.testing.assert_close(whole(x), without(x))


@pytest.mark.parametrize(("group", "n_gates"), [(C(1), 0), (D(1), 3), (P4, 3), (P4M, 6)])
def test_what_is_learned(group, n_gates):
    model = network(group=group, trained_by="loss")
    gates = [module for module in model.modules() if isinstance(module, GroupGate)]
    assert sum(len(list(gate.parameters())) for gate in gates) == n_gates
    assert all(gate.hyperparameter_names == () for gate in gates)


def test_sizes():
    model = partial_cnn(2, widths=(4, 4, 8), in_channels=3).eval()
    assert model(torch.zeros(1, 3, 10, 10)).shape == (1, 2)
    assert model(torch.zeros(1, 3, 17, 12)).shape == (1, 2)
