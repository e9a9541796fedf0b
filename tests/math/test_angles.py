"""Principal angles, overlaps and shares inside a subspace."""

from __future__ import annotations

import math

import pytest
import torch

from keeplora.math.angles import overlap, principal_angles, share_inside


def basis(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


@pytest.mark.parametrize(("k", "m"), [(3, 3), (2, 5), (5, 2), (7, 6)])
def test_angles_are_scipys(k, m):
    from scipy.linalg import subspace_angles

    U, V = basis(8, k, 0), basis(8, m, 1)
    wanted = sorted(subspace_angles(U.numpy(), V.numpy()))
    assert torch.allclose(principal_angles(U, V), torch.tensor(wanted), atol=1e-12)
    assert overlap(U, V) == pytest.approx(sum(math.cos(a) ** 2 for a in wanted) / min(k, m))


def test_a_small_angle_keeps_its_digits():
    for angle in (1e-6, 1e-10):
        U = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        V = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
        assert float(principal_angles(U, V)) == pytest.approx(angle, rel=1e-5)  # from the cosine: 0 or 1e-8


def test_empty_and_nested_subspaces():
    U = basis(6, 4, 0)
    assert principal_angles(U, U[:, :0]).shape == (0,)
    assert overlap(U, U[:, :0]) is None
    assert overlap(U, U[:, 1:3]) == pytest.approx(1.0)
    assert overlap(U[:, :2], U[:, 2:]) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="two bases of one space"):
        principal_angles(U, basis(5, 2, 0))


def test_share_inside():
    U, M = basis(6, 2, 0), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    rest = torch.linalg.qr(U, mode="complete").Q[:, 2:]
    inside, outside = share_inside(M, U), share_inside(M, rest)
    assert inside is not None
    assert outside is not None
    assert inside + outside == pytest.approx(1.0)
    assert share_inside(torch.zeros(2, 6), U) is None
    with pytest.raises(ValueError, match="6 input dimensions but U has 5"):
        share_inside(M, basis(5, 2, 0))
