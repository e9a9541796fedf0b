"""A weight rebuilt from part of its singular components: what `keeplora analyze intra` puts into the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math.subspace import right_vectors, smallest_rank

MEASURES = ("energy", "sum")
"""What a share is of: Σσ² (M1's), or Σσ."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values and right singular vectors of a weight W (out, in).

    Attributes:
        sigma: (n,) float64, falling, n = min(out, in). V: (in, n) float32.

    W V_k V_kᵀ is the best approximation of W of rank k (Eckart & Young, 1936), so the left vectors are not needed.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> S = Spectrum.of(W)
    >>> S.rank_for(0.9), S.rank_for(0.5, "sum"), round(S.energy(2), 3)   # 13/14, 3/6
    (2, 1, 0.929)
    >>> S.leading(W, 1).diagonal().tolist(), S.trailing(W, 5 / 14)[1].diagonal().tolist()
    ([3.0, 0.0, 0.0], [0.0, 2.0, 1.0])
    """

    sigma: Tensor
    V: Tensor

    @classmethod
    def of(cls, W: Tensor) -> Spectrum:
        """The spectrum of a weight of any float dtype, on the CPU."""
        sigma, V = right_vectors(W.detach().cpu().to(torch.float64))
        # Of a wide matrix the columns are Wᵀ L / σ, orthonormal only as far as σ_i is not small beside σ_1.
        if W.shape[0] < W.shape[1]:
            V = torch.linalg.qr(V).Q
        return cls(sigma, V.to(torch.float32))

    def __len__(self) -> int:
        return self.sigma.numel()

    def rank_for(self, share: float, by: str = "energy") -> int:
        """The smallest k whose leading components hold ``share`` of Σσ² ("energy") or Σσ ("sum"); 0 for 0, all for 1.

        Raises:
            ValueError: a share outside [0, 1], or another measure.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a share of the spectrum lies between 0 and 1, got {share!r}")
        if by not in MEASURES:
            raise ValueError(f"unknown measure {by!r}: use one of {', '.join(MEASURES)}")
        parts = self.sigma.square() if by == "energy" else self.sigma
        return smallest_rank(parts, share, total=float(parts.sum()))

    def energy(self, k: int) -> float:
        """Share of Σσ² in the leading ``k`` components, 0 to 1; 1 for W = 0."""
        squares = self.sigma.square()
        total = float(squares.sum())
        return float(squares[:k].sum()) / total if total > 0 else 1.0

    def leading(self, W: Tensor, k: int) -> Tensor:
        """W from its leading ``k`` components, (out, in) in W's dtype; W itself, bit for bit, where that is all of them."""
        if k >= len(self):
            return W.detach().clone()
        V = self.V[:, :k].to(W.device)
        return ((W.detach().to(torch.float32) @ V) @ V.T).to(W.dtype)

    def trailing(self, W: Tensor, energy: float) -> tuple[int, Tensor]:
        """(How many components are left, W from its trailing components that hold exactly ``energy`` of Σσ²).

        The leading ones go until no more than ``energy`` is left, and the last of those that go stays in part, scaled, so that
        exactly that much is: beside `leading` at the same energy only the end of the spectrum differs. W itself for 1, 0 for 0.
        """
        if energy >= 1.0:
            return len(self), W.detach().clone()
        k = max(1, self.rank_for(1.0 - energy))
        if energy <= 0.0:
            return 0, torch.zeros_like(W)
        gone = torch.ones(k)
        own = self.energy(k) - self.energy(k - 1)
        gone[-1] = 1.0 - max(0.0, (self.energy(k) - (1.0 - energy)) / own) ** 0.5
        V = self.V[:, :k].to(W.device)
        W32 = W.detach().to(torch.float32)
        return len(self) - k + int(gone[-1] < 1), (W32 - ((W32 @ V) * gone.to(W.device)) @ V.T).to(W.dtype)


def captured(sigma: Tensor, ranks: tuple[int, ...] | list[int]) -> list[float]:
    """Share of Σσ² that the leading r directions hold, for each r: what a LoRA of that rank can take of a gradient (M4).

    >>> captured(torch.tensor([2.0, 1.0, 1.0]), [1, 2, 8])
    [0.6666666666666666, 0.8333333333333334, 1.0]
    """
    squares = sigma.to(torch.float64).square()
    total = float(squares.sum())
    return [min(1.0, float(squares[:r].sum()) / total) if total > 0 else 1.0 for r in ranks]
