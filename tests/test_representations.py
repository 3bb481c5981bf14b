"""Representations and how they combine; irreducible ones; maps between them."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from margeq.errors import ConfigError
from margeq.groups import (
    P4,
    P4M,
    C,
    D,
    FiniteGroup,
    LieRepresentation,
    Representation,
    S,
    intertwiners,
    invariants,
    irreps,
    regular,
    rotations,
    standard,
    trivial,
)

F64 = torch.float64

QUATERNIONS = torch.tensor(
    [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
        [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
        [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    ],
    dtype=F64,
)
Q8 = FiniteGroup("Q8", torch.cat([QUATERNIONS, -QUATERNIONS]))

GROUPS = pytest.mark.parametrize(
    "group", [C(1), C(2), C(5), D(1), P4M, D(5), S(3), S(4), Q8], ids=str
)


def sign(n):
    return Representation(S(n), torch.linalg.det(S(n).matrices)[:, None, None])


def assert_homomorphism(group, matrices):
    products = matrices[:, None] @ matrices[None]
    torch.testing.assert_close(products, matrices[group.product], rtol=0, atol=1e-12)


# --- representations


@GROUPS
def test_constructors_and_combinations_multiply_like_the_group(group):
    own, all_, one = standard(group), regular(group), trivial(group)
    combined = [own, all_, one, own.dual(), own + one, own * own, 2 * own, own * all_.dual()]
    dims = [group.order if rep is all_ else rep.dim for rep in combined]
    for rep, dim in zip(combined, dims, strict=True):
        assert rep.matrices.shape == (group.order, dim, dim)
        assert_homomorphism(group, rep.matrices)


@GROUPS
def test_characters_add_and_multiply(group):
    one, other = standard(group), regular(group)
    chi, psi = one.characters, other.characters
    torch.testing.assert_close((one + other).characters, chi + psi)
    torch.testing.assert_close((one * other).characters, chi * psi)
    torch.testing.assert_close((3 * one).characters, 3 * chi)
    torch.testing.assert_close(one.dual().characters, chi[group.inverse])
    assert psi.tolist() == [group.order] + [0.0] * (group.order - 1)


def test_blocks_of_sums_and_products():
    one, other = standard(S(3)), standard(S(3)) * sign(3)
    for g in range(6):
        a, b = one.matrices[g], other.matrices[g]
        assert torch.equal((one + other).matrices[g], torch.block_diag(a, b))
        assert torch.equal((one * other).matrices[g], torch.kron(a, b))
        assert torch.equal((2 * one).matrices[g], torch.block_diag(a, a))


def test_the_regular_representation_moves_functions():
    group, f = P4M, torch.randn(8, dtype=F64)
    for g in range(8):
        moved = torch.stack([f[group.compose(int(group.inverse[g]), h)] for h in range(8)])
        assert torch.equal(regular(group).matrices[g] @ f, moved)
    assert torch.equal(regular(C(5)).matrices[2] @ f[:5], f[:5].roll(2))


def test_permutations_are_recognised():
    assert standard(S(3)).permutation is not None
    assert (regular(C(3)) + trivial(C(3))).permutation.tolist()[1] == [1, 2, 0, 3]
    assert sign(3).permutation is None
    assert standard(P4).permutation is None


def test_a_lie_representation_exponentiates_like_the_group():
    vector = rotations(3)
    t = torch.randn(3, dtype=F64)

    def group_element(rep):
        return torch.linalg.matrix_exp(torch.einsum("m,mab->ab", t, rep.generators))

    r = group_element(vector)
    torch.testing.assert_close(r @ r.T, torch.eye(3, dtype=F64))
    torch.testing.assert_close(group_element(vector * vector), torch.kron(r, r))
    torch.testing.assert_close(group_element(vector + vector), torch.block_diag(r, r))
    torch.testing.assert_close(group_element(2 * vector), torch.block_diag(r, r))
    torch.testing.assert_close(group_element(vector.dual()), r.T.inverse())
    assert group_element(trivial(vector)).tolist() == [[1.0]]


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 3), (4, 6)])
def test_generators_of_rotations(n, count):
    generators = rotations(n).generators
    assert generators.shape == (count, n, n)
    assert torch.equal(generators.mT, -generators)
    assert torch.linalg.matrix_rank(generators.flatten(1)) == count


def test_copies_share_the_matrices_and_print_short():
    rep = standard(S(3))
    assert deepcopy(rep) is rep
    assert repr(rep) == "Representation(S(3), dim=3)"
    vector = rotations(3)
    assert deepcopy(vector) is vector
    assert repr(vector) == "LieRepresentation(generators=3, dim=3)"


def test_the_matrices_are_the_representation_s_own():
    matrices = S(3).matrices.clone()
    rep = Representation(S(3), matrices)
    matrices.zero_()
    assert_homomorphism(S(3), rep.matrices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Representation(S(3), torch.ones(5, 1, 1)), "5 matrices for the 6 elements"),
        (lambda: Representation(S(3), torch.arange(6.0).reshape(6, 1, 1)), "no representation"),
        (lambda: Representation(C(3), 2 * torch.ones(3, 1, 1)), "no representation"),
        (lambda: Representation(C(4), S(4).matrices[:4]), "no representation"),
        (lambda: Representation(C(2), torch.ones(2, 1)), r"\(2, 1\) must be"),
        (lambda: Representation(C(2), torch.ones(2, 1, 2)), r"\(2, 1, 2\) must be"),
        (lambda: Representation(C(2), torch.ones(2, 1, 1, dtype=torch.complex128)), "real"),
        (lambda: Representation(C(2), [[1.0]]), "real tensor"),
        (lambda: Representation(C(1), torch.full((1, 1, 1), math.nan)), "not finite"),
        (lambda: LieRepresentation(torch.zeros(0, 3, 3)), r"\(0, 3, 3\) must be"),
        (lambda: standard(S(3)) + regular(C(3)), r"two groups, S\(3\) and C\(3\)"),
        (lambda: standard(S(3)) * regular(C(3)), r"two groups, S\(3\) and C\(3\)"),
        (lambda: rotations(3) + rotations(2), "3 and 1 generators"),
        (lambda: rotations(3) * rotations(2), "3 and 1 generators"),
        (lambda: 0 * standard(S(3)), "0 copies"),
        (lambda: 1.5 * rotations(2), "1.5 copies"),
        (lambda: rotations(1), r"rotations\(1\)"),
        (lambda: intertwiners(standard(S(3)), rotations(3)), "two Representation"),
        (lambda: intertwiners(rotations(2), rotations(3)), "1 and 3 generators"),
        (lambda: intertwiners(30 * rotations(3), 30 * rotations(3)), "8100 entries"),
    ],
)  # fmt: skip
def test_what_is_no_representation_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_sums_with_something_else_are_type_errors():
    with pytest.raises(TypeError):
        standard(S(3)) + 1
    with pytest.raises(TypeError):
        rotations(3) + standard(S(3))
    with pytest.raises(ConfigError, match="copies"):
        standard(S(3)) * rotations(3)


# --- irreducible representations

CLASSES = [
    (C(1), 1), (C(2), 2), (C(5), 5), (C(12), 12), (D(1), 2), (P4M, 5), (D(5), 4), (D(6), 6),
    (S(3), 3), (S(4), 5), (S(5), 7), (Q8, 5),
]  # fmt: skip


@pytest.mark.parametrize(("group", "n_classes"), CLASSES, ids=lambda value: str(value))
def test_irreps_are_unitary_and_complete_with_orthonormal_characters(group, n_classes):
    found = irreps(group)
    assert len(found) == n_classes
    assert sum(rho.shape[-1] ** 2 for rho in found) == group.order
    for rho in found:
        assert rho.dtype == torch.complex128
        assert_homomorphism(group, rho)
        eye = torch.eye(rho.shape[-1], dtype=rho.dtype).expand_as(rho)
        torch.testing.assert_close(rho @ rho.mH, eye, rtol=0, atol=1e-12)
    chi = torch.stack([rho.diagonal(dim1=1, dim2=2).sum(-1) for rho in found])
    gram = chi @ chi.mH / group.order
    torch.testing.assert_close(gram, torch.eye(n_classes, dtype=gram.dtype), rtol=0, atol=1e-12)


def test_known_irreps():
    assert [rho.shape[-1] for rho in irreps(S(5))] == [1, 1, 4, 4, 5, 5, 6]
    assert [rho.shape[-1] for rho in irreps(Q8)] == [1, 1, 1, 1, 2]
    # the plane's own representation of D(4) is the two-dimensional one
    character = irreps(P4M)[-1].diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(character.real, standard(P4M).characters)
    # those of cyclic groups are the roots of unity
    angles = torch.stack([rho[1, 0, 0] for rho in irreps(C(12))]).angle() * 12 / (2 * math.pi)
    assert sorted(angles.round().int().remainder(12).tolist()) == list(range(12))
    for group in (C(12), S(4)):
        assert torch.allclose(irreps(group)[0].real, torch.ones(group.order, 1, 1, dtype=F64))


def test_irreps_are_kept():
    assert irreps(C(6)) is irreps(C(6))


# --- maps between representations

PAIRS = {
    "C4": (regular(P4), regular(P4), 4),
    "D4": (regular(P4M), regular(P4M), 8),
    "S3": (regular(S(3)), regular(S(3)), 6),
    "S4": (regular(S(4)), regular(S(4)), 24),
    "S5": (regular(S(5)), regular(S(5)), 120),
    "items": (standard(S(4)), standard(S(4)), 2),
    "pairs": (standard(S(4)) * standard(S(4)), standard(S(4)) * standard(S(4)), 15),
    "pairs-of-5": (standard(S(5)) * standard(S(5)), standard(S(5)) * standard(S(5)), 15),
    "item-to-pairs": (standard(S(4)), standard(S(4)) * standard(S(4)), 5),
    "no-symmetry": (2 * standard(C(1)), standard(C(1)), 8),
    "sign": (sign(4), standard(S(4)) * sign(4), 1),
    "sign-to-one": (sign(3), trivial(S(3)), 0),
    "plane": (standard(P4M), standard(P4M), 1),
    "plane-rotated": (standard(P4), standard(P4), 2),
    "plane-to-functions": (standard(D(3)), regular(D(3)), 2),
    "functions-and-sign": (regular(S(4)) + sign(4), regular(S(4)) + sign(4), 27),
    "SO2": (rotations(2), rotations(2), 2),
    "SO2-doubled": (2 * rotations(2), rotations(2), 4),
    "SO3": (rotations(3), rotations(3), 1),
    "SO3-cross": (rotations(3) * rotations(3), rotations(3), 1),
    "SO3-matrices": (rotations(3) * rotations(3), rotations(3) * rotations(3), 3),
    "SO3-none": (rotations(3), trivial(rotations(3)), 0),
    "SO4-dual": (rotations(4).dual(), rotations(4), 1),
    "no-rotation": (trivial(rotations(3)), trivial(rotations(3)), 1),
}  # fmt: skip


def elements(rep):
    """Matrices of the group: all of them, or exponentials of random elements of the algebra."""
    if isinstance(rep, Representation):
        return rep.matrices
    generator = torch.Generator().manual_seed(3)
    t = torch.randn(5, len(rep.generators), generator=generator, dtype=F64)
    return torch.linalg.matrix_exp(torch.einsum("gm,mab->gab", t, rep.generators))


@pytest.mark.parametrize(("rep_in", "rep_out", "dimension"), PAIRS.values(), ids=PAIRS)
def test_bases_have_the_right_dimension_commute_and_are_orthonormal(rep_in, rep_out, dimension):
    basis = intertwiners(rep_in, rep_out)
    assert basis.shape == (dimension, rep_out.dim, rep_in.dim)
    gram = torch.einsum("brs,crs->bc", basis, basis)
    torch.testing.assert_close(gram, torch.eye(dimension, dtype=F64), rtol=0, atol=1e-12)
    # random combinations: with 120 maps of 120 x 120 entries, all pairs would take a minute
    maps = torch.einsum("kb,brs->krs", torch.randn(3, dimension, dtype=F64), basis)
    for left, right in zip(elements(rep_out), elements(rep_in), strict=True):
        assert float((left @ maps - maps @ right).abs().max()) < 1e-10


@pytest.mark.parametrize("name", [n for n in PAIRS if n[:2] != "SO" and n != "no-rotation"])
def test_dimensions_are_those_of_the_characters(name):
    rep_in, rep_out, dimension = PAIRS[name]
    inner = (rep_out.characters * rep_in.dual().characters).mean()
    assert float(inner) == pytest.approx(dimension)


@pytest.mark.parametrize("group", [C(4), S(3), P4M], ids=str)
def test_orbits_averages_and_null_spaces_agree(group):
    """One space by three routes: pairs, averages (in a rotated frame), constraints."""
    rep = regular(group)
    turn = torch.linalg.qr(torch.randn(rep.dim, rep.dim, dtype=F64)).Q
    turned = Representation(group, turn @ rep.matrices @ turn.T)
    by_pairs = intertwiners(rep, rep).flatten(1)
    by_average = (turn.T @ intertwiners(turned, turned) @ turn).flatten(1)
    eye = torch.eye(rep.dim, dtype=F64)
    rows = [torch.kron(m, eye) - torch.kron(eye, m.T.contiguous()) for m in rep.matrices]
    _, values, vectors = torch.linalg.svd(torch.cat(rows))
    by_constraints = vectors[values < 1e-9]
    for found in (by_average, by_constraints):
        torch.testing.assert_close(found.T @ found, by_pairs.T @ by_pairs, rtol=0, atol=1e-12)


def test_a_representation_that_is_not_orthogonal():
    group, shear = P4M, torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=F64)
    rep = Representation(group, shear @ group.matrices @ shear.inverse())
    basis = intertwiners(rep, standard(group))
    assert len(basis) == 1
    expected = shear.inverse() / shear.inverse().norm()
    torch.testing.assert_close(basis[0] * basis[0, 0, 0].sign(), expected, rtol=0, atol=1e-12)


def test_the_basis_of_items_is_equality_and_the_rest():
    same, other = intertwiners(standard(S(3)), standard(S(3)))
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(same, eye / 3**0.5)
    torch.testing.assert_close(other, (1 - eye) / 6**0.5)


def test_the_map_from_pairs_of_vectors_is_the_cross_product():
    (cross,) = intertwiners(rotations(3) * rotations(3), rotations(3))
    a, b = torch.randn(2, 3, dtype=F64)
    expected = torch.linalg.cross(a, b) / 6**0.5
    torch.testing.assert_close((cross @ torch.kron(a, b)).abs(), expected.abs())


def test_a_basis_does_not_depend_on_how_the_space_was_found():
    """Equal spaces have equal bases: here the constraints stand in another order."""
    vector = rotations(3)
    other = LieRepresentation(vector.generators[[2, 0, 1]])
    first = intertwiners(vector * vector, vector * vector)
    second = intertwiners(other * other, other * other)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_invariant_vectors():
    torch.testing.assert_close(invariants(standard(S(4)))[0], torch.full((4,), 0.5, dtype=F64))
    assert invariants(standard(S(4)) * standard(S(4))).shape == (2, 16)
    assert invariants(sign(3)).shape == (0, 1)
    assert invariants(rotations(2)).shape == (0, 2)
    (metric,) = invariants(rotations(3) * rotations(3))
    torch.testing.assert_close(metric.reshape(3, 3) / metric[0], torch.eye(3, dtype=F64))


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        items, vector = standard(S(3)), rotations(3)
        assert len(intertwiners(items, trivial(S(3)) + 2 * items)) == 5
        assert len(intertwiners(vector * vector, vector)) == 1
