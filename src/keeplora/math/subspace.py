"""Protected subspaces of a linear layer's input space: how U starts (M1). `keeplora.math.growth` says how it grows.

Notation is METHOD.md's: a layer is y = W x with W of shape (out, in); U of shape (in, k) has orthonormal columns and
P = U Uᵀ. Whatever dtype comes in, decompositions and sums run in float64 and bases come out in float32, so that a
bf16 model gets the same subspace as its fp32 twin up to the rounding of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
RELATIVE_SLACK = 1e-6
"""Slack of the energy comparison for energies below one (M1)."""


def check_energy(energy: float) -> float:
    """Return ``energy`` as a float if it lies in [0, 1]; ``ValueError`` otherwise."""
    if not 0.0 <= float(energy) <= 1.0:
        raise ValueError(f"energy must lie between 0 and 1, got {energy!r}")
    return float(energy)


def _matrix(name: str, M: Tensor) -> Tensor:
    if M.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(M.shape)}")
    if not torch.isfinite(M).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return M.detach().to(torch.float64)


def fix_signs(V: Tensor) -> Tensor:
    """Flip columns so that each one's entry of largest magnitude is positive: one fixed sign, so results reproduce."""
    if V.numel() == 0:
        return V
    pivot = V.abs().argmax(dim=0, keepdim=True)
    sign = torch.sign(V.gather(0, pivot))
    return V * torch.where(sign == 0, torch.ones_like(sign), sign)


def smallest_rank(energies: Tensor, energy: float, *, total: float, already: float = 0.0) -> int:
    """Smallest p with ``already + Σ_{i<p} energies[i] ≥ energy · total`` (relative slack 1e-6); all of them if none.

    ``energies`` is a descending float64 vector, already cut at the numerical rank. ``energy = 1`` asks for all of it.
    """
    if energy <= 0 or energies.numel() == 0:
        return 0
    if energy >= 1:
        return int(energies.numel())
    goal = energy * total * (1 - RELATIVE_SLACK)
    if already >= goal:
        return 0
    reached = already + torch.cumsum(energies.cpu(), 0) >= goal  # a GPU's cumsum may differ from one run to the next
    hits = torch.nonzero(reached)
    return int(hits[0]) + 1 if hits.numel() else int(energies.numel())


GRAM_SIDE = 64
"""Smallest side from which `right_vectors` goes by the Gram matrix: below it nothing is gained."""


def right_vectors(M: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of a float64 matrix, by the eigenvectors of its smaller Gram matrix.

    Args:
        M: (out, in) float64.

    Returns:
        (sigma, V): sigma (n,) falling, V (in, n), n = min(out, in). A singular value is right to about eps(fp64) · σ_1² / σ_i,
        so what lies below σ_1 · 1e-7 is noise; everything that calls this cuts at max(out, in) · eps(fp32) · σ_1, far above.
        Columns of V for out < in are Mᵀ L / σ: orthonormal to eps(fp64) · (σ_1 / σ_i)², to be passed through a QR.

    Only one side's vectors are made: 0.6 of an SVD's time for a square matrix, a third and less for one of 4 : 1
    (``benchmarks/task_boundary.py``).

    >>> sigma, V = right_vectors(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    >>> sigma.tolist(), V.abs().tolist()
    ([2.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    n_out, n_in = M.shape
    if min(n_out, n_in) < GRAM_SIDE:
        _, sigma, Rt = torch.linalg.svd(M, full_matrices=False)
        return sigma, Rt.T
    scale = M.abs().max()
    M = M / torch.where(scale > 0, scale, torch.ones_like(scale))  # squares of 1e-200 would be lost
    squares, vectors = torch.linalg.eigh(M.T @ M if n_out >= n_in else M @ M.T)
    sigma, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if n_out < n_in:
        vectors = (M.T @ vectors) / torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    return sigma * scale, vectors


def weight_basis(W: Tensor, energy: float) -> Tensor:
    """Principal input subspace of a weight (M1).

    Args:
        W: weight, shape (out, in), any float dtype.
        energy: ε_w in [0, 1], the share of ‖W‖_F² that the basis must reach. 0 gives no direction; 1 gives the
            numerical rank (σ_i > max(out, in) · eps(fp32) · σ_1).

    Returns:
        U₀ of shape (in, p), float32, orthonormal columns in order of falling singular value: the *right* singular
        vectors. The reference's CLIP half takes the left ones, which only a square matrix hides.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> weight_basis(W, 0.6).shape, weight_basis(W, 0.9).shape   # 9/14 = 0.64, 13/14 = 0.93
    (torch.Size([3, 1]), torch.Size([3, 2]))
    """
    energy = check_energy(energy)
    W64 = _matrix("W", W)
    n_out, n_in = W64.shape
    if energy == 0 or W64.numel() == 0:
        return W64.new_zeros((n_in, 0), dtype=torch.float32)
    if energy < 1:
        sigma, V = right_vectors(W64)
    else:  # the very last directions count, and only an SVD has them to full precision
        _, sigma, Rt = torch.linalg.svd(W64, full_matrices=False)
        V = Rt.T
    rank = int((sigma > max(n_out, n_in) * EPS32 * sigma[0]).sum()) if sigma[0] > 0 else 0
    squares = sigma.square()
    p = smallest_rank(squares[:rank], energy, total=float(squares.sum()))
    if n_out < n_in and energy < 1:
        V = torch.linalg.qr(V[:, :p]).Q
    return fix_signs(V[:, :p]).to(torch.float32)


def project_out(X: Tensor, U: Tensor) -> Tensor:
    """X (I − U Uᵀ): the rows of X without their part in span(U) (M3).

    Args:
        X: shape (..., in). U: shape (in, k), orthonormal columns, k ≥ 0.

    >>> project_out(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[0., 2.]])
    """
    if X.shape[-1] != U.shape[0]:
        raise ValueError(f"X has {X.shape[-1]} input dimensions but U has {U.shape[0]}")
    if U.shape[1] == 0:
        return X.clone()
    U = U.to(X.dtype)
    return X - (X @ U) @ U.T


def orthonormality_error(U: Tensor) -> float:
    """‖UᵀU − I‖_max, computed in float64; 0 for an empty basis."""
    if U.shape[1] == 0:
        return 0.0
    U64 = U.detach().to(torch.float64)
    return float((U64.T @ U64 - torch.eye(U64.shape[1], dtype=torch.float64, device=U64.device)).abs().max())


def check_orthonormal(V: Tensor, U: Tensor | None = None) -> None:
    """`ArithmeticError` unless V's columns (float32) are orthonormal, and orthogonal to U's, to 1e-5."""
    found = V.T @ V
    found.diagonal().sub_(1.0)
    error = float(found.abs().max()) if V.shape[1] else 0.0
    if U is not None and U.shape[1] and V.shape[1]:
        error = max(error, float((U.T @ V).abs().max()))
    if error > 1e-5:
        raise ArithmeticError(f"the extended basis is not orthonormal: max |UᵀU − I| = {error:.2e} > 1e-5")


def append_directions(U: Tensor, V: Tensor) -> Tensor:
    """[U, V'] with V' = V made orthonormal and orthogonal to U. U's own columns come back untouched, bit for bit.

    Args:
        U: (in, k) float32 orthonormal. V: (in, m) directions, linearly independent of each other and of U.

    Returns:
        (in, k + m) float32 with ‖·ᵀ· − I‖_max ≤ 1e-5, asserted.
    """
    if V.shape[1] == 0:
        return U.to(torch.float32)
    U64 = U.detach().to(torch.float64)
    V64 = V.detach().to(torch.float64)
    # Twice is enough (Kahan/Parlett): the second pass removes what rounding brought back in the first.
    for _ in range(2):
        V64 = project_out(V64.T, U64).T
        V64 = torch.linalg.qr(V64).Q
    out = torch.cat([U64, fix_signs(V64)], dim=1).to(torch.float32)
    error = orthonormality_error(out)
    if error > 1e-5:
        raise ArithmeticError(f"the extended basis is not orthonormal: max |UᵀU − I| = {error:.2e} > 1e-5")
    return out


def explained_share(U: Tensor, C: Tensor) -> float:
    """Share of tr C that lies in span(U): tr(UᵀCU) / tr C in [0, 1]; 1 when C = 0."""
    C64 = C.detach().to(torch.float64)
    total = float(C64.diagonal().sum())
    if total <= 0:
        return 1.0
    U64 = U.detach().to(torch.float64)
    return min(1.0, max(0.0, float((U64 * (C64 @ U64)).sum()) / total))
