"""Does one thing go with another? Spearman's rank correlation within groups, with a permutation test and a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keeplora.errors import KeepLoraError

LEAST = 4
"""Pairs below which a group says nothing: of three, every order is too likely."""
DRAWS = 9999


@dataclass(frozen=True)
class Association:
    """Rank correlation of two lists within groups.

    Attributes:
        rho: mean of the groups' Spearman correlations, weighted by their pairs; None where no group says anything.
        low, high: 95 % bootstrap interval (pairs drawn within their groups). p: two-sided permutation p (values shuffled
            within their groups). n: pairs that count. groups: groups that count.
    """

    rho: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    groups: int
    least: float | None = None

    @property
    def verdict(self) -> str:
        """In words: "goes with it", "goes against it", or "cannot be told"."""
        if self.low is None or self.high is None or self.p is None or self.p > 0.05 or self.low <= 0 <= self.high:
            return "cannot be told"
        return "goes with it" if self.low > 0 else "goes against it"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "verdict": self.verdict}


def spearman_within(groups: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> Association:
    """Spearman's ρ of x and y within each group, and what chance would do.

    Differences between groups (one run forgets more than another) do not count, only the order inside each. Groups of fewer
    than `LEAST` pairs, or whose x or y are all equal, are left out. Pairs that share a task are not independent, so with few
    tasks the interval is rather too narrow than too wide.

    Args:
        groups: (x, y) each. seed: of 9999 shuffles and as many bootstrap draws.

    >>> found = spearman_within([([1, 2, 3, 4, 5], [2, 4, 6, 8, 9]), ([1, 2], [5, 1])])
    >>> found.rho, found.n, found.groups, found.verdict
    (1.0, 5, 1, 'goes with it')
    """
    import numpy as np
    from scipy.stats import rankdata

    kept = []
    for x, y in groups:
        if len(x) != len(y):
            raise KeepLoraError(f"a correlation needs as many values on both sides, got {len(x)} and {len(y)}")
        # Rounded to a billionth of the largest: sums of equal terms in another order must tie.
        scaled = [
            np.round(np.asarray(v, dtype=float) / max(float(np.abs(v).max(initial=0.0)), 1e-300), 9) for v in (x, y)
        ]
        if len(x) >= LEAST and all(len(np.unique(v)) > 1 for v in scaled):
            kept.append(scaled)
    n = sum(len(x) for x, _ in kept)
    if not kept:
        return Association(None, None, None, None, 0, 0)

    def correlations(x: Any, y: Any) -> Any:
        """Of the rows of x and y, each (draws, pairs); 0 for a row whose values are all equal."""
        a, b = rankdata(x, axis=-1), rankdata(y, axis=-1)
        a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
        size = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        return np.where(size > 0, (a * b).sum(-1) / np.where(size > 0, size, 1.0), 0.0)

    random = np.random.default_rng(seed)
    rho, shuffled, drawn = 0.0, np.zeros(DRAWS), np.zeros(DRAWS)
    for x, y in kept:
        share = len(x) / n
        rho += share * float(correlations(x[None], y[None])[0])
        order = random.permuted(np.tile(np.arange(len(x)), (DRAWS, 1)), axis=1)
        shuffled += share * correlations(np.tile(x, (DRAWS, 1)), y[order])
        chosen = random.integers(0, len(x), (DRAWS, len(x)))
        drawn += share * correlations(x[chosen], y[chosen])
    p = float((np.sum(np.abs(shuffled) >= abs(rho) - 1e-12) + 1) / (DRAWS + 1))
    low, high = (float(v) for v in np.quantile(drawn, [0.025, 0.975]))
    return Association(round(rho, 12), low, high, p, n, len(kept), float(np.quantile(np.abs(shuffled), 0.95)))
