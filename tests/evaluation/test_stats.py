"""The t quantile against printed tables and closed forms; the intervals against hand-worked values, and coverage."""

from __future__ import annotations

import doctest
import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
