"""How the protected subspace grows after a task: by its features (M8), or by the gradient that is left (M8g).

Everything happens in the coordinates of the residual space: with N (in, in − k) an orthonormal basis of what U leaves, the
eigenvectors of Ĉ = (I − P) C (I − P) are N times those of NᵀCN, a matrix of the residual's size. Nothing has to be made
orthogonal to U afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from keeplora.math.complement import ResidualSpace, Subspace
from keeplora.math.leak import spectral_norm
from keeplora.math.subspace import (
    EPS32,
    RELATIVE_SLACK,
    _matrix,
    check_energy,
    check_orthonormal,
    fix_signs,
    right_vectors,
    smallest_rank,
)


@dataclass(frozen=True)
class Growth:
    """What a task adds to U (in, k).

    Attributes:
        V: (in, m) float32, orthonormal and orthogonal to U, by falling energy. share: of tr C that [U, V] explains, in [0, 1].
        old: (k,) float64, share of tr C along each column of U; None where U is held by its complement. new: (m,), of V.
    """

    V: Tensor
    share: float
    old: Tensor | None
    new: Tensor

    def cpu(self) -> Growth:
        """The same on the CPU."""
        return Growth(self.V.cpu(), self.share, None if self.old is None else self.old.cpu(), self.new.cpu())


class Energy(Protocol):
    """A positive semi-definite C by what is asked of it."""

    total: float
    """tr C."""
    held: float
    """The part of tr C that is known by its directions: all of it but for a sketch."""

    def along(self, V: Tensor) -> Tensor:
        """vᵀ C v for each column of V (in, m) float64."""
        ...

    def eigen(self, space: ResidualSpace) -> tuple[Tensor, Tensor]:
        """Eigenvalues of NᵀCN, falling, and its eigenvectors (in − k, ·), orthonormal."""
        ...

    def largest(self) -> float:
        """λ_1(C)."""
        ...


class CovarianceEnergy:
    """C itself, (in, in) float64, symmetric."""

    def __init__(self, C: Tensor) -> None:
        self.C = C
        self.total = self.held = float(C.diagonal().sum())

    def along(self, V: Tensor) -> Tensor:
        return (V * (self.C @ V)).sum(0)

    def eigen(self, space: ResidualSpace) -> tuple[Tensor, Tensor]:
        left = space.coordinates(space.coordinates(self.C).T)
        values, Y = torch.linalg.eigh((left + left.T) / 2)
        return values.flip(0), Y.flip(1)

    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.C)[-1])


class RowsEnergy:
    """C = MᵀM of rows M (rows, in) float64: a gradient (M8g), or a covariance's sketch. C is not formed.

    Args:
        total: tr C where M holds less than all of it.
    """

    def __init__(self, M: Tensor, total: float | None = None) -> None:
        self.M = M
        self.held = float(M.square().sum())
        self.total = self.held if total is None else total

    def along(self, V: Tensor) -> Tensor:
        return (self.M @ V).square().sum(0)

    def eigen(self, space: ResidualSpace) -> tuple[Tensor, Tensor]:
        left = space.coordinates(self.M)
        if left.numel() == 0:
            return left.new_zeros(0), left.new_zeros((left.shape[1], 0))
        sigma, Y = right_vectors(left)  # orthonormal to 2e-7 where σ is not noise: what float32 rounds
        return sigma.square(), Y

    def largest(self) -> float:
        return spectral_norm(self.M) ** 2


def new_directions(S: Subspace, C: Tensor, energy: float) -> tuple[Tensor, float]:
    """What a task's features add to the protected subspace (M8).

    Args:
        C: (in, in), Σ x xᵀ over the layer's inputs; any positive scale, symmetric positive semi-definite. energy: ε_f in
            [0, 1], the share of tr C that [U, V] must explain.

    Returns:
        (V, ε_t): V (in, m) float32, orthonormal and orthogonal to U, and the share of tr C that [U, V] explains.

    >>> V, share = new_directions(Subspace.of(torch.eye(3)[:, :2]), torch.diag(torch.tensor([3.0, 1.0, 1.0])), 0.9)
    >>> V.T.abs(), share
    (tensor([[0., 0., 1.]]), 1.0)
    """
    found = feature_growth(S, C, energy)
    return found.V, found.share


def new_gradient_directions(S: Subspace, G: Tensor, energy: float) -> tuple[Tensor, float]:
    """`new_directions` by the merged model's gradient G (out, in) (M8g), as `extend_basis_with_gradient` would."""
    found = gradient_growth(S, G, energy)
    return found.V, found.share


def feature_growth(S: Subspace, C: Tensor, energy: float) -> Growth:
    """`new_directions`, with the shares of all directions."""
    energy = check_energy(energy)
    C64 = _matrix("C", C)
    if C64.shape != (S.n_in, S.n_in):
        raise ValueError(f"C must be ({S.n_in}, {S.n_in}) to match U, got {tuple(C64.shape)}")
    return grow(S, CovarianceEnergy((C64 + C64.T) / 2), energy, feature_tolerance(S.n_in, energy))


def gradient_growth(S: Subspace, G: Tensor, energy: float) -> Growth:
    """`new_gradient_directions`, with the shares of all directions."""
    energy = check_energy(energy)
    G64 = _matrix("G", G)
    if G64.shape[1] != S.n_in:
        raise ValueError(f"G has {G64.shape[1]} input dimensions but U has {S.n_in}")
    # The rank is that of G (σ_i > max(out, in) · eps(fp32) · σ_1, as in M1), and eigenvalues are squares.
    return grow(S, RowsEnergy(G64), energy, (max(G64.shape) * EPS32) ** 2)


def feature_tolerance(n_in: int, energy: float) -> float:
    """Eigenvalues up to this multiple of λ_1(C) are rounding noise.

    For ε = 1 that is M1's rule. For ε < 1, where the energy itself sets the end, eps(fp32) alone: a wide layer with one
    dominant direction would lose its whole tail otherwise.
    """
    return EPS32 * (n_in if energy == 1 else 1)


def grow(S: Subspace, source: Energy, energy: float, tolerance: float, *, max_dim: int | None = None) -> Growth:
    """The leading eigenvectors of Ĉ, the fewest with which [U, V] explains ``energy`` · tr C.

    Args:
        tolerance: eigenvalues up to this multiple of λ_1(C) are rounding noise. max_dim: the most columns of [U, V].
    """
    U, total = S.held.to(torch.float64), source.total
    V = torch.zeros((S.n_in, 0), dtype=torch.float32, device=U.device)
    if total <= 0:
        return Growth(V, 1.0, None if S.by_complement else U.new_zeros(S.k), U.new_zeros(0))
    inside = None if S.by_complement else source.along(U)
    already = 0.0 if inside is None else float(inside.sum())
    room = min(S.n_in, S.n_in if max_dim is None else max_dim) - S.k
    if inside is None or (energy > 0 and room > 0):
        space = ResidualSpace(S)
        values, Y = source.eigen(space)
        if inside is None:
            already = max(0.0, source.held - float(values.sum()))
        if energy > 0 and room > 0:
            m = _count(values[:room], energy, total, already, tolerance, source.largest)
            V = fix_signs(space.vectors(Y[:, :m])).to(torch.float32)
            check_orthonormal(V, None if S.by_complement else S.held)
    along = source.along(V.to(torch.float64))
    share = min(1.0, max(0.0, (already + float(along.sum())) / total))
    shares = along.clamp(min=0) / total
    return Growth(V, share, None if inside is None else inside.clamp(min=0) / total, shares)


def _count(
    values: Tensor, energy: float, total: float, already: float, tolerance: float, largest: Callable[[], float]
) -> int:
    """How many eigenvalues (falling) are taken: the fewest that reach the energy, and none that is noise."""
    if values.numel() == 0:
        return 0
    if energy < 1:
        # λ_1(C) ≤ λ_1(Ĉ) + tr(UᵀCU): where the energy is reached above that bound's noise, λ_1 itself need not be known.
        sure = values[: int((values > tolerance * (float(values[0]) + already)).sum())]
        m = smallest_rank(sure, energy, total=total, already=already)
        if already + float(sure[:m].sum()) >= energy * total * (1 - RELATIVE_SLACK):
            return m
    rank = int((values > tolerance * largest()).sum())
    return smallest_rank(values[:rank], energy, total=total, already=already)


def extend_basis(U: Tensor, C: Tensor, energy: float, *, max_dim: int | None = None) -> tuple[Tensor, float]:
    """Let a task's features join the protected subspace, held by its columns (M8).

    Args:
        U: (in, k), float32 orthonormal, the subspace so far (k may be 0 or in).
        C: (in, in), Σ x xᵀ over the layer's inputs; any positive scale, symmetric positive semi-definite.
        energy: ε_f in [0, 1], the share of tr C that [U, new] must explain.
        max_dim: never grow beyond this many columns (a capacity budget); None means ``in``.

    Returns:
        (U', ε_t): U' of shape (in, k') float32 whose first k columns are U bit for bit, and the share actually
        explained, which is below ``energy`` where capacity or the numerical rank stopped it.

    Directions are the leading eigenvectors of (I − P) C (I − P), the fewest that reach the energy, none beyond C's
    numerical rank: rounding noise is not protected (`feature_tolerance`).

    >>> U, share = extend_basis(torch.zeros(2, 0), torch.diag(torch.tensor([3.0, 1.0])), 0.7)
    >>> U.shape, round(share, 2)
    (torch.Size([2, 1]), 0.75)
    """
    energy = check_energy(energy)
    C64, n = _matrix("C", C), U.shape[0]
    if C64.shape != (n, n):
        raise ValueError(f"C must be ({n}, {n}) to match U, got {tuple(C64.shape)}")
    S = Subspace(U.to(torch.float32))
    found = grow(S, CovarianceEnergy((C64 + C64.T) / 2), energy, feature_tolerance(n, energy), max_dim=max_dim)
    return torch.cat([S.held, found.V], dim=1), found.share


def extend_basis_with_gradient(U: Tensor, G: Tensor, energy: float) -> tuple[Tensor, float]:
    """Gradient memory (M8g), the reference's LLM code: as `extend_basis` with C = GᵀG of the merged model's gradient.

    The leading right singular vectors of G (I − P) are the leading eigenvectors of (I − P) GᵀG (I − P), and tr C is
    ‖G‖_F², so one rule serves both memories. The numerical rank is that of G itself.
    """
    S = Subspace(U.to(torch.float32))
    found = gradient_growth(S, G, energy)
    return torch.cat([S.held, found.V], dim=1), found.share
