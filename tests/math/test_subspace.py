"""M1, M3 and the helpers of the protected subspace: where it starts, what is projected out, what is refused."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from keeplora.math import (
    append_directions,
    explained_share,
    extend_basis,
    extend_basis_with_gradient,
    orthonormality_error,
    project_out,
    subspace,
    weight_basis,
)
from tests.math.strategies import (
    EPS32,
    PROPERTY,
    SLACK,
    bases,
    dtypes,
    energies,
    f64,
    generator,
    gram_error,
    inner_energies,
    matrices,
    orthonormal,
    same_bits,
    seeds,
    shapes,
    signs_are_fixed,
    with_spectrum,
)

# ---------------------------------------------------------------------------------------------------------------- M1


@PROPERTY
@given(matrices(spectra=("even", "random", "spread", "deficient")), inner_energies)
def test_weight_basis_is_the_smallest_rank_that_reaches_the_energy(W: Tensor, energy: float) -> None:
    assume(float(W.abs().max()) > 0)
    U = weight_basis(W, energy)
    squares = np.linalg.svd(f64(W), compute_uv=False) ** 2
    captured = (f64(W) @ f64(U)) ** 2
    p = U.shape[1]
    assert captured.sum() >= energy * squares.sum() * (1 - 2 * SLACK)  # p reaches ...
    assert squares[: p - 1].sum() < energy * squares.sum()  # ... and no p − 1 directions whatever do (Eckart–Young)
    assert U.shape[0] == W.shape[1]
    assert U.dtype == torch.float32
    assert gram_error(U) <= 1e-6


@PROPERTY
@given(shapes(), st.data(), seeds)
def test_energy_one_is_the_numerical_rank(shape: tuple[int, int], data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(0, min(shape)))
    rng = generator(seed)
    values = torch.rand(rank, generator=rng, dtype=torch.float64) + 0.1
    W = with_spectrum(*shape, values, rng).to(torch.float32)  # rounding to fp32 leaves noise in every direction
    U = weight_basis(W, 1.0)
    assert U.shape == (shape[1], rank)
    assert np.allclose(f64(W) @ f64(U) @ f64(U).T, f64(W), atol=1e-6)


@pytest.mark.parametrize("n", [3, 8, 40])
def test_the_numerical_rank_is_cut_at_fp32_eps_times_the_longer_side(n: int) -> None:
    cut = n * EPS32
    for second, rank in ((cut * 1.01, 2), (cut * 0.99, 1)):
        W = torch.zeros(n, 2, dtype=torch.float64)
        W[0, 0], W[1, 1] = 1.0, second
        assert weight_basis(W, 1.0).shape == (2, rank)
        assert weight_basis(W.T, 1.0).shape == (n, rank)


@PROPERTY
@given(matrices())
def test_energy_zero_protects_nothing(W: Tensor) -> None:
    assert weight_basis(W, 0.0).shape == (W.shape[1], 0)


@PROPERTY
@given(shapes(), energies)
def test_a_zero_weight_has_no_direction(shape: tuple[int, int], energy: float) -> None:
    assert weight_basis(torch.zeros(shape), energy).shape == (shape[1], 0)


def test_the_side_is_the_input_side_also_where_a_square_matrix_would_hide_it() -> None:
    W = torch.zeros(3, 3)
    W[0, 1] = 5.0  # reads input 1, writes output 0: the left vector e0 would protect an input that W ignores
    assert torch.equal(weight_basis(W, 1.0), torch.tensor([[0.0], [1.0], [0.0]]))


@PROPERTY
@given(shapes().filter(lambda s: s[0] != s[1]), seeds, inner_energies)
def test_a_non_square_weight_keeps_its_outputs_on_the_protected_inputs(
    shape: tuple[int, int], seed: int, energy: float
) -> None:
    W = torch.randn(shape, generator=generator(seed))
    U = weight_basis(W, energy)
    lost = f64(project_out(W.double(), U.double()))  # (out, in): fails on shapes alone with left vectors
    assert (lost**2).sum() <= (1 - energy + 2 * SLACK) * (f64(W) ** 2).sum()


@pytest.mark.parametrize(("energy", "p"), [(0.5, 2), (0.5 + 1e-9, 2), (0.5 + 1e-4, 3), (0.75, 3), (1.0, 4)])
def test_the_rank_is_not_one_short_and_the_slack_absorbs_rounding_only(energy: float, p: int) -> None:
    assert weight_basis(torch.eye(4) * 0.1, energy).shape == (4, p)


@PROPERTY
@given(matrices(), energies)
def test_bf16_and_fp32_twins_give_the_same_bits(W: Tensor, energy: float) -> None:
    half = W.to(torch.bfloat16)
    assert same_bits(weight_basis(half, energy), weight_basis(half.to(torch.float32), energy))


@PROPERTY
@given(matrices(), energies)
def test_weight_basis_is_deterministic_with_a_fixed_sign(W: Tensor, energy: float) -> None:
    before = W.clone()
    U = weight_basis(W, energy)
    assert same_bits(U, weight_basis(W.clone(), energy))
    assert torch.equal(W, before)
    assert signs_are_fixed(U)


def test_the_sign_of_the_weight_does_not_matter() -> None:
    W = with_spectrum(6, 4, torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), generator(3))
    assert torch.allclose(weight_basis(W, 1.0), weight_basis(-W, 1.0), atol=1e-6)


def test_no_graph_is_kept() -> None:
    W = torch.nn.Parameter(torch.randn(3, 4, generator=generator(0)))
    assert not weight_basis(W, 0.9).requires_grad
    assert not extend_basis_with_gradient(torch.zeros(4, 0), W, 0.9)[0].requires_grad


# ---------------------------------------------------------------------------------------------------------------- M3


@PROPERTY
@given(st.data(), seeds)
def test_project_out_is_an_orthogonal_projection(data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, 9))
    U = data.draw(bases(n)).double()
    X = torch.randn(2, 3, n, generator=generator(seed), dtype=torch.float64)
    once = project_out(X, U)
    assert once.shape == X.shape
    assert torch.allclose(project_out(once, U), once, atol=1e-6)  # idempotent to U's fp32 rounding
    assert U.shape[1] == 0 or float((once @ U).abs().max()) <= 1e-6
    removed = X - once
    assert torch.allclose(removed @ U @ U.T, removed, atol=1e-6)  # only the part in span(U) is taken away
    assert float((removed * once).sum().abs()) <= 1e-5


def test_project_out_of_nothing_copies_and_of_everything_is_zero() -> None:
    X = torch.randn(2, 3, generator=generator(0), dtype=torch.bfloat16)
    out = project_out(X, torch.zeros(3, 0))
    assert same_bits(out.float(), X.float())
    out.zero_()
    assert float(X.abs().max()) > 0
    assert float(project_out(X, torch.eye(3)).abs().max()) == 0


# ---------------------------------------------------------------------------------------------------------- helpers


@pytest.mark.parametrize("residual", [1.0, 1e-5, 1e-9])
def test_append_directions_makes_almost_dependent_directions_orthogonal(residual: float) -> None:
    rng = generator(1)
    Q = orthonormal(20, 8, rng)
    U = Q[:, :5].to(torch.float32)
    V = Q[:, :5] @ torch.randn(5, 3, generator=rng, dtype=torch.float64) + residual * Q[:, 5:]
    out = append_directions(U, V)
    assert same_bits(out[:, :5], U)
    assert gram_error(out) <= 1e-5
    if residual > 1e-6:  # below that, U's own fp32 rounding hides which direction was meant
        assert np.linalg.svd(f64(Q[:, 5:]).T @ f64(out[:, 5:]), compute_uv=False).min() >= 1 - 1e-3


def test_append_directions_refuses_what_does_not_fit() -> None:
    with pytest.raises(ArithmeticError, match="not orthonormal"):
        append_directions(torch.eye(3), torch.ones(3, 1))


def test_orthonormality_error_and_share_by_hand() -> None:
    U = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    assert orthonormality_error(U) == pytest.approx(0.1, abs=1e-6)
    assert orthonormality_error(torch.zeros(4, 0)) == 0
    C = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert explained_share(torch.eye(2)[:, :1], C) == pytest.approx(0.75)
    assert explained_share(torch.zeros(2, 0), C) == 0


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("energy", [-0.1, 1.0001, math.nan, math.inf])
def test_an_energy_out_of_range_is_refused(energy: float) -> None:
    message = f"energy must lie between 0 and 1, got {energy!r}"
    for call in (
        lambda: weight_basis(torch.eye(2), energy),
        lambda: extend_basis(torch.zeros(2, 0), torch.eye(2), energy),
        lambda: extend_basis_with_gradient(torch.zeros(2, 0), torch.eye(2), energy),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@given(dtypes, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_nan_and_infinity_are_refused_by_name(dtype: torch.dtype, value: float) -> None:
    bad = torch.eye(3, dtype=dtype)
    bad[1, 2] = value
    U = torch.zeros(3, 0)
    with pytest.raises(ValueError, match="W holds NaN or infinity"):
        weight_basis(bad, 0.5)
    with pytest.raises(ValueError, match="C holds NaN or infinity"):
        extend_basis(U, bad, 0.5)
    with pytest.raises(ValueError, match="G holds NaN or infinity"):
        extend_basis_with_gradient(U, bad, 0.5)


def test_shapes_that_do_not_match_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"W must be a matrix, got shape \(2, 2, 2\)"):
        weight_basis(torch.ones(2, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"C must be \(3, 3\) to match U, got \(2, 2\)"):
        extend_basis(torch.zeros(3, 0), torch.eye(2), 0.5)
    with pytest.raises(ValueError, match="G has 2 input dimensions but U has 3"):
        extend_basis_with_gradient(torch.zeros(3, 0), torch.ones(5, 2), 0.5)
    with pytest.raises(ValueError, match="X has 2 input dimensions but U has 3"):
        project_out(torch.ones(1, 2), torch.zeros(3, 0))


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(subspace, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
