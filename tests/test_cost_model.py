"""The cost model of many ranks counts what is there, and follows from its parts."""

import pytest

from benchmarks.cost_model import ASSUMED, Layer, Machine, Update, resnet18, seconds
from benchmarks.networks import digits
from benchmarks.scaling import NETWORKS
from margeq.laplace import accumulate
from margeq.parameters import named_weights


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_the_network(name):
    make, layers = NETWORKS[name]
    model = make()
    weights = {n: w for n, w in named_weights(model).items() if n.endswith("weight")}
    assert [layer.inner * layer.out for layer in layers] == [w.numel() for w in weights.values()]
    assert [layer.out for layer in layers] == [len(w) for w in weights.values()]
    ((images, _),) = digits(1)
    positions = []
    for module in model:
        images = module(images)
        if list(module.parameters()):
            positions.append(images[0, 0].numel())
    assert [layer.positions for layer in layers] == positions


@pytest.mark.parametrize("name", NETWORKS)
def test_megabytes_are_those_of_the_sums(name):
    make, layers = NETWORKS[name]
    state = accumulate(make(), digits(8), hessian_root="mc")
    sums = [t for kron in state.kron.values() for t in kron.tensors().values()]
    counted = Update(layers, 8, 1).megabytes
    # counts and the input factors of biases, a number each, are left out
    assert counted == pytest.approx(sum(t.numel() for t in sums) * 8 / 1e6, rel=1e-3)


def test_a_resnet18_has_the_known_numbers():
    layers = resnet18()
    update = Update(layers, 50_000, 1)
    # 11,173,962 with its norms; 0.56 G multiplications on 32 x 32
    assert sum(layer.inner * layer.out for layer in layers) == 11_173_962 - 9_600 - 10
    assert sum(layer.multiplications for layer in layers) == 555_422_720
    assert update.megabytes == pytest.approx(2 * 376, rel=1e-3)
    shares = [update.busiest(1) / update.busiest(ranks) for ranks in (2, 4, 64)]
    assert shares == pytest.approx([1.79, 3.58, 3.58], abs=0.005)


def test_times_follow_from_counts_and_rates():
    update = Update([Layer(3, 2, 5)], 7, 4)
    # 30 multiplications, 1 + 2 * 4 passes; factors 5 * (9 + 4 * 4)
    assert update.operations == 2 * 7 * (30 * 9 + 5 * (9 + 4 * 4))
    machine = Machine("m", flops=10.0, eigen_flops=2.0, bandwidth=13.0, latency=0.5)
    run, eigen, reduction = seconds(update, machine, 2)
    assert run == pytest.approx(update.operations / 20)
    assert eigen == pytest.approx(4 / 3 * 27 / 2)
    assert reduction == pytest.approx(8 * 13 / 13 + 0.5)
    assert seconds(update, machine, 1)[2] == 0.0


@pytest.mark.parametrize("machine", ASSUMED, ids=lambda machine: machine.name)
def test_more_ranks_are_never_slower_in_the_range_that_is_shown(machine):
    update = Update(resnet18(), 50_000, 1)
    totals = [sum(seconds(update, machine, ranks)) for ranks in (1, 8, 16, 32, 64)]
    assert totals == sorted(totals, reverse=True)
