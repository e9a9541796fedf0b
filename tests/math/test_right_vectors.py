"""Singular vectors by the Gram matrix: those of the SVD wherever the callers cut."""

from __future__ import annotations

import pytest
import torch

from keeplora.math import orthonormality_error, residual_factor, weight_basis
from keeplora.math.subspace import EPS32, GRAM_SIDE, right_vectors
from tests.math.strategies import generator, orthonormal, with_spectrum

SHAPES = [(GRAM_SIDE, GRAM_SIDE), (90, 70), (70, 90), (200, 64), (64, 200)]


@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_equal_to_the_svd(n_out, n_in, scale):
    p = min(n_out, n_in)
    M = with_spectrum(n_out, n_in, scale * torch.logspace(0, -3, p, dtype=torch.float64), generator(1))
    sigma, V = right_vectors(M)
    _, wanted, Rt = torch.linalg.svd(M, full_matrices=False)
    assert float((sigma - wanted).abs().max()) <= 1e-9 * float(wanted[0])
    for k in (1, p // 2, p - 1):
        off = Rt[:k].T - V[:, :k] @ torch.linalg.lstsq(V[:, :k], Rt[:k].T).solution
        assert float(torch.linalg.matrix_norm(off, 2)) < 1e-7


@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_numerical_rank_is_the_same(n_out, n_in):
    """What the callers call noise, σ ≤ max(out, in) eps(fp32) σ₁, is noise either way."""
    values = torch.cat([torch.logspace(0, -3, 20, dtype=torch.float64), torch.zeros(min(n_out, n_in) - 20)])
    M = with_spectrum(n_out, n_in, values, generator(2))
    sigma, _ = right_vectors(M)
    assert int((sigma > max(n_out, n_in) * EPS32 * sigma[0]).sum()) == 20
    assert weight_basis(M, 1.0).shape[1] == 20
    assert weight_basis(M, 1 - 1e-5).shape[1] <= 20
    assert residual_factor(M, torch.zeros(n_in, 0), 40).shape[0] == 20


@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_weight_basis_is_orthonormal_and_that_of_the_svd(n_out, n_in):
    M = with_spectrum(n_out, n_in, torch.logspace(0, -2, min(n_out, n_in), dtype=torch.float64), generator(3))
    U = weight_basis(M, 0.9999)
    assert orthonormality_error(U) <= 1e-6
    R = torch.linalg.svd(M, full_matrices=False).Vh[: U.shape[1]].T
    assert torch.linalg.matrix_norm(R - U.double() @ (U.double().T @ R), 2) < 1e-6


def test_zero_and_a_residual_of_rounding_noise():
    assert right_vectors(torch.zeros(70, 70, dtype=torch.float64))[0].sum() == 0
    U = orthonormal(80, 30, generator(5))
    G = torch.randn(70, 30, generator=generator(6), dtype=torch.float64) @ U.T  # all of it is protected
    assert residual_factor(G, U.float(), 8).shape == (0, 80)
