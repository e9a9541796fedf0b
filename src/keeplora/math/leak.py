"""The numbers that prove what was protected: leaks of factors and of weights, and the two stability bounds (METHOD's theory)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _f64(X: Tensor) -> Tensor:
    return X.detach().to(torch.float64)


def _short(B: Tensor) -> Tensor:
    """R of B = Q R: ‖B M‖ = ‖R M‖ in the Frobenius and in the spectral norm, at a row per column of B and not per output."""
    B64 = _f64(B)
    return torch.linalg.qr(B64, mode="r").R if B64.shape[0] > B64.shape[1] else B64


def factor_leak(B: Tensor, A: Tensor, U: Tensor) -> float:
    """‖B A U‖_F / ‖B A‖_F: the share of an update that acts on protected inputs, from the factors; 0 when B A = 0.

    >>> A, U = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0], [0.0]])
    >>> round(factor_leak(torch.ones(3, 1), A, U), 6)
    0.6
    """
    return factor_leaks(B, A, U, [U.shape[1]])[0]


def factor_leaks(B: Tensor, A: Tensor, U: Tensor, widths: Sequence[int]) -> list[float]:
    """‖B A V‖_F / ‖B A‖_F for each block V of columns of U = [V₁, V₂, …]; 0 for an empty block, and when B A = 0.

    Args:
        B: (out, r'). A: (r', in). U: (in, k). widths: columns of each block, k in all or fewer.

    The squares add up: that of [V₁, V₂] is the sum of both. B A itself is never formed.
    """
    R = _short(B)
    RA = R @ _f64(A)
    norm = float(RA.norm())
    inside = RA @ _f64(U[:, : sum(widths)])
    return [float(part.norm()) / norm if norm > 0 else 0.0 for part in inside.split(list(widths), dim=1)]


def weight_leak(W: Tensor, W0: Tensor, U: Tensor) -> float:
    """‖(W − W₀) U‖_F / ‖W − W₀‖_F of weights as they are stored, rounding included; 0 when nothing moved."""
    D = _f64(W) - _f64(W0)
    norm = float(D.norm())
    return float((D @ _f64(U)).norm()) / norm if norm > 0 else 0.0


def rounding_floor(W0: Tensor, delta: Tensor, U: Tensor, dtype: torch.dtype) -> float:
    """The leak that rounding W₀ and W₀ + ΔW to ``dtype`` causes by itself, ‖E U‖_F / ‖ΔW‖_F.

    E = round(W₀ + ΔW) − round(W₀) − ΔW. Where W₀ is stored in ``dtype``, the second rounding changes nothing.

    >>> W0, delta = torch.ones(1, 1), torch.full((1, 1), 2.0**-9)      # below half a step of bf16 at 1: all of it is lost
    >>> rounding_floor(W0, delta, torch.ones(1, 1), torch.bfloat16)
    1.0
    """
    exact, change = _f64(W0) + _f64(delta), _f64(delta)
    norm = float(change.norm())
    error = _f64(exact.to(dtype)) - _f64(W0.to(dtype)) - change
    return float((error @ _f64(U)).norm()) / norm if norm > 0 else 0.0


def spectral_norm(M: Tensor) -> float:
    """‖M‖₂, exact, from the smaller Gram matrix; 0 for an empty one.

    >>> spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
    4.0
    """
    if M.numel() == 0:
        return 0.0
    M64 = _f64(M)
    scale = float(M64.abs().max())
    if scale == 0:
        return 0.0
    M64 = M64 / scale  # squares of 1e-200 would be lost
    gram = M64.T @ M64 if M64.shape[1] <= M64.shape[0] else M64 @ M64.T
    return scale * float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def product_norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖₂ from the factors: what stands for ‖s'B'‖₂ in the backward bound of several tasks together.

    >>> round(product_norm(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.6, 0.8]])), 6)
    2.0
    """
    return spectral_norm(_short(B) @ _short(_f64(A).T).T)


def forward_change(D_U: Tensor, W_U: Tensor) -> tuple[float, float]:
    """How much the answers to protected inputs moved: (random, worst), for x in span(U); 0 is forward stability.

    Args:
        D_U: (out, k), (W_T − W_t) U. W_U: (out, k), W_t U.

    Returns:
        random: √(E ‖(W_T − W_t) x‖² / E ‖W_t x‖²) over random directions x of span(U), which is ‖D_U‖_F / ‖W_U‖_F.
        worst: max over unit x of ‖(W_T − W_t) x‖, the spectral norm of D_U, over the root mean square of ‖W_t x‖. (A
        quotient at each single x has no maximum: W_t sends some of them to 0.) Both 0 for k = 0.

    >>> [round(value, 3) for value in forward_change(torch.diag(torch.tensor([0.3, 0.4])), torch.eye(2))]
    [0.354, 0.4]
    """
    size = float(_f64(W_U).norm())
    if D_U.shape[1] == 0 or size == 0:
        return 0.0, 0.0
    return float(_f64(D_U).norm()) / size, spectral_norm(D_U) * D_U.shape[1] ** 0.5 / size


def backward_bound(s: float, B: Tensor, explained: float, trace: float) -> float:
    """Upper bound s² ‖B‖₂² (1 − ε_t) tr C_t on Σ_x ‖s B A x‖² over the inputs of C_t, for a later task's B and A."""
    if B.numel() == 0:
        return 0.0
    return (s * spectral_norm(B)) ** 2 * (1.0 - explained) * trace


def backward_harm(B: Tensor, A: Tensor, C: Tensor) -> float:
    """Σ_x ‖B A x‖² over the inputs that built C = Σ x xᵀ: tr(ΔW C ΔWᵀ), the left side of the backward bound.

    Args:
        B: (out, R), A: (R, in): the later tasks' updates side by side, scales included. C: (in, in).

    >>> backward_harm(torch.tensor([[2.0]]), torch.tensor([[0.0, 1.0]]), torch.diag(torch.tensor([5.0, 3.0])))
    12.0
    """
    RA = _short(B) @ _f64(A)
    return max(0.0, float(((RA @ _f64(C)) * RA).sum()))
