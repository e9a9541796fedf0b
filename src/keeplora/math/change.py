"""Has the distribution of a stream of numbers changed? A CUSUM of sequential ranks, whose false alarms follow the rate asked for.

Whatever the numbers' distribution is: as long as they are exchangeable, the rank of each among those before it is uniform
and independent of all earlier ranks, so its normal score q_n is exactly N(0, 1) and independent (McDonald, Naval Research
Logistics 37, 1990; the p values are those of conformal prediction, Vovk et al. 2005). Page's CUSUM of such scores,

    g_n = max(0, g_{n−1} + q_n − k),   k = shift / 2,   alarm where g_n > h,

has a known mean time between false alarms (Siegmund, Sequential Analysis, 1985), so h follows from the rate alone: nothing
has to be estimated from the few numbers that a new task has brought.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

OVERSHOOT = 1.166
"""2 · 0.583, how far a CUSUM of normal scores overshoots both of its borders on average (Siegmund, 1985)."""
MOST = 100_000
"""Values that are held to rank others among. Those that come later are ranked without joining them, so that neither memory nor
the time per value grows for ever; the false alarms' rate then holds to about a tenth."""
_NORMAL = NormalDist()


def run_length(h: float, k: float) -> float:
    """Mean numbers between false alarms of a one-sided CUSUM of N(0, 1) scores with reference value k > 0 and threshold h.

    Siegmund's approximation, within a per cent or two where h is 4 or more, which rates below 0.003 ask for
    (tests/math/test_change.py counts).

    >>> round(run_length(5.0, 0.5))
    938
    """
    x = 2 * k * (h + OVERSHOOT)
    return (math.exp(x) - x - 1) / (2 * k * k)


def threshold(rate: float, k: float) -> float:
    """The h at which a one-sided CUSUM gives ``rate`` false alarms per number, 0 < rate < 0.5.

    >>> round(run_length(threshold(1e-4, 0.5), 0.5))
    10000
    """
    if not 0 < rate < 0.5:
        raise ValueError(f"rate must lie above 0 and below 0.5 false alarms per sample, got {rate!r}")
    low, high = 0.0, 1.0
    while run_length(high, k) < 1 / rate:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if run_length(middle, k) < 1 / rate else (low, middle)
    return high


@dataclass(frozen=True)
class Alarm:
    """A change that was noticed.

    Attributes:
        at: number of the value that gave the alarm, from 1. onset: after how many values the change is likely to have come:
            where the CUSUM last was 0. up: whether the values have risen.
    """

    at: int
    onset: int
    up: bool


class RankCusum:
    """Watches a stream of numbers for a rise or a fall of their level.

    Args:
        rate: false alarms per number while nothing changes, both directions together; the mean time between two is 1 / rate.
        shift: the smallest shift worth noticing quickly, in standard deviations of a normal stream; k is half of it.
        both: watch for falls as well as rises. seed: of the draws that break ties.

    The first numbers give no evidence by themselves, for there is nothing to rank them among: give `learn` what is known to
    come before any change. With m of them a single value's score is at most Φ⁻¹(1 − 1 / (m + 1)).

    >>> watch = RankCusum(rate=1e-3)
    >>> watch.learn([0.1 * (i % 7) for i in range(70)])
    >>> next(alarm for _ in range(9) if (alarm := watch.update(2.0)))
    Alarm(at=3, onset=0, up=True)
    """

    def __init__(self, rate: float, shift: float = 1.0, *, both: bool = True, seed: int = 0) -> None:
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift must be a finite number above 0, got {shift!r}")
        self.k = shift / 2
        self.h = threshold(rate / 2 if both else rate, self.k)
        self.seen = 0
        """Values since `learn`."""
        self._signs = (1.0, -1.0) if both else (1.0,)
        self._g = [0.0] * len(self._signs)
        self._zero = [0] * len(self._signs)
        self._sorted: list[float] = []
        self._random = Random(seed)

    @property
    def statistic(self) -> float:
        """The larger of the two CUSUMs, in units of the threshold: an alarm is given above 1."""
        return max(self._g) / self.h

    @property
    def quiet_until(self) -> int:
        """Up to this value there is no sign of a change that is still under suspicion: the earlier onset of both directions."""
        return min(self.seen if g == 0 else zero for g, zero in zip(self._g, self._zero, strict=True))

    def learn(self, values: list[float]) -> None:
        """Take values that come before any change, without judging them."""
        for value in values:
            self._insert(value)

    def update(self, value: float) -> Alarm | None:
        """Judge one value; after an alarm the statistic starts at 0 again, among all values so far."""
        below, equal, n = self._insert(value)
        # The rank among all n, at a random place among its equals: uniform on (0, 1) if nothing has changed.
        q = _NORMAL.inv_cdf(min(max((below + self._random.random() * equal) / n, 1e-12), 1 - 1e-12))
        self.seen += 1
        alarm = None
        for i, sign in enumerate(self._signs):
            self._g[i] = max(0.0, self._g[i] + sign * q - self.k)
            if self._g[i] == 0:
                self._zero[i] = self.seen
            elif self._g[i] > self.h and alarm is None:
                alarm = Alarm(self.seen, self._zero[i], sign > 0)
        if alarm is not None:
            self._g = [0.0] * len(self._g)
            self._zero = [self.seen] * len(self._zero)
        return alarm

    def _insert(self, value: float) -> tuple[int, int, int]:
        """(how many are below it, how many equal it, itself among them, how many there are); it stays while there are fewer
        than `MOST`."""
        if not math.isfinite(value):
            raise ValueError(f"a stream of finite numbers is needed, got {value!r}")
        below = bisect_left(self._sorted, value)
        equal, n = bisect_right(self._sorted, value) - below + 1, len(self._sorted) + 1
        if n <= MOST:
            self._sorted.insert(below, value)
        return below, equal, n
