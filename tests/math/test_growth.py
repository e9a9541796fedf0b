"""What joins U, found in the residual's coordinates: as by projecting, with all shares, and no λ₁ unless it is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import (
    CovarianceSketch,
    Subspace,
    complement,
    explained_share,
    feature_growth,
    gradient_growth,
    orthonormality_error,
    row_shares,
    shares,
    sketched_growth,
)
from keeplora.math.complement import ResidualSpace
from keeplora.math.growth import CovarianceEnergy, feature_tolerance, grow
from tests.math.strategies import PROPERTY, bases, generator, orthonormal, seeds, with_spectrum


def sides(U):
    return Subspace(U), Subspace(complement(U), True)


@PROPERTY
@given(st.data())
def test_the_residual_space_is_what_U_leaves(data):
    n = data.draw(st.integers(1, 12))
    U = data.draw(bases(n))
    X = torch.randn(5, n, generator=generator(data.draw(seeds)), dtype=torch.float64)
    for S in sides(U):
        space, m = ResidualSpace(S), n - U.shape[1]
        N = space.vectors(torch.eye(m, dtype=torch.float64))
        assert N.shape == (n, m)
        assert orthonormality_error(N) <= 1e-13
        assert m == 0 or U.shape[1] == 0 or float((N.T @ U.double()).abs().max()) <= 1e-6
        assert torch.allclose(space.coordinates(X), X @ N, atol=1e-12)


def test_by_columns_the_residual_space_is_orthogonal_beyond_the_rounding_of_U():
    U = orthonormal(200, 90, generator(1)).float()
    N = ResidualSpace(Subspace(U)).vectors(torch.eye(110, dtype=torch.float64))
    assert float((N.T @ U.double()).abs().max()) <= 1e-14


@pytest.mark.parametrize("k", [0, 30, 100, 128])
@pytest.mark.parametrize("kind", ["features", "gradient", "sketch"])
def test_shares_of_every_column_are_told(k, kind):
    """At widths where products and decompositions go by blocks, tall and wide."""
    rng = generator(k)
    U = orthonormal(128, k, rng).float()
    rows = with_spectrum(90, 128, torch.logspace(0, -1, 90, dtype=torch.float64), rng)
    C = rows.T @ rows
    for S in sides(U):
        if kind == "features":
            found = feature_growth(S, C, 0.9)
        elif kind == "gradient":
            found = gradient_growth(S, rows, 0.9)
        else:
            found = sketched_growth(S, CovarianceSketch(rows, float(C.trace()), 0.0), 0.9)
        both = torch.cat([U, found.V], dim=1)
        assert orthonormality_error(both) <= 1e-5
        assert torch.allclose(found.new, shares(found.V, C), atol=1e-9)
        assert torch.allclose(found.new, row_shares(found.V, rows), atol=1e-9)
        assert (found.old is None) == S.by_complement
        if found.old is not None:
            assert torch.allclose(found.old, shares(U, C), atol=1e-9)
        assert found.share == pytest.approx(explained_share(both, C), abs=1e-6)
        assert found.share >= 0.9 - 1e-6
        fewer = torch.cat([U, found.V[:, :-1]], dim=1)
        assert k == 128 or explained_share(fewer, C) < 0.9


def test_the_largest_eigenvalue_is_asked_for_only_where_noise_could_decide():
    asked = []

    class Watched(CovarianceEnergy):
        def largest(self) -> float:
            asked.append(1)
            return super().largest()

    S = Subspace(orthonormal(40, 10, generator(2)).float())
    falling = with_spectrum(60, 40, torch.logspace(0, -1, 40, dtype=torch.float64), generator(3))
    for energy in (0.5, 0.9, 0.999):
        grow(S, Watched(falling.T @ falling), energy, feature_tolerance(40, energy))
    assert not asked
    # All but a hundred-millionth lies in one direction of U: whether the rest is noise is for λ₁ to say.
    v = S.held[:, :1].double()
    C = v @ v.T + 1e-9 * torch.eye(40, dtype=torch.float64)
    found = grow(S, Watched(C), 1 - 1e-9, feature_tolerance(40, 1 - 1e-9))
    assert (asked, found.V.shape) == ([], (40, 0))  # reached by U alone
    found = grow(S, Watched(C), 1.0, feature_tolerance(40, 1.0))
    assert (asked, found.V.shape) == ([1], (40, 0))


def test_columns_that_are_not_orthonormal_are_refused():
    U = orthonormal(10, 4, generator(4)).float()
    U[:, 3] += 1e-3 * U[:, 0]
    with pytest.raises(ArithmeticError, match="the basis is not orthonormal"):
        feature_growth(Subspace(U), torch.eye(10), 0.9)
