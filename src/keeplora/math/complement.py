"""A subspace of a layer's inputs held by the smaller of two bases: U itself, or N of its orthogonal complement.

Of span(U) ⊂ R^in the method needs only projections. With [U, N] orthonormal and complete, P = U Uᵀ = I − N Nᵀ, so where U
passes half the width N says the same in fewer numbers (DualGPM, Liang & Li, arXiv 2310.06652), and what is left of G and C
is a matrix of N's size: Ĝ = (G N) Nᵀ (M3), Ĉ = N (Nᵀ C N) Nᵀ (M8). Where U is what is held, N is there as the Householder
reflectors of U's QR and is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math.subspace import fix_signs, orthonormality_error, project_out

ORTHONORMAL = 1e-5
"""max |UᵀU − I| that a basis may have (METHOD, point 7)."""


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


class ResidualSpace:
    """Coordinates in what U leaves: N (in, in − k), orthonormal in float64, orthogonal to U's columns to rounding.

    Raises:
        ArithmeticError: U's columns are not orthonormal.

    >>> space = ResidualSpace(Subspace(torch.eye(3)[:, :1]))
    >>> space.coordinates(torch.tensor([[1.0, 2.0, 3.0]]).double()).abs()
    tensor([[2., 3.]], dtype=torch.float64)
    """

    def __init__(self, S: Subspace) -> None:
        self.k = S.k
        self._N: Tensor | None = None
        self._reflectors: tuple[Tensor, Tensor] | None = None
        held = S.held.detach().to(torch.float64)
        if S.by_complement:
            # float32 rounded it, and what is taken from it is to be orthonormal beyond that. R is near ± I: N hardly turns.
            self._N = torch.linalg.qr(held).Q if held.numel() else held
        elif S.k:
            R, tau = torch.geqrf(held)
            error = float((R[: S.k].triu().abs() - torch.eye(S.k, dtype=R.dtype, device=R.device)).abs().max())
            if error > ORTHONORMAL:
                raise ArithmeticError(f"the basis is not orthonormal: its QR's R is {error:.2e} from the identity")
            self._reflectors = R, tau

    def coordinates(self, X: Tensor) -> Tensor:
        """X N (rows, in − k) of X (rows, in) float64."""
        if self._N is not None:
            return X @ self._N
        if self._reflectors is None:
            return X
        return torch.ormqr(*self._reflectors, X, left=False)[:, self.k :]

    def vectors(self, Y: Tensor) -> Tensor:
        """N Y (in, m) of Y (in − k, m) float64."""
        if self._N is not None:
            return self._N @ Y
        if self._reflectors is None:
            return Y
        if Y.shape[1] == 0:
            return Y.new_zeros((self.k + Y.shape[0], 0))
        return torch.ormqr(*self._reflectors, torch.cat([Y.new_zeros((self.k, Y.shape[1])), Y]))


def shares(V: Tensor, C: Tensor) -> Tensor:
    """Share of tr C along each column of V: vᵀ C v / tr C, (m,) float64; zeros where C = 0.

    Over the orthonormal columns of a basis they add up to `explained_share`.
    """
    C64, V64 = C.detach().to(torch.float64), V.detach().to(torch.float64)
    total = float(C64.diagonal().sum())
    if total <= 0:
        return V64.new_zeros(V64.shape[1])
    return ((V64 * (C64 @ V64)).sum(0) / total).clamp(min=0)


def row_shares(V: Tensor, M: Tensor) -> Tensor:
    """`shares` of C = MᵀM, M (rows, in), which is not formed: ‖M v‖² / ‖M‖_F².

    >>> row_shares(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    M64, V64 = M.detach().to(torch.float64), V.detach().to(torch.float64)
    total = float(M64.square().sum())
    return (M64 @ V64).square().sum(0) / total if total > 0 else V64.new_zeros(V64.shape[1])
