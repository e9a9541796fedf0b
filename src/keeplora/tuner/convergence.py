"""How much data is enough: end a statistics pass once twice the samples would hardly change what is taken from them.

The samples come in a seeded order whose every beginning holds the classes evenly (`stratified_order`). After n₀, 2 n₀, 4 n₀, … of
them what the pass is for is computed from the sums so far, and the last result is judged by the present sums:

- **the factor A** (M4), by the share of the first step's gain that the earlier A would miss,
  1 − Σ_l s_l² ‖G_l Ãₗᵀ‖² / Σ_l s_l² ‖G_l A_lᵀ‖², Ã from half the samples. By Prop 3.1 a step of size η on B lowers the loss by
  η Σ_l s_l² ‖G_l A_lᵀ‖² to first order, and by Prop 3.2 no other A lowers it by more. Principal angles are no measure here:
  two directions of nearly the same singular value swap freely, and nothing is lost.
- **the protected basis** (M8, M8g), by how much of the energy that the present basis explains the earlier one would leave open, in
  units of what is left open anyway, (ε(U, V) − ε(U, Ṽ)) / (1 − ε_f), the worst layer: 0.1 means that at no layer the bound on
  later tasks' harm, which is proportional to 1 − ε_t, would have been more than about a tenth higher.

The pass ends where that is below ``statistics_tolerance``; the result is the one of the *larger* number of samples. What it says is
how far the halves of what was seen agree. It bounds nothing about samples that were not seen: the record's ε_t and tr C are those
of the samples used, as with ``feature_samples``, and a class of rare looks may be missed. ``benchmarks/enough.py`` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from keeplora.math import CovarianceSketch, Subspace, new_directions, new_gradient_directions, new_sketched_directions
from keeplora.math import residual_factor, shares
from keeplora.tuner.layerwise import over_layers
from keeplora.tuner.targets import Target

START = 32
"""Samples of the first estimate, or one of every class where that is more."""
LEAST_OPEN = 1e-3
"""Smallest share that (ε(U, V) − ε(U, Ṽ)) is compared with, for ε_f = 1, which leaves nothing open."""

Matrix = Tensor | CovarianceSketch
Estimate = Mapping[str, Matrix]
"""Per target, what a pass has summed so far: G (any multiple of it, or rows with the same Gram matrix), C, or its sketch."""
Change = Callable[[Estimate], tuple[float, str] | None]
"""Given an estimate, how far it is from the one before, and the target where that is worst; None at the first."""


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
        self.found: tuple[float, str] | None = None
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
        if self._next is None:
            self._next = max(START, getattr(batches, "classes", 1))
        if self.samples < self._next or self.samples == self.of:
            return False
        self._next, self.checked = 2 * self.samples, self.samples
        self.found = self._change(estimate())
        return self.found is not None and self.found[0] < self.tolerance

    def report(self) -> dict[str, Any]:
        """JSON: samples used, out of how many (None: not known), and the last change with its worst target (None: never taken)."""
        change, worst = self.found or (None, None)
        return {"samples": self.samples, "of": self.of, "change": change, "worst": worst}


class FactorChange:
    """The gain of the first step that the A of the estimate before would miss at this one, over all layers.

    Args:
        subspace: per target, the protected subspace.
    """

    def __init__(self, targets: Sequence[Target], subspace: Callable[[str], Subspace]) -> None:
        self._targets, self._subspace = targets, subspace
        self._A: dict[str, Tensor] = {}

    def __call__(self, estimate: Estimate) -> tuple[float, str] | None:
        def compare(t: Target) -> tuple[Tensor, float, float]:
            G = estimate[t.name]
            assert isinstance(G, Tensor)
            G = G.detach().cpu().double()
            A = residual_factor(G, self._subspace(t.name), t.r)
            before = self._A.get(t.name)
            return A, _gain(G, A, t.s), 0.0 if before is None else _gain(G, before, t.s)

        found = over_layers(compare, self._targets)
        first = not self._A
        self._A = {t.name: A for t, (A, _, _) in zip(self._targets, found, strict=True)}
        if first:
            return None
        missed = [best - had for _, best, had in found]
        total = sum(best for _, best, _ in found)
        worst = max(range(len(found)), key=missed.__getitem__)
        return (max(0.0, sum(missed)) / total if total > 0 else 0.0), self._targets[worst].name


def _gain(G: Tensor, A: Tensor, s: float) -> float:
    return s * s * float((G @ A.double().T).square().sum())


class BasisChange:
    """What the basis of the estimate before would leave open beside this one's, at the worst layer.

    Args:
        subspace: per target, U. energy: per target, ε_f. gradients: whether the estimate is of G (M8g) and not of C.
    """

    def __init__(
        self, subspace: Callable[[str], Subspace], energy: Callable[[str], float], *, gradients: bool = False
    ) -> None:
        self._subspace, self._energy, self._gradients = subspace, energy, gradients
        self._V: dict[str, Tensor] = {}

    def __call__(self, estimate: Estimate) -> tuple[float, str] | None:
        def compare(name: str) -> tuple[Tensor, float]:
            M = estimate[name].cpu()
            V, _ = directions(self._subspace(name), M, self._energy(name), gradients=self._gradients)
            if (before := self._V.get(name)) is None:
                return V, 0.0
            gap = float(explained(V, M, gradients=self._gradients).sum() - explained(before, M, gradients=self._gradients).sum())
            return V, max(0.0, gap) / max(1.0 - self._energy(name), LEAST_OPEN)

        names = list(estimate)
        found = over_layers(compare, names)
        first = not self._V
        self._V = {name: V for name, (V, _) in zip(names, found, strict=True)}
        if first or not names:
            return None
        change = [gap for _, gap in found]
        worst = max(range(len(names)), key=change.__getitem__)
        return change[worst], names[worst]


def directions(S: Subspace, M: Matrix, energy: float, *, gradients: bool = False) -> tuple[Tensor, float]:
    """What joins U, and the share then explained: M8 from C or from its sketch, or with ``gradients`` M8g from G."""
    if isinstance(M, CovarianceSketch):
        return new_sketched_directions(S, M, energy)
    return (new_gradient_directions if gradients else new_directions)(S, M, energy)


def explained(V: Tensor, M: Matrix, *, gradients: bool = False) -> Tensor:
    """Share of the energy of M along each column of V, (m,) float64; of a sketch, at least that."""
    if isinstance(M, CovarianceSketch):
        return M.shares(V)
    return shares(V, M.double().T @ M.double() if gradients else M)
