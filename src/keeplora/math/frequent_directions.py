"""A covariance in few rows: frequent directions, with an error bound that is known afterwards.

C = Σ x xᵀ of a layer that reads ``in`` numbers takes in² of them; the sketch B takes ℓ × in, and BᵀB stands for C. Liberty
(KDD 2013); Ghashami, Liberty, Phillips & Woodruff (SIAM J. Comput. 2016, arXiv 1501.01711). Rows are collected until the buffer
is full; then its spectrum is cut to ℓ directions and δ = σ²_{ℓ+1} is taken off. Where Liberty takes δ off all of the ℓ, here it
is taken off the last fifth of them alone (α-FD with α = 0.2: Desai, Ghashami & Phillips, IEEE TKDE 2016, arXiv 1501.06561): the
leading directions keep their energy, which matters since what they explain is reported, and the bound stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math.complement import Subspace
from keeplora.math.growth import Growth, RowsEnergy, feature_tolerance, grow
from keeplora.math.subspace import check_energy, right_vectors

ALPHA = 0.2
"""Share of the ℓ directions that each cut takes δ off."""


@dataclass(frozen=True)
class CovarianceSketch:
    """BᵀB in place of C = Σ x xᵀ, with 0 ≼ C − BᵀB ≼ shed · I.

    Attributes:
        B: (≤ ℓ, in) float64. trace: tr C, exact. shed: bound on ‖C − BᵀB‖₂, the sum of all δ; at most tr C / (α ℓ).
    """

    B: Tensor
    trace: float
    shed: float

    @property
    def device(self) -> torch.device:
        """Where B lies."""
        return self.B.device

    def to(self, device: torch.device | str) -> CovarianceSketch:
        """The same on another device."""
        return CovarianceSketch(self.B.to(device), self.trace, self.shed)

    def shares(self, V: Tensor) -> Tensor:
        """Share of tr C along each column of V, at least: ‖B v‖² / tr C, (m,) float64. The truth is at most shed / tr C above."""
        if self.trace <= 0:
            return torch.zeros(V.shape[1], dtype=torch.float64, device=V.device)
        return (self.B.to(torch.float64) @ V.detach().to(torch.float64)).square().sum(0) / self.trace


class FrequentDirections:
    """Takes rows, holds at most 2ℓ of them, and gives a `CovarianceSketch` at any time.

    Args:
        rank: ℓ ≥ 1. n_in: width of a row. device: where the buffer lies.

    >>> fd = FrequentDirections(2, 3)
    >>> for x in torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]):
    ...     fd.add(x[None])
    >>> sketch = fd.sketch()
    >>> sketch.trace, round(sketch.shed, 3), round(24 * float(sketch.shares(torch.eye(3)[:, :1])), 3)   # axis 1 has 19
    (24.0, 1.0, 19.0)
    """

    def __init__(self, rank: int, n_in: int, device: torch.device | str = "cpu") -> None:
        if rank < 1:
            raise ValueError(f"the rank of a sketch must be at least 1, got {rank}")
        self.rank = rank
        self._buffer = torch.zeros((2 * rank, n_in), dtype=torch.float64, device=device)
        self._used = 0
        self._shed = 0.0
        self._trace = 0.0

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def to(self, device: torch.device | str) -> None:
        """Move the buffer."""
        self._buffer = self._buffer.to(device)

    def add(self, rows: Tensor) -> None:
        """Take rows (n, in): C grows by rowsᵀ rows."""
        rows = rows.detach().to(self._buffer.device, torch.float64)
        self._trace += float(rows.square().sum())
        while len(rows):
            if self._used == len(self._buffer):
                self._cut()
            n = min(len(rows), len(self._buffer) - self._used)
            self._buffer[self._used : self._used + n] = rows[:n]
            self._used += n
            rows = rows[n:]

    def merge(self, other: FrequentDirections) -> None:
        """Add what ``other`` took (another shard of the data): bounds add up."""
        trace, shed = self._trace + other._trace, other._shed
        self.add(other._buffer[: other._used])
        self._trace, self._shed = trace, self._shed + shed

    def sketch(self) -> CovarianceSketch:
        """What stands for C now; cut to ℓ rows."""
        if self._used > self.rank:
            self._cut()
        return CovarianceSketch(self._buffer[: self._used].clone(), self._trace, self._shed)

    def _cut(self) -> None:
        sigma, V = right_vectors(self._buffer[: self._used])
        squares = sigma.square()
        if len(squares) > self.rank:
            delta = float(squares[self.rank])
            first = self.rank - max(1, int(ALPHA * self.rank))
            squares = squares[: self.rank].clone()
            squares[first:] = (squares[first:] - delta).clamp(min=0)
            self._shed += delta
        m = min(self.rank, len(squares))
        self._buffer.zero_()
        self._buffer[:m] = squares[:m].sqrt()[:, None] * V[:, :m].T
        self._used = m


def new_sketched_directions(S: Subspace, sketch: CovarianceSketch, energy: float) -> tuple[Tensor, float]:
    """`new_directions` from a sketch: no (in, in) matrix is made, and the share is a true lower bound.

    Args:
        energy: ε_f in [0, 1], of the *exact* tr C. Where the sketch has shed too much to reach it, all that it holds is taken.

    Returns:
        (V, ε_t): ε_t ≤ the share of tr C that [U, V] explains, since BᵀB ≼ C.

    >>> rows = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    >>> sketch = CovarianceSketch(rows, trace=8.0, shed=1.0)
    >>> V, share = new_sketched_directions(Subspace.of(torch.eye(3)[:, :1]), sketch, 0.6)
    >>> V.shape, share
    (torch.Size([3, 1]), 0.625)
    """
    found = sketched_growth(S, sketch, energy)
    return found.V, found.share


def sketched_growth(S: Subspace, sketch: CovarianceSketch, energy: float) -> Growth:
    """`new_sketched_directions`, with the shares of all directions, each at most the true one."""
    energy = check_energy(energy)
    B = sketch.B.detach().to(torch.float64)
    if B.shape[1] != S.n_in:
        raise ValueError(f"the sketch has {B.shape[1]} input dimensions but U has {S.n_in}")
    return grow(S, RowsEnergy(B, sketch.trace), energy, feature_tolerance(S.n_in, energy))
