"""Guarded decompositions: the jitter ladder, clamping, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from margeq.errors import NonFiniteError, NotPSDError, NumericalWarning
from margeq.linalg import log_det_one_plus, project, psd_eigenvalues, psd_eigh, whitened
from tests.oracles import F64, relative_error

DECOMPOSITIONS = pytest.mark.parametrize(
    ("name", "decompose"),
    [("eigvalsh", psd_eigenvalues), ("eigh", lambda *a: psd_eigh(*a)[::2])],
    ids=["values", "vectors"],
)


def matrices(rank=3):
    rows = torch.randn(2, 5, rank, dtype=F64)
    return rows @ rows.mT


def test_eigenvectors_are_orthogonal_and_give_the_matrix_back():
    found = matrices()
    values, vectors, clamped = psd_eigh(found, "w", 1e-15)
    assert clamped == 0
    assert torch.equal(values > 0, torch.tensor([False, False, True, True, True]).expand(2, 5))
    torch.testing.assert_close(vectors @ (values[..., None] * vectors.mT), found)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5, dtype=F64).expand(2, 5, 5))


@DECOMPOSITIONS
def test_a_clearly_negative_eigenvalue_is_clamped_with_a_warning(name, decompose):
    with pytest.warns(NumericalWarning, match="1 negative eigenvalues of the factor of 'w'"):
        values, clamped = decompose(torch.diag(torch.tensor([-1.0, 2.0, 3.0], dtype=F64)), "w")
    assert clamped == 1
    assert values.tolist() == [0.0, 2.0, 3.0]


@DECOMPOSITIONS
def test_non_finite_entries_are_refused(name, decompose):
    spoilt = matrices()
    spoilt[0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="'w' has 1 non-finite entries"):
        decompose(spoilt, "w")


@DECOMPOSITIONS
@pytest.mark.parametrize("failures", [1, 2, 4])
def test_jitter_is_added_step_by_step_and_only_so_often(name, decompose, failures, monkeypatch):
    genuine, tried = getattr(torch.linalg, name), []

    def fragile(matrix):
        tried.append(matrix)
        if len(tried) <= failures:
            raise torch.linalg.LinAlgError("no convergence")
        return genuine(matrix)

    monkeypatch.setattr(torch.linalg, name, fragile)
    found = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if failures > 3:
            with pytest.raises(NotPSDError, match="even with jitter 1e-06"):
                decompose(found, "w")
        else:
            values, _ = decompose(found, "w")
    assert [w.category for w in caught] == [NumericalWarning] * min(failures, 3)
    assert "adding 1e-10 of its mean diagonal" in str(caught[0].message)
    if failures > 3:
        return
    jitter = 2.0 * 10.0 ** (2 * failures - 12)
    assert (values - torch.tensor([1.0, 3.0], dtype=F64)).tolist() == pytest.approx(
        [jitter, jitter], rel=1e-4
    )


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 0)])
@pytest.mark.parametrize("scale", [1.0, 1e9], ids=["cholesky", "svd"])
def test_log_determinant_and_trace_of_one_plus_a_product(shape, scale):
    rows = scale * torch.randn(shape, dtype=F64)
    values = torch.linalg.svdvals(rows).square()
    assert float(log_det_one_plus(rows)) == pytest.approx(float(values.log1p().sum()), rel=1e-12)
    trace = float(whitened(rows).square().sum())
    assert trace == pytest.approx(float((values / (1 + values)).sum()), rel=1e-12)


LAYOUTS = {
    "contiguous": "ntbi",
    "positions-innermost": "bint",
    "positions-innermost-per-datum": "nbit",
    "data-innermost": "tbin",
}


@pytest.mark.parametrize("shared", [True, False], ids=["one-matrix", "matrix-per-block"])
@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), (3, 1, 2, 4), (1, 5, 2, 4), (3, 5, 1, 1)], ids=str)
def test_a_product_along_the_last_axis_in_any_memory_order(shared, order, sizes):
    extents = dict(zip("ntbi", sizes, strict=True))
    memory = torch.randn([extents[axis] for axis in order], dtype=F64)
    rows = memory.permute([order.index(axis) for axis in "ntbi"]).requires_grad_()
    matrices = torch.randn(1 if shared else sizes[2], 6, sizes[3], dtype=F64, requires_grad=True)
    spread = matrices.expand(sizes[2], -1, -1)
    expected = torch.einsum("bji,ntbi->ntbj", spread, rows)
    found = project(rows, matrices)
    assert found.shape == expected.shape
    assert relative_error(found.detach(), expected.detach()) <= 1e-14
    column = torch.randn_like(expected)
    by_einsum = torch.autograd.grad(expected, [rows, matrices], column)
    by_project = torch.autograd.grad(found, [rows, matrices], column)
    assert max(map(relative_error, by_project, by_einsum)) <= 1e-14


@pytest.mark.parametrize("shared", [True, False], ids=["one-matrix", "matrix-per-block"])
@pytest.mark.parametrize("order", ["bint", "nbit"])
def test_a_product_keeps_the_memory_order(shared, order):
    extents = {"n": 3, "t": 5, "b": 2, "i": 4}
    memory = torch.randn([extents[axis] for axis in order], dtype=F64)
    rows = memory.permute([order.index(axis) for axis in "ntbi"])
    found = project(rows, torch.randn(1 if shared else 2, 6, 4, dtype=F64))
    assert found.permute(["ntbi".index(axis) for axis in order]).is_contiguous()
