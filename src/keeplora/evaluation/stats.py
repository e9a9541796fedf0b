"""Intervals and paired tests for a handful of seeds: what stands behind every "mean ± half" and every p value.

Nothing here knows of methods or tasks; scipy does the distributions and is imported where it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypedDict

from keeplora.errors import KeepLoraError


class Interval(TypedDict):
    """A mean with its t interval; ``sd``, ``low`` and ``high`` are None for a single value, which has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int
    sd: float | None


class SignedRank(NamedTuple):
    """Wilcoxon's test: ``p``, the pairs that differ (``n``), and the smallest p that so many pairs can ever give."""

    p: float
    n: int
    smallest: float


class Ranking(NamedTuple):
    """Friedman's test over blocks: mean rank of each method (1 is best), χ² and its p, Nemenyi's critical difference."""

    ranks: list[float]
    chi2: float
    p: float
    critical_difference: float
    blocks: int


def student_t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with ``df`` > 0 degrees of freedom.

    >>> round(student_t_cdf(1.0, 1), 12)  # Cauchy: 1/2 + atan(1)/pi
    0.75
    """
    if not df > 0:
        raise KeepLoraError(f"degrees of freedom must be above 0, got {df}")
    from scipy.special import stdtr

    return float(stdtr(df, t))


def student_t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1.

    >>> round(student_t_quantile(0.975, 4), 3)  # the printed table's value
    2.776
    """
    if not 0.0 < p < 1.0:
        raise KeepLoraError(f"a quantile needs a probability between 0 and 1, got {p}")
    if not df > 0:
        raise KeepLoraError(f"degrees of freedom must be above 0, got {df}")
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of ``values`` and its two-sided t interval: mean ± t(df = n - 1) · sd / sqrt(n).

    >>> found = mean_interval([1.0, 2.0, 3.0])
    >>> round(found["low"], 3), round(found["high"], 3)
    (-0.484, 4.484)
    """
    if not 0.0 < confidence < 1.0:
        raise KeepLoraError(f"confidence must lie between 0 and 1, got {confidence}; use 0.95 for 95 %")
    if not values:
        raise KeepLoraError("an interval needs at least one value, got none")
    for i, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise KeepLoraError(
                f"value {i} is {value}; an interval needs finite numbers: leave the run out or finish it"
            )
    n, mean = len(values), fmean(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1, "sd": None}
    sd = stdev(values)
    half = student_t_quantile(0.5 + confidence / 2.0, n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n, "sd": sd}


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b):
        raise KeepLoraError(f"a paired difference needs as many values on both sides, got {len(a)} and {len(b)}")
    for name, values in (("first", a), ("second", b)):
        for i, value in enumerate(values):
            if value is None or not math.isfinite(value):
                raise KeepLoraError(f"value {i} of the {name} side is {value}; drop the pair or finish the run")
    return [x - y for x, y in zip(a, b, strict=True)]


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """`mean_interval` of a[i] - b[i]: a and b are paired, for example two methods under the same seeds.

    >>> paired_difference([71.0, 72.0], [60.0, 63.0])["mean"]
    10.0
    """
    return mean_interval(_differences(a, b), confidence)


def paired_t_test(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None for fewer than two pairs.

    Differences that are all equal leave no spread to judge them by: p is None, or 1 where they are 0. (Methods that ignore the
    seed give one number several times over, which is not several.)

    >>> round(paired_t_test([5.0, 6.0, 4.0], [0.0, 0.0, 0.0]), 4)  # t = 5 / (1 / sqrt 3), 2 degrees of freedom
    0.0131
    """
    differences = _differences(a, b)
    if len(differences) < 2:
        return None
    mean, sd = fmean(differences), stdev(differences)
    # Equal differences come out of floating point with an sd of rounding's size, never quite 0.
    if sd <= 1e-12 * max(1.0, *(abs(d) for d in differences)):
        return 1.0 if abs(mean) <= 1e-12 else None
    return 2.0 * student_t_cdf(-abs(mean) / (sd / math.sqrt(len(differences))), len(differences) - 1)


_MOST_ENUMERATED = 13  # 2^13 sign patterns


def wilcoxon_signed_rank(a: Sequence[float], b: Sequence[float]) -> SignedRank | None:
    """Wilcoxon's two-sided signed-rank test of paired values; None without pairs.

    Pairs without a difference are dropped (Wilcoxon's own rule). Exact: from the null distribution of the ranks' sum, or
    by every pattern of signs where differences tie; with ties among more than 13 pairs the normal approximation.

    >>> wilcoxon_signed_rank([5.0, 6.0, 4.0], [0.0, 0.0, 0.0])  # all of one sign: 2 of the 8 patterns are as extreme
    SignedRank(p=0.25, n=3, smallest=0.25)
    """
    # Rounded to a billionth: accuracies are shares of counts, and equal ones must tie.
    differences = [d for value in _differences(a, b) if (d := round(value, 9)) != 0.0]
    n = len(differences)
    if not len(a):
        return None
    if n == 0:
        return SignedRank(1.0, 0, 1.0)
    smallest = 2.0 ** (1 - n)
    from scipy.stats import PermutationMethod, wilcoxon

    method: Any = "exact"
    if len({abs(d) for d in differences}) < n:  # ties: scipy's exact distribution does not know them
        method = PermutationMethod(n_resamples=10**9) if n <= _MOST_ENUMERATED else "asymptotic"
    result: Any = wilcoxon(differences, method=method)
    return SignedRank(min(1.0, float(result.pvalue)), n, min(1.0, smallest))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of one family of p values; None (no test was made) stays None and is not counted.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for step, (p, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - step) * p))
        adjusted[i] = running
    return adjusted


def friedman_nemenyi(
    blocks: Sequence[Sequence[float]], *, higher_is_better: bool = True, confidence: float = 0.95
) -> Ranking:
    """Friedman's test of ``blocks`` [N][k methods], and Nemenyi's critical difference of mean ranks (Demšar, 2006).

    CD = q · sqrt(k (k + 1) / 6N), q being the studentised range's quantile over sqrt 2. Equal values share their ranks.
    Needs k >= 3 and N >= 2; χ² is an approximation that is rough below about ten blocks.

    >>> found = friedman_nemenyi([[90, 80, 70], [91, 85, 60], [88, 87, 80], [95, 90, 89]])
    >>> found.ranks, found.chi2, round(found.p, 4), round(found.critical_difference, 3)
    ([1.0, 2.0, 3.0], 8.0, 0.0183, 1.657)
    """
    widths = {len(block) for block in blocks}
    if len(blocks) < 2 or len(widths) != 1 or min(widths) < 3:
        raise KeepLoraError("ranking methods needs at least two blocks, each with the same three or more methods")
    if any(value is None or not math.isfinite(value) for block in blocks for value in block):
        raise KeepLoraError("ranking methods needs a finite number for every method in every block")
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    k, n = min(widths), len(blocks)
    sign = -1.0 if higher_is_better else 1.0
    rows = [[sign * round(value, 9) for value in block] for block in blocks]
    ranks = [float(fmean(column)) for column in zip(*(rankdata(row) for row in rows), strict=True)]
    if all(len(set(row)) == 1 for row in rows):  # no method differs in any block: 0 / 0 for scipy
        chi2, p = 0.0, 1.0
    else:
        chi2, p = map(float, friedmanchisquare(*zip(*rows, strict=True)))
    q = float(studentized_range.ppf(confidence, k, math.inf)) / math.sqrt(2.0)
    return Ranking(ranks, round(chi2, 9), p, q * math.sqrt(k * (k + 1) / (6.0 * n)), n)
