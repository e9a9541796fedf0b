"""The fixed factor A of a new task (M2–M4), its scaling (M6) and its update (M7)."""

from __future__ import annotations

import torch
from torch import Tensor

from keeplora.math.complement import ResidualSpace, Subspace
from keeplora.math.leak import spectral_norm
from keeplora.math.subspace import EPS32, _matrix, fix_signs, right_vectors

FACTOR_TOLERANCE = 1e-6
"""max |A U| that `residual_factor` guarantees (M4)."""


def residual_factor(G: Tensor, U: Tensor | Subspace, rank: int) -> Tensor:
    """A: the top directions of the residual gradient Ĝ = G (I − U Uᵀ) (M3, M4).

    Args:
        G: (out, in), the new task's gradient at the merged weights, or its sketch Ψ G (l, in) with l ≥ min(r, out)
            (`keeplora.math.sketch`).
        U: (in, k) orthonormal, the protected subspace; k may be 0 or in; or the `Subspace`. What is decomposed is G N
            (out, in − k), with N a basis of what U leaves: Ĝ = (G N) Nᵀ.
        rank: r ≥ 1 as configured.

    Returns:
        A of shape (r', in) float32 with orthonormal rows and max |A U| ≤ 1e-6, where
        r' = min(r, out, in − k, numerical rank of Ĝ), the rank taken relative to ‖G‖₂ and not to ‖Ĝ‖: what is left
        when everything is protected is rounding noise, not a direction to learn in. r' may be 0.

    A minimises ‖Ĝ − Ĝ AᵀA‖_F over all A with orthonormal rows and A U = 0 (Prop 3.2).

    >>> G = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> residual_factor(G, torch.eye(3)[:, :1], 1).abs()
    tensor([[0., 1., 0.]])
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    G64 = _matrix("G", G)
    n_out, n_in = G64.shape
    S = U if isinstance(U, Subspace) else Subspace(U.detach())
    if S.n_in != n_in:
        raise ValueError(f"G has {n_in} input dimensions but U has {S.n_in}")
    limit = min(rank, n_out, n_in - S.k)
    if limit <= 0 or not bool(G64.any()):
        return G64.new_zeros((0, n_in), dtype=torch.float32)
    held = S.held.to(torch.float64)
    space = ResidualSpace(S)
    sigma, Y = right_vectors(space.coordinates(G64))
    sigma, noise = sigma[:limit], max(n_out, n_in) * EPS32
    r = int((sigma > noise * float(G64.norm())).sum())
    if r < limit:  # ‖G‖_F ≥ ‖G‖₂ did not settle it
        r = int((sigma > noise * spectral_norm(G64)).sum())
    V = space.vectors(Y[:, :r])
    # What is not quite orthonormal for σ ≪ σ₁ becomes so, and A U is rounding whatever the residual's size beside G.
    for _ in range(2):
        V = torch.linalg.qr(S.project_out(V.T).T).Q if r else V
    A = fix_signs(V).T.contiguous().to(torch.float32)
    A64 = A.to(torch.float64)
    # max |A U|; of a complement the rows' norms ‖a P‖, which no entry of A U exceeds.
    overlap = ((A64 - S.project_out(A64)).norm(dim=1) if S.by_complement else (A64 @ held).abs()).flatten()
    if overlap.numel() and float(overlap.max()) > FACTOR_TOLERANCE:
        raise ArithmeticError(
            f"A leaves the residual space: max |A U| = {float(overlap.max()):.2e} > {FACTOR_TOLERANCE:.0e}"
        )
    return A


def layer_alpha(layer_scale: float, lora_alpha: float, r: int, r_layer: int) -> float:
    """The `alpha` that PEFT must be given for a layer so that s = layer_scale · lora_alpha / r (METHOD.md, notation).

    PEFT divides alpha by the layer's *own* rank ``r_layer``; without the correction a layer whose rank shrank would
    learn faster in silence.

    >>> layer_alpha(0.5, 16, 16, 4) / 4
    0.5
    """
    return layer_scale * lora_alpha * r_layer / r


def lora_delta(s: float, B: Tensor, A: Tensor) -> Tensor:
    """ΔW = s · B A in float32, (out, in) (M7)."""
    return s * (B.to(torch.float32) @ A.to(torch.float32))
