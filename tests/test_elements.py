"""Some elements of a map and maps of some elements: values, gradients, transforms."""

from __future__ import annotations

import pytest
import torch

from margeq.layers.elements import place_elements, take_elements
from tests.oracles import F64

CHOICES = [[0], [0, 1, 7], [2, 3, 6], [0, 2, 4, 6], list(range(8))]


@pytest.mark.parametrize("chosen", CHOICES)
def test_values_are_those_of_indexing(chosen):
    x, indices = torch.randn(2, 3, 8, 4, 5, dtype=F64), torch.tensor(chosen)
    taken = take_elements(x, indices)
    assert torch.equal(taken, x[:, :, chosen])
    placed = torch.zeros_like(x)
    placed[:, :, chosen] = taken
    assert torch.equal(place_elements(taken, indices, 8), placed)


@pytest.mark.parametrize("chosen", CHOICES)
def test_derivatives(chosen):
    indices = torch.tensor(chosen)
    x = torch.randn(2, 1, 8, 2, dtype=F64, requires_grad=True)
    maps = torch.randn(2, 1, len(chosen), 2, dtype=F64, requires_grad=True)

    def take(x):
        return take_elements(x, indices).square()

    def place(maps):
        return place_elements(maps, indices, 8).square()

    for function, argument in ((take, x), (place, maps)):
        assert torch.autograd.gradcheck(function, argument, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, argument)


def test_inside_of_vmap():
    indices = torch.tensor([0, 1, 5])
    x = torch.randn(4, 2, 3, 6, 2, dtype=F64)

    def both(one):
        return place_elements(2.0 * take_elements(one, indices), indices, 6)

    each = torch.stack([both(one) for one in x])
    assert torch.equal(torch.vmap(both)(x), each)

    def gradient(one):
        return torch.func.grad(lambda z: both(z).pow(3).sum())(one)

    expected = 24 * x.pow(2) * torch.isin(torch.arange(6), indices)[:, None]
    torch.testing.assert_close(torch.vmap(gradient)(x), expected)
