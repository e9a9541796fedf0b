"""Student-t intervals for a handful of seeds.

The quantile is computed here, from the regularised incomplete beta function: one number is no reason to need scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TypedDict

from keeplora.errors import KeepLoraError


class Interval(TypedDict):
    """A mean with its t interval; ``sd``, ``low`` and ``high`` are None for a single value, which has no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int
    sd: float | None


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function (Abramowitz & Stegun 26.5.8), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            c = 1.0 + numerator / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return result


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) with y = 1 - x given apart, because 1 - x has no digits left where x is next to 1."""
    if x <= 0.0:
        return 0.0
    if y <= 0.0:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y))
    # The fraction converges quickly only on this side of the mean; the other side is its mirror image.
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, y) / b


def student_t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with ``df`` > 0 degrees of freedom.

    >>> round(student_t_cdf(1.0, 1), 12)  # Cauchy: 1/2 + atan(1)/pi
    0.75
    """
    if not df > 0:
        raise KeepLoraError(f"degrees of freedom must be above 0, got {df}")
    tail = 0.5 * _incomplete_beta(df / 2.0, 0.5, df / (df + t * t), t * t / (df + t * t))
    return 1.0 - tail if t > 0 else tail


def student_t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1, to about 12 digits.

    >>> round(student_t_quantile(0.975, 4), 3)  # the printed table's value
    2.776
    """
    if not 0.0 < p < 1.0:
        raise KeepLoraError(f"a quantile needs a probability between 0 and 1, got {p}")
    if p < 0.5:
        return -student_t_quantile(1.0 - p, df)
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        low, high = high, high * 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return 0.5 * (low + high)


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


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """`mean_interval` of a[i] - b[i]: a and b are paired, for example two methods under the same seeds.

    >>> paired_difference([71.0, 72.0], [60.0, 63.0])["mean"]
    10.0
    """
    if len(a) != len(b):
        raise KeepLoraError(f"a paired difference needs as many values on both sides, got {len(a)} and {len(b)}")
    for name, values in (("first", a), ("second", b)):
        for i, value in enumerate(values):
            if value is None or not math.isfinite(value):
                raise KeepLoraError(f"value {i} of the {name} side is {value}; drop the pair or finish the run")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)
