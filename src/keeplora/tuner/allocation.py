"""Ranks and protected directions shared out over a tower's layers, at what r, ε_w and ε_f everywhere would cost.

Beyond the paper (docs/method.md). Layers compete within their tower: the towers' settings are the user's choice, and their
gradients and features have no common scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from keeplora.math import Subspace, allot
from keeplora.math.subspace import EPS32, smallest_rank
from keeplora.tuner.linear_algebra import LinearAlgebra
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

MOST_RANK = 4
"""Times r: the highest rank of a layer. The lowest is 1."""
BEYOND = 10.0
"""A layer may leave open this many times less than 1 − ε_f: there its candidates end, which bounds what is held of them."""


def by_tower(targets: Sequence[Target]) -> list[list[Target]]:
    """The targets of each tower."""
    towers: dict[str, list[Target]] = {}
    for t in targets:
        towers.setdefault(t.tower, []).append(t)
    return list(towers.values())


def most_rank(target: Target) -> int:
    """The highest rank that a target may be given."""
    return MOST_RANK * target.r


def worth(kind: str, target: Target, G: Tensor, A: Tensor, S: Subspace) -> Tensor:
    """What each row of A is worth, (r',) float64, falling.

    Args:
        kind: "gain", s² ‖Ĝ aᵢ‖²: a step of size η on B lowers the loss by η times their sum, to first order (Prop 3.1). "share",
            ‖Ĝ aᵢ‖² / ‖Ĝ‖²: of the layer's residual gradient. G: (out, in), or its sketch. A: (r', in) from it (M4).
    """
    G64 = G.to(torch.float64)
    found = (G64 @ A.to(torch.float64).T).square().sum(dim=0)
    if kind == "gain":
        return found * target.s**2
    return found / S.project_out(G64).square().sum().clamp(min=1e-300)


def allotted(targets: Sequence[Target], A: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leading rows of each A, 1 to 4 r of them: as many per tower as train the parameters that r everywhere would.

    Args:
        A: (m, in) per target, up to `most_rank` rows. values: (m,), their `worth`.
    """
    out = {}
    for tower in by_tower(targets):
        budget = sum(min(t.r, t.n_in, t.n_out) * t.n_out for t in tower)
        counts = allot([values[t.name] for t in tower], [t.n_out for t in tower], budget, least=1)
        out |= {t.name: A[t.name][:n].contiguous() for t, n in zip(tower, counts, strict=True)}
    return out


def candidate_energy(energy: float) -> float:
    """The ε_f up to which a layer's directions compete.

    >>> round(candidate_energy(0.99), 6), candidate_energy(1.0)
    (0.999, 1.0)
    """
    return 1.0 - (1.0 - energy) / BEYOND


def pooled_counts(
    targets: Sequence[Target], energy: Mapping[str, float], share: Mapping[str, float], new: Mapping[str, Tensor]
) -> dict[str, int]:
    """How many of its new directions each layer keeps (M8): per tower as many bytes as ε_f in every layer would take.

    Args:
        energy: ε_f. share: of tr C that U and all the candidates explain. new: (m,), share along each candidate, falling.
    """
    out = {}
    for tower in by_tower(targets):
        budget = 0
        for t in tower:
            along = new[t.name].to(torch.float64)
            already = share[t.name] - float(along.sum())
            budget += 4 * t.n_in * smallest_rank(along, energy[t.name], total=1.0, already=already)
        counts = allot([new[t.name] for t in tower], [4 * t.n_in for t in tower], budget)
        out |= {t.name: n for t, n in zip(tower, counts, strict=True)}
    return out


def pooled_weight_energies(
    targets: Sequence[Target], store: WeightStore, energy: Mapping[str, float], algebra: LinearAlgebra
) -> dict[str, float]:
    """ε_w of each layer, with which a tower's U₀ (M1) together takes the bytes that ``energy`` in every layer would."""
    spectra = store.per_weight(
        "the spectra of the weights", list(energy), lambda _, W0, device: _energies(W0.to(device)).cpu(), algebra
    )
    out = {}
    for tower in by_tower(targets):
        values = [spectra[t.name] for t in tower]
        costs = [4 * t.n_in for t in tower]
        wanted = [smallest_rank(v, energy[t.name], total=float(v.sum())) for t, v in zip(tower, values, strict=True)]
        budget = sum(p * cost for p, cost in zip(wanted, costs, strict=True))
        counts = allot([v / v.sum().clamp(min=1e-300) for v in values], costs, budget)
        for t, v, p in zip(tower, values, counts, strict=True):
            out[t.name] = 1.0 if p == len(v) else float(v[:p].sum() / v.sum())
    return out


def _energies(W0: Tensor) -> Tensor:
    """σᵢ² of a weight down to its numerical rank, falling, float64."""
    sigma = torch.linalg.svdvals(W0.detach().to(torch.float64))
    return sigma[sigma > max(W0.shape) * EPS32 * sigma[0]].square()
