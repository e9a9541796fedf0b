"""The sketch of a covariance: its bound is deterministic, what it says is explained is a true lower bound, M8 follows from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import (
    CovarianceSketch,
    FrequentDirections,
    Subspace,
    explained_share,
    new_directions,
    new_sketched_directions,
    orthonormality_error,
    shares,
)
from keeplora.math.frequent_directions import ALPHA
from tests.math.strategies import PROPERTY, generator, orthonormal, seeds


def sketched(x: torch.Tensor, rank: int, pieces: int = 1) -> CovarianceSketch:
    fd = FrequentDirections(rank, x.shape[1])
    for piece in x.tensor_split(pieces):
        fd.add(piece)
    return fd.sketch()


def rows(n: int, width: int, seed: int, decay: float) -> torch.Tensor:
    rng = generator(seed)
    scales = torch.logspace(0, -decay, width, dtype=torch.float64)
    return torch.randn(n, width, generator=rng, dtype=torch.float64) * scales @ orthonormal(width, width, rng)


@PROPERTY
@given(
    n=st.integers(1, 60), width=st.integers(2, 12), rank=st.integers(1, 6), seed=seeds, decay=st.sampled_from([0.0, 1, 4]),
    pieces=st.integers(1, 4),
)  # fmt: skip
def test_error_lies_between_nothing_and_the_shed_mass(n, width, rank, seed, decay, pieces):
    x = rows(n, width, seed, decay)
    sketch = sketched(x, rank, pieces)
    C, scale = x.T @ x, float((x.T @ x).diagonal().sum())
    gaps = torch.linalg.eigvalsh(C - sketch.B.T @ sketch.B)
    assert sketch.B.shape[0] <= rank
    assert abs(sketch.trace - scale) <= 1e-12 * scale
    assert float(gaps[0]) >= -1e-12 * scale  # BᵀB ≼ C
    assert float(gaps[-1]) <= sketch.shed + 1e-12 * scale
    assert sketch.shed <= scale / max(1, int(ALPHA * rank)) + 1e-12 * scale  # and that without seeing the data


@PROPERTY
@given(width=st.integers(3, 12), k=st.integers(0, 3), seed=seeds, energy=st.sampled_from([0.5, 0.9, 0.99]))
def test_explained_share_is_a_lower_bound_and_reaches_the_energy_or_takes_all(width, k, seed, energy):
    x = rows(50, width, seed, 1.5)
    rank = width // 2 + 1
    U = orthonormal(width, k, generator(seed + 1)).float()
    for S in (Subspace(U), Subspace.of(torch.cat([U, torch.zeros(width, 0)], dim=1))):
        V, share = new_sketched_directions(S, sketched(x, rank), energy)
        both = torch.cat([U, V], dim=1)
        assert orthonormality_error(both) <= 1e-5
        assert share <= explained_share(both, x.T @ x) + 1e-6
        assert share >= energy - 1e-5 or V.shape[1] >= min(rank, width - k) - k


def test_by_the_complement_as_by_the_columns():
    x, U = rows(80, 10, 3, 1.0), orthonormal(10, 7, generator(4)).float()
    columns, smaller = Subspace(U), Subspace.of(U)
    assert smaller.by_complement
    sketch = sketched(x, 6)
    (V, share), (N, other) = (new_sketched_directions(S, sketch, 0.98) for S in (columns, smaller))
    assert V.shape == N.shape
    assert torch.linalg.matrix_norm(V - N @ (N.T @ V), 2) < 1e-5
    assert share == pytest.approx(other, abs=1e-6)


def test_where_nothing_is_shed_it_is_the_covariance():
    x = rows(5, 40, 0, 1.0)  # five directions fit into eight rows
    sketch, S, C = sketched(x, 8), Subspace(torch.zeros(40, 0)), x.T @ x
    assert sketch.shed == 0
    (V, share), (exact, true) = new_sketched_directions(S, sketch, 0.95), new_directions(S, C, 0.95)
    assert V.shape == exact.shape
    assert torch.allclose(V, exact, atol=1e-5)
    assert share == pytest.approx(true, abs=1e-7)
    assert torch.allclose(sketch.shares(V), shares(V, C))


def test_leading_directions_keep_their_energy(monkeypatch):
    """What plain frequent directions would take off all of them is taken off the last fifth."""
    x = rows(400, 30, 1, 1.0)
    C = x.T @ x
    first = torch.linalg.eigh(C).eigenvectors[:, -3:]
    true = float(shares(first, C).sum())
    assert float(sketched(x, 15).shares(first).sum()) > 0.998 * true
    monkeypatch.setattr("keeplora.math.frequent_directions.ALPHA", 1.0)
    assert float(sketched(x, 15).shares(first).sum()) < 0.98 * true


@PROPERTY
@given(seed=seeds, cut=st.integers(0, 40))
def test_shards_merge(seed, cut):
    x = rows(40, 9, seed, 1.0)
    one, other = FrequentDirections(4, 9), FrequentDirections(4, 9)
    one.add(x[:cut])
    other.add(x[cut:])
    one.merge(other)
    sketch, C = one.sketch(), x.T @ x
    gaps, scale = torch.linalg.eigvalsh(C - sketch.B.T @ sketch.B), float(C.diagonal().sum())
    assert abs(sketch.trace - scale) <= 1e-12 * scale
    assert -1e-12 * scale <= float(gaps[0])
    assert float(gaps[-1]) <= sketch.shed + 1e-12 * scale


def test_what_it_is_not_given():
    with pytest.raises(ValueError, match="at least 1"):
        FrequentDirections(0, 4)
    with pytest.raises(ValueError, match="input dimensions"):
        new_sketched_directions(Subspace(torch.zeros(3, 0)), CovarianceSketch(torch.ones(1, 4), 4.0, 0.0), 0.5)
    empty = FrequentDirections(2, 3).sketch()
    V, share = new_sketched_directions(Subspace(torch.zeros(3, 0)), empty, 0.9)
    assert (V.shape, share) == ((3, 0), 1.0)
