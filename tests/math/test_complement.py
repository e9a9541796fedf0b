"""Holding the complement in place of the basis loses nothing: projections, A, what is added and what is explained are equal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import (
    CovarianceSketch,
    Subspace,
    complement,
    explained_share,
    extend_basis,
    extend_basis_with_gradient,
    held_bytes,
    new_directions,
    new_gradient_directions,
    orthonormality_error,
    project_out,
    residual_factor,
    shares,
)
from keeplora.math.growth import grow
from tests.math.strategies import (
    COSTLY,
    PROPERTY,
    bases,
    covariances,
    generator,
    gram_error,
    inner_energies,
    matrices,
    orthonormal,
    seeds,
    shapes,
    with_spectrum,
)


def projector(U):
    return U.double() @ U.double().T


def both(U):
    """The same subspace by its columns and by its complement, whichever is smaller."""
    return Subspace(U), Subspace(complement(U), True)


@PROPERTY
@given(st.data())
def test_a_subspace_projects_alike_by_either_side(data):
    n = data.draw(st.integers(1, 12))
    U = data.draw(bases(n))
    X = torch.randn(5, n, generator=generator(data.draw(seeds)), dtype=torch.float64)
    wanted = project_out(X, U.double())
    for S in (*both(U), Subspace.of(U)):
        assert (S.n_in, S.k) == U.shape
        assert torch.allclose(S.project_out(X), wanted, atol=1e-6)
        assert torch.allclose(projector(S.basis()), projector(U), atol=1e-6)
        assert gram_error(S.held) <= 1e-6
    small = Subspace.of(U)
    assert small.by_complement == (2 * U.shape[1] > n)
    assert small.bytes == held_bytes(n, U.shape[1]) == 4 * n * min(U.shape[1], n - U.shape[1])


@PROPERTY
@given(st.data(), inner_energies)
def test_features_add_the_same_by_either_side(data, energy):
    n = data.draw(st.integers(2, 12))
    U, C = data.draw(bases(n)), data.draw(covariances(n))
    wanted, share = extend_basis(U, C, energy)
    by_columns, by_complement = both(U)
    V, same_share = new_directions(by_columns, C, energy)
    assert torch.equal(torch.cat([U, V], dim=1), wanted)
    assert same_share == share
    V, other_share = new_directions(by_complement, C, energy)
    # Shares that lie within rounding of the goal may be told to reach it by the one and not by the other.
    near_tie = abs(share - energy) < 1e-5 or abs(other_share - energy) < 1e-5
    assert near_tie or V.shape[1] == wanted.shape[1] - U.shape[1]
    assert near_tie or other_share == pytest.approx(share, abs=1e-6)
    assert other_share == pytest.approx(explained_share(torch.cat([U, V], dim=1), C), abs=1e-6)
    assert gram_error(torch.cat([U, V], dim=1)) <= 1e-5


@PROPERTY
@given(st.data(), inner_energies)
def test_gradients_add_the_same_by_either_side(data, energy):
    shape = data.draw(shapes())
    G, U = data.draw(matrices(shape)), data.draw(bases(shape[1]))
    _, share = extend_basis_with_gradient(U, G, energy)
    by_columns, by_complement = both(U)
    _, one = new_gradient_directions(by_columns, G, energy)
    _, other = new_gradient_directions(by_complement, G, energy)
    assert one == share
    near_tie = abs(share - energy) < 1e-5 or abs(other - energy) < 1e-5
    assert near_tie or other == pytest.approx(share, abs=1e-6)


@COSTLY
@given(seeds, st.integers(0, 12), st.integers(1, 4), st.integers(4, 15))
def test_A_spans_the_same_by_either_side(seed, k, rank, n_out):
    rng = generator(seed)
    n = 12
    U = orthonormal(n, k, rng).to(torch.float32)
    # Singular values with gaps, so that the leading ones span one subspace and no other would do.
    G = with_spectrum(n_out, n, torch.logspace(0, -2, min(n_out, n), dtype=torch.float64), rng)
    one, other = (residual_factor(G, S, rank) for S in both(U))
    assert torch.equal(one, residual_factor(G, U, rank))
    assert one.shape == other.shape
    assert torch.allclose(one.T.double() @ one.double(), other.T.double() @ other.double(), atol=1e-5)
    if other.numel() and k:
        assert float((other.double() @ U.double()).abs().max()) <= 1e-6


def test_A_leaves_nothing_where_nothing_is_left():
    G = torch.randn(3, 4, generator=generator(0))
    assert residual_factor(G, Subspace.of(torch.eye(4)), 2).shape == (0, 4)
    assert Subspace.of(torch.eye(4)).bytes == 0
    V, share = new_directions(Subspace.of(torch.eye(4)), torch.eye(4), 0.9)
    assert (V.shape, share) == ((4, 0), 1.0)


def test_fifty_tasks_leave_the_complement_orthonormal_and_the_same_as_the_columns():
    n, rng = 160, generator(3)
    U = orthonormal(n, 40, rng).to(torch.float32)
    S, first = Subspace.of(U), U
    for task in range(50):
        x = torch.randn(2, n, generator=rng, dtype=torch.float64)
        V, _ = new_directions(S, x.T @ x, 1.0)
        assert V.shape[1] == 2
        S, U = S.extended(V), torch.cat([U, V], dim=1)
        assert S.k == U.shape[1] == 40 + 2 * (task + 1)
        assert S.by_complement == (2 * S.k > n)
        assert orthonormality_error(S.held) <= 1e-6
        assert orthonormality_error(U) <= 1e-5
    assert S.k == 140
    assert torch.allclose(projector(S.basis()), projector(U), atol=1e-6)
    assert float((S.held.double().T @ first.double()).abs().max()) <= 1e-6


def test_what_is_empty_lies_where_the_rest_does():
    there = torch.device("meta")  # stands for a GPU: tensors without values, which know their place
    assert complement(torch.empty(4, 0, device=there)).device == there
    nothing = CovarianceSketch(torch.empty(2, 4, device=there), trace=0.0, shed=0.0)
    assert nothing.shares(torch.empty(4, 3, device=there)).device == there
    assert grow(Subspace(torch.empty(4, 1, device=there)), SimpleNamespace(total=0.0), 0.9, 1e-7).V.device == there


def test_a_direction_that_is_protected_already_is_refused():
    S = Subspace.of(torch.eye(6)[:, :4])
    with pytest.raises(ArithmeticError, match="not orthonormal"):
        S.extended(torch.ones(6, 1))


@PROPERTY
@given(st.data())
def test_shares_add_up_to_what_is_explained(data):
    n = data.draw(st.integers(1, 10))
    U, C = data.draw(bases(n)), data.draw(covariances(n))
    found = shares(U, C)
    assert (found >= 0).all()
    if float(C.diagonal().sum()) > 0:
        assert float(found.sum()) == pytest.approx(explained_share(U, C), abs=1e-6)
