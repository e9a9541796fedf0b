"""Intervals of scores by the bootstrap: over samples, and over tasks and their samples (Efron & Tibshirani, 1993)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keeplora.errors import KeepLoraError

REPEATS = 2000
LEVEL = 0.95
CHUNK = 100
Scores = Mapping[str, Sequence[float]]
"""What each sample earns, 0 to 100, by set."""


class Spread(NamedTuple):
    """A mean over sets with its 95 % intervals.

    Attributes:
        low, high: over samples; the sets stay. low_tasks, high_tasks: over sets and their samples; None for a single set.
        n: samples. sets: how many.
    """

    mean: float
    low: float
    high: float
    low_tasks: float | None
    high_tasks: float | None
    n: int
    sets: int


class Resamples:
    """The same resamples for everything measured on the same sets, so that differences are paired.

    Args:
        sizes: samples per set. seed: of the resampling.

    >>> draws = Resamples({"a": 4, "b": 2}, repeats=200)
    >>> found = draws.spread({"a": [100, 0, 100, 100], "b": [0, 100]})
    >>> found.mean, found.low < found.mean < found.high, found.sets
    (62.5, True, 2)
    >>> draws.difference({"a": [1, 2, 3, 4], "b": [5, 6]}, {"a": [0, 1, 2, 3], "b": [4, 5]})[:3]   # 1 more, always
    (1.0, 1.0, 1.0)
    """

    def __init__(self, sizes: Mapping[str, int], repeats: int = REPEATS, seed: int = 0) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise KeepLoraError("an interval needs at least one sample of every set")
        self.sizes = dict(sizes)
        self._counts: dict[str, NDArray[np.uint8]] = {}
        for name, n in self.sizes.items():
            # Seeded by the set's name: another set beside it changes nothing here.
            key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")
            source, even = np.random.default_rng(key), np.full(n, 1 / n)
            # How often each sample is drawn; of more than 255 samples none is drawn 256 times.
            counts = np.empty((repeats, n), np.uint8)
            for rows in _chunks(counts):
                rows[:] = source.multinomial(n, even, size=len(rows))
            self._counts[name] = counts
        self._sets = np.random.default_rng(seed).integers(0, len(sizes), (repeats, len(sizes)))

    def means(self, scores: Scores) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """(mean over sets, (repeats,) of it over samples, (repeats,) over sets and samples)."""
        if {name: len(values) for name, values in scores.items()} != self.sizes:
            raise KeepLoraError("scores of other sets, or of other numbers of samples, cannot be paired")
        each = np.stack([self._over(name, np.asarray(scores[name], float)) for name in self.sizes], axis=1)
        mean = float(np.mean([np.mean(np.asarray(scores[name], float)) for name in self.sizes]))
        return mean, each.mean(axis=1), np.take_along_axis(each, self._sets, axis=1).mean(axis=1)

    def _over(self, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([(rows / len(values)) @ values for rows in _chunks(self._counts[name])])

    def spread(self, scores: Scores) -> Spread:
        """Mean and intervals of one model's scores."""
        return self._spread(*self.means(scores))

    def difference(self, scores: Scores, base: Scores) -> Spread:
        """Mean and intervals of ``scores`` less ``base``, sample by sample."""
        mine, theirs = self.means(scores), self.means(base)
        return self._spread(mine[0] - theirs[0], mine[1] - theirs[1], mine[2] - theirs[2])

    def _spread(self, mean: float, over: NDArray[np.float64], tasks: NDArray[np.float64]) -> Spread:
        low, high = ends(over)
        pair = ends(tasks) if len(self.sizes) > 1 else (None, None)
        return Spread(mean, low, high, *pair, sum(self.sizes.values()), len(self.sizes))


def _chunks(counts: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Views of its rows, few enough that they can be floats for a moment however many samples there are."""
    return [counts[i : i + CHUNK] for i in range(0, len(counts), CHUNK)]


def ends(draws: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """The two ends of a percentile interval.

    >>> [round(end, 6) for end in ends(np.arange(101.0))]
    [2.5, 97.5]
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
