"""Z = Ψ G in place of G: what is exact (linearity, projection, low rank), what is unbiased, and what A keeps of Ĝ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keeplora.math import Subspace, project_out, residual_factor, sketch, sketch_matrix, sketch_rows
from tests.math.strategies import COSTLY, PROPERTY, generator, orthonormal, seeds, with_spectrum

SIZES = st.integers(1, 40)


def captured(G_hat: Tensor, A: Tensor) -> float:
    """‖Ĝ Aᵀ‖² over the most that any A of as many rows captures."""
    best = torch.linalg.svdvals(G_hat)[: len(A)].square().sum()
    return float((G_hat @ A.to(G_hat.dtype).T).square().sum() / best)


@given(SIZES, st.integers(1, 20), st.one_of(st.none(), st.integers(0, 50)))
@PROPERTY
def test_rows_are_the_rank_and_the_oversampling_and_no_more_than_there_are(n_out, r, p):
    rows = sketch_rows(n_out, r, p)
    assert rows == n_out or rows == r + (3 * r if p is None else p) < n_out
    assert rows >= min(r, n_out)  # so M4's rank is never cut by the sketch


@given(SIZES, st.data(), seeds)
@PROPERTY
def test_matrix_has_orthonormal_rows_of_one_length_and_follows_from_its_seed(n_out, data, seed):
    rows = data.draw(st.integers(1, n_out))
    Psi = sketch_matrix(n_out, rows, seed)
    assert Psi.dtype == torch.float32
    assert Psi.device.type == "cpu"
    torch.testing.assert_close(
        Psi.double() @ Psi.double().T, n_out / rows * torch.eye(rows).double(), rtol=0, atol=1e-4
    )
    assert torch.equal(Psi, sketch_matrix(n_out, rows, seed))
    if rows == n_out:
        assert torch.equal(Psi, torch.eye(n_out))
    elif n_out > 2:
        assert not torch.equal(Psi, sketch_matrix(n_out, rows, seed + 1))


@pytest.mark.parametrize("rows", [0, 6])
def test_a_matrix_of_more_rows_than_there_are_is_refused(rows):
    with pytest.raises(ValueError, match=f"a sketch of 5 rows has 1 to 5 rows, got {rows}"):
        sketch_matrix(5, rows, 0)


@given(seeds, st.integers(2, 5), st.permutations(range(5)))
@PROPERTY
def test_sketches_of_batches_and_ranks_add_up_in_any_order(seed, parts, order):
    rng = generator(seed)
    g, x = (
        torch.randn(20, 9, generator=rng, dtype=torch.float64),
        torch.randn(20, 7, generator=rng, dtype=torch.float64),
    )
    Psi = sketch_matrix(9, 4, seed).double()
    pieces = [sketch(Psi, a, b) for a, b in zip(g.tensor_split(parts), x.tensor_split(parts), strict=True)]
    total = sum((pieces[i] for i in order if i < parts), torch.zeros(4, 7, dtype=torch.float64))
    torch.testing.assert_close(total, Psi @ (g.T @ x), rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 4), st.integers(0, 12), st.booleans())
@COSTLY
def test_a_residual_of_low_rank_is_found_whole_however_small_it_is_beside_G(seed, rank, k, by_complement):
    rng = generator(seed)
    n_out, n_in = 24, 20
    basis = orthonormal(n_in, n_in, rng)
    U, free = basis[:, :k].to(torch.float32), basis[:, k:]
    small = 1e-2 if k else 1.0
    G_hat = (
        small * with_spectrum(n_out, n_in - k, 1 + torch.rand(rank, generator=rng, dtype=torch.float64), rng) @ free.T
    )
    G = G_hat + with_spectrum(n_out, k, torch.ones(k, dtype=torch.float64), rng) @ U.double().T if k else G_hat
    S = Subspace.of(U) if by_complement else Subspace(U)
    A = residual_factor(sketch_matrix(n_out, 8, seed).double() @ G, S, 6)
    assert len(A) == rank
    assert captured(project_out(G, U.double()), A) == pytest.approx(1, abs=1e-6)
    assert float((A @ U).abs().max() if k else 0) <= 1e-6


@given(
    seeds, st.integers(1, 30), st.integers(1, 30), st.integers(0, 20), st.sampled_from([torch.float32, torch.float64])
)
@COSTLY
def test_A_is_orthonormal_off_U_and_never_better_than_the_best(seed, n_out, n_in, p, dtype):
    rng = generator(seed)
    G = torch.randn(n_out, n_in, generator=rng, dtype=torch.float64).to(dtype)
    U = orthonormal(n_in, int(torch.randint(0, n_in + 1, (1,), generator=rng)), rng).to(torch.float32)
    r = 3
    Psi = sketch_matrix(n_out, sketch_rows(n_out, r, p), seed).to(dtype)
    A = residual_factor(Psi @ G, U, r)
    assert A.dtype == torch.float32
    assert len(A) == min(r, n_out, n_in - U.shape[1])
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
    if A.numel() and U.numel():
        assert float((A @ U).abs().max()) <= 1e-6
    if len(A):
        assert captured(project_out(G.double(), U.double()), A) <= 1 + 1e-6
    assert torch.equal(A, residual_factor(Psi @ G, U, r))


@given(seeds, st.integers(1, 12), st.integers(1, 12))
@COSTLY
def test_with_all_rows_it_is_the_exact_factor(seed, n_out, n_in):
    G = torch.randn(n_out, n_in, generator=generator(seed))
    Psi = sketch_matrix(n_out, sketch_rows(n_out, n_out), seed)
    assert torch.equal(residual_factor(Psi @ G, torch.zeros(n_in, 0), 2), residual_factor(G, torch.zeros(n_in, 0), 2))


def test_gram_matrix_and_norm_are_unbiased():
    G = torch.randn(10, 4, generator=generator(0), dtype=torch.float64)
    draws = torch.stack([sketch_matrix(10, 3, seed).double() @ G for seed in range(4000)])
    grams = draws.transpose(1, 2) @ draws
    error = (grams.mean(0) - G.T @ G).abs() / (grams.std(0) / 4000**0.5)
    assert float(error.max()) < 4  # standard errors, ten different entries
    assert float(draws.square().sum((1, 2)).mean()) == pytest.approx(float(G.square().sum()), rel=0.02)


def test_oversampling_buys_energy():
    """On singular values that fall like 1/i, which is slower than real gradients' (benchmarks/sketch.py)."""
    rng, r = generator(1), 8
    G = with_spectrum(160, 120, 1 / torch.arange(1, 121, dtype=torch.float64), rng)
    shares = []
    for p in (0, r, 3 * r, 7 * r):
        Z = [sketch_matrix(160, sketch_rows(160, r, p), seed).double() @ G for seed in range(5)]
        shares.append(sum(captured(G, residual_factor(z, torch.zeros(120, 0), r)) for z in Z) / 5)
    assert shares == sorted(shares)
    assert shares[0] < 0.97 < 0.98 < shares[2]
