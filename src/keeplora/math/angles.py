"""How two subspaces lie to each other, and how much of a matrix or of a task's features lies inside one.

U and V have orthonormal columns, shapes (in, k) and (in, m); sums and decompositions run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _f64(X: Tensor) -> Tensor:
    return X.detach().to(torch.float64)


def _check(U: Tensor, V: Tensor) -> None:
    if U.ndim != 2 or V.ndim != 2 or U.shape[0] != V.shape[0]:
        raise ValueError(
            f"two bases of one space are needed, (in, k) and (in, m), got shapes {tuple(U.shape)} and {tuple(V.shape)}"
        )


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Principal angles between span(U) and span(V) in radians, rising, (min(k, m),) float64.

    The cosines are the singular values of UᵀV. Below 45° an angle is taken from its sine instead, the singular values of
    V − U Uᵀ V, for a cosine near 1 has lost half of an angle's digits (Björck & Golub, Mathematics of Computation 27, 1973).

    >>> U, V = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]])
    >>> torch.rad2deg(principal_angles(U, V)).round(decimals=2).tolist()
    [53.13]
    """
    _check(U, V)
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    U, V = _f64(U), _f64(V)
    if V.shape[1] == 0:
        return torch.zeros(0, dtype=torch.float64)
    product = U.T @ V
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)
    sines = torch.linalg.svdvals(V - U @ product).clamp(max=1.0).flip(0)  # rising, as the angles are
    return torch.where(cosines > 0.5**0.5, torch.asin(sines), torch.acos(cosines))


def overlap(U: Tensor, V: Tensor) -> float | None:
    """tr(UᵀVVᵀU) / min(k, m), in [0, 1]: the mean squared cosine of the principal angles; None where one is empty.

    1 where one lies inside the other, 0 where they are orthogonal, and about max(k, m) / in for two drawn at random.

    >>> U, V = torch.eye(4)[:, :2], torch.eye(4)[:, 1:4]
    >>> overlap(U, V)
    0.5
    """
    _check(U, V)
    least = min(U.shape[1], V.shape[1])
    return min(1.0, float((_f64(U).T @ _f64(V)).square().sum()) / least) if least else None


def share_inside(M: Tensor, U: Tensor) -> float | None:
    """‖M U‖_F² / ‖M‖_F², in [0, 1]: how much of M's (or ΔW's) energy acts on span(U); None where M = 0.

    Args:
        M: (rows, in); U: (in, k).

    >>> share_inside(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    0.36
    """
    if M.shape[-1] != U.shape[0]:
        raise ValueError(f"M has {M.shape[-1]} input dimensions but U has {U.shape[0]}")
    M = _f64(M)
    total = float(M.square().sum())
    return min(1.0, round(float((M @ _f64(U)).square().sum()) / total, 15)) if total > 0 else None
