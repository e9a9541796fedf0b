"""A subspace of a layer's inputs held by the smaller of two bases: U itself, or N of its orthogonal complement.

Of span(U) ⊂ R^in the method needs only projections. With [U, N] orthonormal and complete, P = U Uᵀ = I − N Nᵀ, so where U
passes half the width N says the same in fewer numbers (DualGPM, Liang & Li, arXiv 2310.06652), and what is left of G and C
is a matrix of N's size: Ĝ = (G N) Nᵀ (M3), Ĉ = N (Nᵀ C N) Nᵀ (M8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math.subspace import (
    EPS32,
    _extend,
    _matrix,
    append_directions,
    check_energy,
    fix_signs,
    orthonormality_error,
    project_out,
    smallest_rank,
)


def complement(U: Tensor) -> Tensor:
    """N (in, in − k) float32: orthonormal columns that span what U (in, k), orthonormal, leaves.

    >>> complement(torch.eye(3)[:, :2]).abs()
    tensor([[0.],
            [0.],
            [1.]])
    """
    n, k = U.shape
    if k == 0:
        return torch.eye(n, device=U.device)
    return fix_signs(torch.linalg.qr(U.detach().to(torch.float64), mode="complete").Q[:, k:]).to(torch.float32)


def held_bytes(n_in: int, k: int) -> int:
    """What a subspace of k out of ``n_in`` dimensions costs: float32 columns of the smaller side.

    >>> held_bytes(768, 100), held_bytes(768, 668)
    (307200, 307200)
    """
    return 4 * n_in * min(k, n_in - k)


@dataclass(frozen=True)
class Subspace:
    """span(U) of R^in by its smaller side. Make one with `Subspace.of`.

    Attributes:
        held: U (in, k), or where ``by_complement`` N (in, in − k); float32, orthonormal columns.

    >>> S = Subspace.of(torch.eye(4)[:, :3])
    >>> S.n_in, S.k, S.held.shape, S.by_complement, S.bytes
    (4, 3, torch.Size([4, 1]), True, 16)
    >>> S.project_out(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).abs()
    tensor([[0., 0., 0., 4.]])
    """

    held: Tensor
    by_complement: bool = False

    @classmethod
    def of(cls, U: Tensor) -> Subspace:
        """From U (in, k), orthonormal; N is made where k passes half of ``in``."""
        n, k = U.shape
        return cls(complement(U), True) if 2 * k > n else cls(U.to(torch.float32))

    @property
    def n_in(self) -> int:
        """Width of the layer's input."""
        return self.held.shape[0]

    @property
    def k(self) -> int:
        """Dimensions of span(U)."""
        return self.n_in - self.held.shape[1] if self.by_complement else self.held.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of what is held."""
        return self.held.numel() * self.held.element_size()

    def to(self, device: torch.device | str) -> Subspace:
        """The same on another device."""
        return Subspace(self.held.to(device), self.by_complement)

    def basis(self) -> Tensor:
        """U (in, k) float32: the columns themselves, or others of the same span, made anew at each call."""
        return complement(self.held) if self.by_complement else self.held

    def project_out(self, X: Tensor) -> Tensor:
        """X (I − P), X of shape (..., in) (M3)."""
        if not self.by_complement:
            return project_out(X, self.held)
        if X.shape[-1] != self.n_in:
            raise ValueError(f"X has {X.shape[-1]} input dimensions but the subspace lies in {self.n_in}")
        N = self.held.to(X.dtype)
        return (X @ N) @ N.T

    def extended(self, V: Tensor) -> Subspace:
        """span([U, V]); V (in, m) float32, orthonormal and orthogonal to U, as `new_directions` gives it.

        Raises:
            ArithmeticError: what comes out is not orthonormal, or N is not orthogonal to V.
        """
        m = V.shape[1]
        if m == 0:
            return self
        if not self.by_complement:
            return Subspace.of(torch.cat([self.held, V.to(torch.float32)], dim=1))
        N, V64 = self.held.to(torch.float64), V.detach().to(torch.float64)
        # V's coordinates in N; the rest of an orthonormal basis of those coordinates is what N keeps.
        rest = torch.linalg.qr(N.T @ V64, mode="complete").Q[:, m:]
        kept = N @ rest
        for _ in range(2 if kept.shape[1] else 0):  # as in `append_directions`: twice is enough
            kept = torch.linalg.qr(project_out(kept.T, V64).T).Q
        out = fix_signs(kept).to(torch.float32)
        error = orthonormality_error(torch.cat([V.to(torch.float32), out], dim=1))
        if error > 1e-5:
            raise ArithmeticError(
                f"the complement is not orthonormal and off V: max |[V N]ᵀ[V N] − I| = {error:.2e} > 1e-5"
            )
        return Subspace(out, True)


def shares(V: Tensor, C: Tensor) -> Tensor:
    """Share of tr C along each column of V: vᵀ C v / tr C, (m,) float64; zeros where C = 0.

    Over the orthonormal columns of a basis they add up to `explained_share`.
    """
    C64, V64 = C.detach().to(torch.float64), V.detach().to(torch.float64)
    total = float(C64.diagonal().sum())
    if total <= 0:
        return V64.new_zeros(V64.shape[1])
    return ((V64 * (C64 @ V64)).sum(0) / total).clamp(min=0)


def new_directions(S: Subspace, C: Tensor, energy: float) -> tuple[Tensor, float]:
    """What a task's features add to the protected subspace (M8), as `extend_basis` would, by either side.

    Args:
        C: (in, in), Σ x xᵀ. energy: ε_f in [0, 1].

    Returns:
        (V, ε_t): V (in, m) float32, orthonormal and orthogonal to U, and the share of tr C that [U, V] explains.

    >>> V, share = new_directions(Subspace.of(torch.eye(3)[:, :2]), torch.diag(torch.tensor([3.0, 1.0, 1.0])), 0.9)
    >>> V.T, share
    (tensor([[0., 0., 1.]]), 1.0)
    """
    energy = check_energy(energy)
    C64 = _matrix("C", C)
    if C64.shape != (S.n_in, S.n_in):
        raise ValueError(f"C must be ({S.n_in}, {S.n_in}) to match U, got {tuple(C64.shape)}")
    return _new(S, (C64 + C64.T) / 2, energy, tolerance=EPS32 * (S.n_in if energy == 1 else 1))


def new_gradient_directions(S: Subspace, G: Tensor, energy: float) -> tuple[Tensor, float]:
    """`new_directions` by the merged model's gradient G (out, in) (M8g), as `extend_basis_with_gradient` would."""
    energy = check_energy(energy)
    G64 = _matrix("G", G)
    if G64.shape[1] != S.n_in:
        raise ValueError(f"G has {G64.shape[1]} input dimensions but U has {S.n_in}")
    return _new(S, G64.T @ G64, energy, tolerance=(max(G64.shape) * EPS32) ** 2)


def _new(S: Subspace, C64: Tensor, energy: float, *, tolerance: float) -> tuple[Tensor, float]:
    if not S.by_complement:
        U, share = _extend(S.held, C64, energy, max_dim=None, tolerance=tolerance)
        return U[:, S.k :].contiguous(), share
    N = S.held.to(torch.float64)
    total = float(C64.diagonal().sum())
    left = N.T @ C64 @ N
    outside = float(left.diagonal().sum())
    none = torch.zeros((S.n_in, 0), dtype=torch.float32, device=N.device)
    if total <= 0:
        return none, 1.0
    if energy == 0 or N.shape[1] == 0:
        return none, _share(outside, total)
    eigenvalues, vectors = torch.linalg.eigh((left + left.T) / 2)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    # λ_1 of P C P and of (I − P) C (I − P), whichever is larger, is what `_extend` compares with.
    inside = project_out(project_out(C64, N).T, N)
    largest = max(float(eigenvalues[0]), float(torch.linalg.eigvalsh((inside + inside.T) / 2)[-1]))
    rank = int((eigenvalues > tolerance * largest).sum())
    m = smallest_rank(eigenvalues[:rank], energy, total=total, already=total - outside)
    V = append_directions(none, N @ vectors[:, :m])
    kept = float(eigenvalues[m:].sum())
    return V, _share(kept, total)


def _share(outside: float, total: float) -> float:
    return min(1.0, max(0.0, 1.0 - outside / total))
