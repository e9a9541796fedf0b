"""How much data is enough: end a statistics pass once twice the samples would hardly change what is taken from them.

The samples come in a seeded order whose every beginning holds the classes evenly (`stratified_order`). After n₀, 2 n₀, 4 n₀, … of
them what the pass is for is computed from the sums so far, and the result from half the samples (Ã, Ṽ) is judged beside the
present one (A, V) by the present sums:

- **the factor A** (M4), by the share of the first step's gain that Ã would miss,
  1 − Σ_l s_l² ‖G_l Ã_lᵀ‖² / Σ_l s_l² ‖G_l A_lᵀ‖². By Prop 3.1 a step of size η on B lowers the loss by η Σ_l s_l² ‖G_l A_lᵀ‖² to
  first order, and by Prop 3.2 no other A lowers it by more. Principal angles are no measure here: two directions of nearly the
  same singular value swap freely, and nothing is lost.
- **the protected basis** (M8, M8g), by how much of the energy that V explains Ṽ would leave open, in units of what is left open
  anyway, (ε(U, V) − ε(U, Ṽ)) / (1 − ε_f), the mean over layers: 0.1 means that the bound on later tasks' harm, which is
  proportional to 1 − ε_t, would on average have been a tenth higher. The worst layer, some three times that, is recorded.

The pass ends where that is below ``statistics_tolerance``, with the result of *all* samples seen by then. The error of such
estimates falls about as 1/n, so what half the samples miss beside all of them is about what these still miss beside endless data;
measured in ``benchmarks/enough.py``. It is an estimate and bounds nothing about samples that were not seen: a rare kind of
picture may be missed, and the record's ε_t and tr C are those of the samples used, as with ``feature_samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keeplora.math import (
    CovarianceSketch,
    Growth,
    Subspace,
    feature_growth,
    gradient_growth,
    residual_factor,
    row_shares,
    shares,
    sketched_growth,
)
from keeplora.tuner.linear_algebra import LinearAlgebra
from keeplora.tuner.targets import Target

START = 32
"""Samples of the first estimate, or one of every class where that is more."""
LEAST_OPEN = 1e-3
"""Smallest share that (ε(U, V) − ε(U, Ṽ)) is compared with, for ε_f = 1, which leaves nothing open."""

Matrix = Tensor | CovarianceSketch
Estimate = Mapping[str, Matrix]
"""Per target, what a pass has summed so far: G (any multiple of it, or rows with the same Gram matrix), C, or its sketch."""


@dataclass(frozen=True)
class Moved:
    """How far an estimate is from the one before: over all layers, and the layer where it is farthest."""

    change: float
    worst: str
    worst_change: float


Change = Callable[[Estimate], Moved | None]
"""Compares an estimate with the one before; None at the first."""


class Enough:
    """Decides after which sample a pass may end.

    Args:
        tolerance: below which change it may; 0: never. change: `FactorChange` or `BasisChange`.
    """

    def __init__(self, tolerance: float, change: Change) -> None:
        self.tolerance = tolerance
        self._change = change
        self.restart()

    def restart(self) -> None:
        """The pass is taken from the beginning again."""
        self.samples = 0
        self.of: int | None = None
        self.checked = 0
        """Samples of the last estimate."""
        self.found: Moved | None = None
        self._next: int | None = None

    def reached(self, batches: Any, n: int, estimate: Callable[[], Estimate]) -> bool:
        """Count a batch of ``n`` samples of ``batches``, and say whether that is enough.

        Args:
            batches: an `EndableBatches`, or what has its attributes; any other iterable counts to its end. estimate: the sums so
                far, asked for where a comparison is due.
        """
        if not getattr(batches, "open", True):  # what goes on after its end (class prompts) counts whole
            return False
        self.samples += n
        self.of = getattr(batches, "samples", None)
        due = self._next or max(START, getattr(batches, "classes", 1))
        if self.samples < due or self.samples == self.of:
            return False
        self._next, self.checked = 2 * self.samples, self.samples
        self.found = self._change(estimate())
        return self.found is not None and self.found.change < self.tolerance

    def report(self) -> dict[str, Any]:
        """JSON: samples used, out of how many (None: not known), and the last comparison, where one was made."""
        return {"samples": self.samples, "of": self.of} | (asdict(self.found) if self.found else {})


class FactorChange:
    """The gain of the first step that the A of the estimate before would miss at this one, over all layers.

    Args:
        subspace: per target, the protected subspace. algebra: where layers are decomposed.
    """

    def __init__(
        self, targets: Sequence[Target], subspace: Callable[[str], Subspace], algebra: LinearAlgebra | None = None
    ) -> None:
        self._targets = {t.name: t for t in targets}
        self._subspace, self._algebra = subspace, algebra or LinearAlgebra()
        self.A: dict[str, Tensor] = {}
        """What the last estimate gave."""

    def __call__(self, estimate: Estimate) -> Moved | None:
        def compare(name: str, device: torch.device) -> tuple[Tensor, float, float]:
            t, G = self._targets[name], estimate[name]
            assert isinstance(G, Tensor)
            G = G.detach().to(device).double()
            A = residual_factor(G, self._subspace(name).to(device), t.r)
            before = self.A.get(name)
            return A.cpu(), _gain(G, A, t.s), 0.0 if before is None else _gain(G, before.to(device), t.s)

        names = list(self._targets)
        found = self._algebra.over_layers(compare, names, lambda name: estimate[name].device)
        first = not self.A
        self.A = {name: A for name, (A, _, _) in zip(names, found, strict=True)}
        if first:
            return None
        own = [max(0.0, 1.0 - had / best) if best > 0 else 0.0 for _, best, had in found]
        worst = max(range(len(found)), key=own.__getitem__)
        best, had = sum(gain for _, gain, _ in found), sum(gain for _, _, gain in found)
        return Moved(max(0.0, 1.0 - had / best) if best > 0 else 0.0, names[worst], own[worst])


def _gain(G: Tensor, A: Tensor, s: float) -> float:
    return s * s * float((G @ A.double().T).square().sum())


class BasisChange:
    """What the basis of the estimate before would leave open beside this one's, mean over layers.

    Args:
        subspace: per target, U. energy: per target, ε_f. gradients: whether the estimate is of G (M8g) and not of C.
        algebra: where layers are decomposed.
    """

    def __init__(
        self, subspace: Callable[[str], Subspace], energy: Callable[[str], float], *, gradients: bool = False,
        algebra: LinearAlgebra | None = None,
    ) -> None:  # fmt: skip
        self._subspace, self._energy, self._gradients = subspace, energy, gradients
        self._algebra = algebra or LinearAlgebra()
        self._V: dict[str, Tensor] = {}

    def __call__(self, estimate: Estimate) -> Moved | None:
        def compare(name: str, device: torch.device) -> tuple[Tensor, float]:
            M = estimate[name].to(device)
            found = growth(self._subspace(name).to(device), M, self._energy(name), gradients=self._gradients)
            if (before := self._V.get(name)) is None:
                return found.V.cpu(), 0.0
            gap = float(found.new.sum() - explained(before.to(device), M, gradients=self._gradients).sum())
            return found.V.cpu(), max(0.0, gap) / max(1.0 - self._energy(name), LEAST_OPEN)

        names = list(estimate)
        found = self._algebra.over_layers(compare, names, lambda name: estimate[name].device)
        first = not self._V
        self._V = {name: V for name, (V, _) in zip(names, found, strict=True)}
        if first or not names:
            return None
        change = [gap for _, gap in found]
        worst = max(range(len(names)), key=change.__getitem__)
        return Moved(sum(change) / len(change), names[worst], change[worst])


def growth(S: Subspace, M: Matrix, energy: float, *, gradients: bool = False) -> Growth:
    """What joins U: M8 from C or from its sketch, or with ``gradients`` M8g from G."""
    if isinstance(M, CovarianceSketch):
        return sketched_growth(S, M, energy)
    return (gradient_growth if gradients else feature_growth)(S, M, energy)


def explained(V: Tensor, M: Matrix, *, gradients: bool = False) -> Tensor:
    """Share of the energy of M along each column of V, (m,) float64; of a sketch, at least that."""
    if isinstance(M, CovarianceSketch):
        return M.shares(V)
    return row_shares(V, M) if gradients else shares(V, M)
