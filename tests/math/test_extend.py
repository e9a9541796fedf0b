"""M8 and M8g: how the protected subspace grows after a task, by its features or by its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keeplora.math import (
    extend_basis,
    extend_basis_with_gradient,
    orthonormality_error,
    weight_basis,
)
from tests.math.strategies import (
    EPS32,
    PROPERTY,
    SLACK,
    bases,
    covariances,
    energies,
    f64,
    generator,
    gram_error,
    matrices,
    orthonormal,
    same_bits,
    seeds,
    shapes,
    signs_are_fixed,
    with_spectrum,
)

# ---------------------------------------------------------------------------------------------------------------- M8


def _residual_eigenvalues(U: Tensor, C: Tensor) -> np.ndarray:
    u, c = f64(U), f64(C)
    keep = np.eye(u.shape[0]) - u @ u.T
    return np.linalg.eigvalsh(keep @ c @ keep)[::-1]


def _share(U: Tensor, C: Tensor) -> float:
    u, c = f64(U), f64(C)
    return float(np.trace(u.T @ c @ u) / np.trace(c)) if np.trace(c) > 0 else 1.0


@PROPERTY
@given(st.data(), energies)
def test_extend_basis(data: st.DataObject, energy: float) -> None:
    n = data.draw(st.integers(1, 9))
    U, C = data.draw(bases(n)), data.draw(covariances(n))
    max_dim = data.draw(st.one_of(st.none(), st.integers(0, n)))
    U_new, share = extend_basis(U, C, energy, max_dim=max_dim)
    k, m = U.shape[1], U_new.shape[1] - U.shape[1]

    assert same_bits(U_new[:, :k], U)  # what was protected stays, bit for bit
    assert gram_error(U_new) <= 1e-5
    assert k + m <= max(k, n if max_dim is None else max_dim)
    assert share == pytest.approx(min(1.0, _share(U_new, C)), abs=1e-12)

    eigenvalues, total = _residual_eigenvalues(U, C), float(np.trace(f64(C)))
    already = _share(U, C) * total
    cut = (n if energy == 1 else 1) * EPS32 * max(eigenvalues[0], np.linalg.eigvalsh(f64(C))[-1])
    rank = int((eigenvalues > cut).sum())
    stopped = k + m == n or m == rank or k + m == max_dim or (max_dim is not None and max_dim <= k)
    if energy > 0 and total > 0 and not stopped:
        assert share >= energy - 2 * SLACK
    if m:  # the fewest: by Ky Fan no m − 1 directions of the residual space explain more than these
        assert already + eigenvalues[: m - 1].sum() < energy * total * (1 - SLACK / 2) or energy == 1
        assert share * total == pytest.approx(already + eigenvalues[:m].sum(), rel=1e-5)
    if energy == 0 or already >= energy * total:
        assert energy == 1 or m == 0


@PROPERTY
@given(st.data())
def test_energy_one_protects_every_direction_that_the_features_use(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 9))
    rank = data.draw(st.integers(1, n))
    X = with_spectrum(rank, n, torch.linspace(1, 2, rank, dtype=torch.float64), generator(data.draw(seeds)))
    U, share = extend_basis(torch.zeros(n, 0), X.T @ X, 1.0)
    assert U.shape == (n, rank)
    assert share == pytest.approx(1.0, abs=1e-6)


@PROPERTY
@given(st.data(), energies, st.integers(-60, 60))
def test_extend_basis_does_not_see_the_scale_of_C(data: st.DataObject, energy: float, power: int) -> None:
    n = data.draw(st.integers(1, 9))
    U, C = data.draw(bases(n)), data.draw(covariances(n))
    plain, share = extend_basis(U, C, energy)
    scaled, scaled_share = extend_basis(U, C * 2.0**power, energy)
    assert same_bits(plain, scaled)
    assert share == scaled_share


def test_extend_basis_does_not_see_a_scale_that_rounds() -> None:
    C = torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=torch.float64))
    for scale in (1e-30, 0.3, 7e20):
        U, share = extend_basis(torch.zeros(4, 0), C * scale, 0.8)
        assert U.shape == (4, 2)
        assert share == pytest.approx(8 / 9.5)


@PROPERTY
@given(st.data(), energies)
def test_extend_basis_is_deterministic_and_leaves_its_inputs_alone(data: st.DataObject, energy: float) -> None:
    n = data.draw(st.integers(1, 9))
    U, C = data.draw(bases(n)), data.draw(covariances(n))
    U_before, C_before = U.clone(), C.clone()
    first, share = extend_basis(U, C, energy)
    again, share_again = extend_basis(U.clone(), C.clone(), energy)
    assert same_bits(first, again)
    assert share == share_again
    assert same_bits(U, U_before)
    assert same_bits(C, C_before)
    assert signs_are_fixed(first[:, U.shape[1] :])


@PROPERTY
@given(st.data(), seeds)
def test_features_that_are_protected_already_add_nothing(data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, n))
    rng = generator(seed)
    U = orthonormal(n, k, rng).to(torch.float32)
    X = torch.randn(20, k, generator=rng, dtype=torch.float64) @ U.double().T
    for energy in (0.99, 1.0):
        U_new, share = extend_basis(U, X.T @ X, energy)
        assert U_new.shape == (n, k)
        assert share == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("residual", "added"), [(1e-3, 1), (1e-5, 1), (1e-9, 0), (1e-14, 0)])
def test_a_near_empty_residual_is_protected_exactly_or_called_noise(residual: float, added: int) -> None:
    rng = generator(5)
    Q = orthonormal(12, 5, rng)
    U, v = Q[:, :4].to(torch.float32), Q[:, 4:]
    C = U.double() @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) @ U.double().T + residual * v @ v.T
    U_new, _ = extend_basis(U, C, 1.0)
    assert U_new.shape[1] == 4 + added
    assert gram_error(U_new) <= 1e-5
    if added:
        assert abs(float(U_new[:, 4].double() @ v[:, 0])) == pytest.approx(1.0, abs=1e-4)


def test_capacity_and_budget_stop_and_say_so_in_the_share() -> None:
    C = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    empty = torch.zeros(4, 0)
    U, share = extend_basis(empty, C, 1.0, max_dim=2)
    assert U.shape == (4, 2)
    assert share == pytest.approx(0.7)
    same, share = extend_basis(U, C, 1.0, max_dim=2)
    assert same_bits(same, U)
    assert share == pytest.approx(0.7)
    assert extend_basis(U, C, 1.0, max_dim=1)[0].shape == (4, 2)  # a budget below what is held takes nothing away
    full, share = extend_basis(U, C, 1.0, max_dim=99)
    assert full.shape == (4, 4)
    assert share == pytest.approx(1.0)
    assert same_bits(extend_basis(full, C, 1.0)[0], full)


def test_a_lopsided_C_counts_by_its_symmetric_part() -> None:
    C = torch.diag(torch.tensor([4.0, 3.0, 2.0]))
    lopsided = C + torch.tensor([[0.0, 0.4, 0.0], [-0.4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(extend_basis(torch.zeros(3, 0), lopsided, 0.7)[0], extend_basis(torch.zeros(3, 0), C, 0.7)[0])


def test_no_feature_at_all_is_fully_explained() -> None:
    U, share = extend_basis(torch.zeros(3, 0), torch.zeros(3, 3), 0.99)
    assert (U.shape, share) == ((3, 0), 1.0)


@PROPERTY
@given(st.data(), seeds)
def test_many_tasks_keep_every_earlier_column_and_stay_orthonormal(data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(4, 12))
    rng = generator(seed)
    U = weight_basis(torch.randn(n, n, generator=rng), 0.3)
    for _ in range(5):
        X = torch.randn(2, n, generator=rng)
        C = X.T @ X
        before = U
        U, share = extend_basis(U, C, 0.99)
        assert same_bits(U[:, : before.shape[1]], before)
        assert share >= 0.99 - 2 * SLACK
        assert orthonormality_error(U) == pytest.approx(gram_error(U), abs=1e-12)
        assert gram_error(U) <= 1e-5


# --------------------------------------------------------------------------------------------------------------- M8g


@PROPERTY
@given(st.data(), energies)
def test_gradient_memory_appends_the_right_singular_vectors_of_the_residual_gradient(
    data: st.DataObject, energy: float
) -> None:
    shape = data.draw(shapes())
    G = data.draw(matrices(shape))
    U = data.draw(bases(shape[1]))
    U_new, share = extend_basis_with_gradient(U, G, energy)
    k, m = U.shape[1], U_new.shape[1] - U.shape[1]
    g, u = f64(G), f64(U)
    residual = g - g @ u @ u.T
    _, S, Yt = np.linalg.svd(residual)
    total = (g**2).sum()
    rank = min(int((max(shape) * EPS32 * np.linalg.norm(g, 2) < S).sum()), shape[1] - k)

    assert same_bits(U_new[:, :k], U)
    assert gram_error(U_new) <= 1e-5
    if total == 0:
        assert (m, share) == (0, 1.0)
        return
    explained = (((g @ u) ** 2).sum() + np.concatenate([[0.0], np.cumsum(S[:rank] ** 2)])) / total
    reached = explained >= energy * (1 - SLACK)
    expected = 0 if energy == 0 else rank if energy == 1 or not reached.any() else int(reached.argmax())
    near_tie = np.abs(explained - energy * (1 - SLACK)).min() < 1e-9 and energy < 1
    assert near_tie or m == expected
    assert share == pytest.approx(min(1.0, explained[m]), abs=1e-5)
    if m and (m == len(S) or S[m - 1] > 1.01 * S[m] + 1e-5 * S[0]):  # the span is unique only beside a gap
        overlap = np.linalg.svd(Yt[:m] @ f64(U_new)[:, k:], compute_uv=False)
        assert overlap.min() >= 1 - 1e-3


def test_gradient_memory_at_energy_one_has_the_numerical_rank_of_the_gradient() -> None:
    G = torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 1e-8]))
    assert extend_basis_with_gradient(torch.zeros(4, 0), G, 1.0)[0].shape == (4, 3)


def test_a_flat_tail_of_features_is_not_taken_for_noise() -> None:
    n = 1024  # each direction of the tail lies below n · eps(fp32) of the first, all of them together are a tenth of tr C
    eigenvalues = torch.full((n,), 0.9 * n * EPS32, dtype=torch.float64)
    eigenvalues[0] = 1.0
    share = extend_basis(torch.zeros(n, 0), torch.diag(eigenvalues), 0.95)[1]
    assert share >= 0.95 - 2 * SLACK


def test_a_flat_tail_of_the_gradient_is_not_taken_for_noise() -> None:
    n = 256  # singular values are compared with the fp32 rounding of G, not their squares
    sigma = torch.full((n,), math.sqrt(0.9 * n * EPS32), dtype=torch.float64)
    sigma[0] = 1.0
    U, share = extend_basis_with_gradient(torch.zeros(n, 0), torch.diag(sigma), 0.999)
    assert share >= 0.999 - 2 * SLACK
    assert U.shape[1] == weight_basis(torch.diag(sigma), 0.999).shape[1]
