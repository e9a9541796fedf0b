"""Quantiles against printed tables and closed forms; intervals and tests against hand-worked values, scipy, coverage."""

from __future__ import annotations

import doctest
import math
import random
from itertools import pairwise, product
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare, rankdata, ttest_rel

from keeplora.errors import KeepLoraError
from keeplora.evaluation import stats

# Upper critical values as printed in statistical tables (three decimals).
TABLE = {
    1: {0.90: 3.078, 0.95: 6.314, 0.975: 12.706, 0.995: 63.657},
    2: {0.90: 1.886, 0.95: 2.920, 0.975: 4.303, 0.995: 9.925},
    4: {0.90: 1.533, 0.95: 2.132, 0.975: 2.776, 0.995: 4.604},
    9: {0.90: 1.383, 0.95: 1.833, 0.975: 2.262, 0.995: 3.250},
    30: {0.90: 1.310, 0.95: 1.697, 0.975: 2.042, 0.995: 2.750},
    120: {0.90: 1.289, 0.95: 1.658, 0.975: 1.980, 0.995: 2.617},
}


@pytest.mark.parametrize(("df", "p", "value"), [(df, p, v) for df, row in TABLE.items() for p, v in row.items()])
def test_printed_table(df: int, p: float, value: float) -> None:
    assert stats.student_t_quantile(p, df) == pytest.approx(value, abs=5.01e-4)
    assert stats.student_t_quantile(1 - p, df) == pytest.approx(-value, abs=5.01e-4)


@given(st.floats(0.001, 0.999))
def test_closed_forms(p: float) -> None:
    assert stats.student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-9)
    assert stats.student_t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9, abs=1e-9)
    assert stats.student_t_quantile(p, 1e7) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5, abs=1e-5)


@given(st.floats(0.0005, 0.9995), st.floats(1, 200))
def test_quantile_inverts_cdf(p: float, df: float) -> None:
    assert stats.student_t_cdf(stats.student_t_quantile(p, df), df) == pytest.approx(p, abs=1e-10)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1, 60))
def test_cdf_is_symmetric_and_rises(a: float, b: float, df: float) -> None:
    assert stats.student_t_cdf(a, df) + stats.student_t_cdf(-a, df) == pytest.approx(1.0, abs=1e-12)
    low, high = sorted((a, b))
    assert stats.student_t_cdf(low, df) <= stats.student_t_cdf(high, df) + 1e-12


def test_mean_interval_by_hand() -> None:
    # mean 3, sd sqrt(2.5), half width 2.7764 * sqrt(2.5 / 5)
    found = stats.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["n"] == 5
    assert found["mean"] == 3.0
    assert found["sd"] == pytest.approx(math.sqrt(2.5))
    assert found["low"] == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert found["high"] == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-5)


def test_paired_difference_removes_what_the_pairs_share() -> None:
    a, b = [60.0, 70.0, 80.0], [55.0, 64.0, 76.0]
    found = stats.paired_difference(a, b)
    assert found == stats.mean_interval([5.0, 6.0, 4.0])
    assert found["low"] is not None
    assert found["low"] > 0


def test_constant_differences_have_no_width_and_one_value_no_interval() -> None:
    assert stats.paired_difference([3.0, 3.0], [1.0, 1.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2, "sd": 0.0}
    assert stats.mean_interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "n": 1, "sd": None}


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage_is_what_it_says(confidence: float) -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(1500):
        found = stats.mean_interval([rng.gauss(10, 3) for _ in range(5)], confidence)
        hits += found["low"] <= 10 <= found["high"]  # type: ignore[operator]
    assert hits / 1500 == pytest.approx(confidence, abs=0.025)


def test_paired_t_test_is_scipys() -> None:
    rng = random.Random(1)
    for n in (2, 3, 5, 20):
        a, b = ([rng.gauss(50, 4) for _ in range(n)] for _ in range(2))
        assert stats.paired_t_test(a, b) == pytest.approx(float(ttest_rel(a, b).pvalue), rel=1e-9)


def test_paired_t_test_agrees_with_its_interval() -> None:
    """p < 0.05 exactly where the 95 % interval of the difference leaves out 0."""
    rng = random.Random(2)
    for _ in range(200):
        a, b = ([rng.gauss(1, 2) for _ in range(5)] for _ in range(2))
        found, p = stats.paired_difference(a, b), stats.paired_t_test(a, b)
        assert found["low"] is not None
        assert found["high"] is not None
        assert p is not None
        assert (p < 0.05) == (found["low"] > 0 or found["high"] < 0)


def test_paired_t_test_without_spread() -> None:
    assert stats.paired_t_test([1.0], [0.0]) is None
    assert stats.paired_t_test([3.0, 4.0], [3.0, 4.0]) == 1.0
    # 0.1 each, up to rounding: what methods that ignore the seed give, however often they are run.
    assert stats.paired_t_test([0.3, 0.7, 1.1], [0.2, 0.6, 1.0]) is None


@pytest.mark.parametrize(
    ("differences", "p", "n"),
    [
        # By hand: |d| ranks 1, 2, 3; the negative ranks' sum is 1, at most 1 in 2 of 8 patterns, doubled for two sides.
        ([-1.0, 2.0, 3.0], 0.5, 3),
        ([1.0, 2.0, 3.0, 4.0], 2 / 16, 4),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2 / 64, 6),
        # A pair without a difference is dropped.
        ([0.0, 1.0, 2.0, 3.0, 4.0], 2 / 16, 4),
        # Ties: |d| = 1, 1, 2 have ranks 1.5, 1.5, 3; the negative sum is 1.5, at most that in 3 of 8 patterns, doubled.
        ([-1.0, 1.0, 2.0], 6 / 8, 3),
        ([5.0, 5.0, 5.0], 2 / 8, 3),
        ([0.0, 0.0], 1.0, 0),
    ],
)
def test_wilcoxon_by_hand(differences: list[float], p: float, n: int) -> None:
    found = stats.wilcoxon_signed_rank(differences, [0.0] * len(differences))
    assert found is not None
    assert found.p == pytest.approx(p)
    assert found.n == n
    assert found.smallest <= found.p


@settings(deadline=None)  # the first example imports scipy.stats
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=8))
def test_wilcoxon_is_the_share_of_sign_patterns(values: list[int]) -> None:
    """Against the definition: every pattern of signs is as likely as any other."""
    kept = [v for v in values if v]
    found = stats.wilcoxon_signed_rank([float(v) for v in values], [0.0] * len(values))
    assert found is not None
    if not kept:
        assert found.p == 1.0
        return
    ranks = rankdata([abs(v) for v in kept])
    total = float(sum(ranks))
    seen = sum(float(r) for r, v in zip(ranks, kept, strict=True) if v > 0)
    sums = [
        sum(float(r) for r, s in zip(ranks, signs, strict=True) if s) for signs in product((0, 1), repeat=len(kept))
    ]
    below, above = (sum(x <= seen + 1e-9 for x in sums), sum(x >= seen - 1e-9 for x in sums))
    assert found.p == pytest.approx(min(1.0, 2 * min(below, above) / len(sums)))
    assert found.smallest == pytest.approx(min(1.0, 2 / len(sums)))
    assert 0 <= seen <= total


def test_wilcoxon_without_pairs() -> None:
    assert stats.wilcoxon_signed_rank([], []) is None


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> the last may not fall below 0.06.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []
    assert stats.holm([None, 0.02]) == [None, 0.02]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(values: list[float]) -> None:
    adjusted = [p for p in stats.holm(values) if p is not None]
    assert len(adjusted) == len(values)
    assert all(a >= p for a, p in zip(adjusted, values, strict=True))
    assert max(adjusted) <= 1.0
    pairs = sorted(zip(values, adjusted, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_friedman_is_scipys_with_and_without_ties() -> None:
    rng = random.Random(3)
    for decimals in (6, 0):
        blocks = [[round(rng.gauss(50 + j, 2), decimals) for j in range(4)] for _ in range(9)]
        found = stats.friedman_nemenyi(blocks)
        expected = friedmanchisquare(*zip(*blocks, strict=True))
        assert found.chi2 == pytest.approx(float(expected.statistic))
        assert found.p == pytest.approx(float(expected.pvalue))
        assert found.blocks == 9
        assert sum(found.ranks) == pytest.approx(4 * 5 / 2)


@pytest.mark.parametrize(
    ("k", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)]
)
def test_critical_difference_by_the_printed_table(k: int, q: float) -> None:
    """q of Demšar (2006), table 5(a), at 0.05."""
    rng = random.Random(k)
    blocks = [[rng.random() for _ in range(k)] for _ in range(7)]
    expected = q * math.sqrt(k * (k + 1) / (6 * 7))
    assert stats.friedman_nemenyi(blocks).critical_difference == pytest.approx(expected, rel=5e-4)


def test_ranks_go_by_what_is_better_and_ties_share() -> None:
    blocks = [[3.0, 2.0, 1.0], [3.0, 3.0, 1.0]]
    assert stats.friedman_nemenyi(blocks).ranks == [1.25, 1.75, 3.0]
    assert stats.friedman_nemenyi(blocks, higher_is_better=False).ranks == [2.75, 2.25, 1.0]
    same = stats.friedman_nemenyi([[1.0, 1.0, 1.0]] * 2)
    assert (same.ranks, same.chi2, same.p) == ([2.0, 2.0, 2.0], 0.0, 1.0)


def test_ranking_refuses_too_little() -> None:
    for blocks in ([[1.0, 2.0, 3.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0, 3.0], [1.0, 2.0]], []):
        with pytest.raises(KeepLoraError, match="at least two blocks"):
            stats.friedman_nemenyi(blocks)
    with pytest.raises(KeepLoraError, match="finite number"):
        stats.friedman_nemenyi([[1.0, 2.0, math.nan], [1.0, 2.0, 3.0]])


def test_bad_input_is_named() -> None:
    with pytest.raises(KeepLoraError, match="at least one value"):
        stats.mean_interval([])
    with pytest.raises(KeepLoraError, match="3 and 2"):
        stats.paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(KeepLoraError, match="value 1 of the second side is None"):
        stats.paired_difference([1.0, 2.0], [1.0, None])  # type: ignore[list-item]
    with pytest.raises(KeepLoraError, match="value 1 is nan"):
        stats.mean_interval([1.0, math.nan])
    with pytest.raises(KeepLoraError, match=r"0\.95 for 95"):
        stats.mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(KeepLoraError, match="degrees of freedom"):
        stats.student_t_cdf(1.0, 0)
    with pytest.raises(KeepLoraError, match="between 0 and 1"):
        stats.student_t_quantile(1.0, 3)


def test_docstring_examples() -> None:
    result = doctest.testmod(stats)
    assert result.attempted > 0
    assert result.failed == 0
