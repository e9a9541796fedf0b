"""The metrics against a hand-worked matrix, brute-force restatements of the formulas, and the edges."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeplora.errors import KeepLoraError
from keeplora.evaluation import metrics

# Three tasks, worked by hand. Row 0 (the untouched model) is deliberately absurd: it must not enter any metric.
HAND = [
    [999.0, 999.0, 999.0],
    [90.0, 40.0, 30.0],
    [84.0, 80.0, 36.0],
    [78.0, 74.0, 70.0],
]


def test_hand_worked_three_tasks() -> None:
    assert metrics.transfer(HAND) == pytest.approx((40 + (30 + 36) / 2) / 2)  # 36.5
    assert metrics.average(HAND) == pytest.approx(582 / 9)
    assert metrics.last(HAND) == pytest.approx(74.0)
    assert metrics.forgetting(HAND) == pytest.approx((12 + 6) / 2)
    assert metrics.bwt(HAND) == pytest.approx((-12 - 6) / 2)
    assert metrics.per_task_forgetting(HAND) == [12.0, 6.0, None]
    assert metrics.mft(HAND) == pytest.approx((90 + 80 + 70) / 3)
    assert metrics.mfn(HAND) == pytest.approx((78 + 74 + 70) / 3)
    assert metrics.maa(HAND) == pytest.approx((90 + (84 + 80) / 2 + (78 + 74 + 70) / 3) / 3)


def test_instruction_tuning_metrics_of_four_tasks() -> None:
    # The diagonal is 10, 20, 30, 40; below it a task has lost 1 point per later task; above it is nothing that counts.
    lost = [[0.0] * 4, *([10.0 * (j + 1) - (i - j) if j <= i else 77.0 for j in range(4)] for i in range(4))]
    assert metrics.mft(lost) == 25.0
    assert metrics.mfn(lost) == 25.0 - (3 + 2 + 1) / 4
    moments = [10.0, (9 + 20) / 2, (8 + 19 + 30) / 3, (7 + 18 + 29 + 40) / 4]
    assert metrics.maa(lost) == pytest.approx(sum(moments) / 4)
    assert metrics.bwt(lost) == pytest.approx(-(3 + 2 + 1) / 3)


@given(st.deferred(lambda: matrices()))
def test_mfn_is_last_and_bwt_ties_it_to_mft(acc: list[list[float]]) -> None:
    summary, n = metrics.summary(acc), len(acc[0])
    assert summary["mfn"] == summary["last"]
    # What is left in the end is what was learned plus what it changed by since: N MFN = N MFT + (N - 1) BWT.
    assert summary["mfn"] == pytest.approx(summary["mft"] + summary["bwt"] * (n - 1) / n, abs=1e-9)


def test_forgetting_counts_from_the_best_row_even_before_the_task_was_learned() -> None:
    matrix = [[0, 0, 0], [60.0, 70.0, 1.0], [65.0, 50.0, 2.0], [55.0, 52.0, 3.0]]
    assert metrics.per_task_forgetting(matrix) == [10.0, 18.0, None]
    assert metrics.bwt(matrix) == pytest.approx((-5 + 2) / 2)


def test_a_task_that_gains_has_negative_forgetting() -> None:
    assert metrics.forgetting([[0, 0], [60.0, 5.0], [66.0, 80.0]]) == -6.0


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    n = draw(st.integers(2, 6))
    cell = st.floats(0, 100)
    return draw(st.lists(st.lists(cell, min_size=n, max_size=n), min_size=n + 1, max_size=n + 1))


@given(matrices())
def test_brute_force(acc: list[list[float]]) -> None:
    n = len(acc[0])
    a = {(i, j): acc[i][j - 1] for i in range(1, n + 1) for j in range(1, n + 1)}
    per_task = []
    for j in range(2, n + 1):
        total = sum(a[i, j] for i in range(1, j))
        per_task.append(total / (j - 1))
    assert metrics.transfer(acc) == pytest.approx(sum(per_task) / (n - 1))
    assert metrics.average(acc) == pytest.approx(sum(a.values()) / n**2)
    assert metrics.last(acc) == pytest.approx(sum(a[n, j] for j in range(1, n + 1)) / n)
    drops = [max(a[i, j] for i in range(1, n)) - a[n, j] for j in range(1, n)]
    assert metrics.forgetting(acc) == pytest.approx(sum(drops) / (n - 1), abs=1e-9)
    assert metrics.bwt(acc) == pytest.approx(sum(a[n, j] - a[j, j] for j in range(1, n)) / (n - 1), abs=1e-9)
    assert metrics.mft(acc) == pytest.approx(sum(a[i, i] for i in range(1, n + 1)) / n)
    total = sum(sum(a[t, j] for j in range(1, t + 1)) / t for t in range(1, n + 1))
    assert metrics.maa(acc) == pytest.approx(total / n)


@given(matrices(), st.floats(0, 100))
def test_row_zero_never_enters(acc: list[list[float]], other: float) -> None:
    changed = [[other] * len(acc[0]), *acc[1:]]
    assert metrics.summary(acc) == metrics.summary(changed)


@given(matrices())
def test_forgetting_bounds_bwt(acc: list[list[float]]) -> None:
    found, backward = metrics.forgetting(acc), metrics.bwt(acc)
    assert found is not None
    assert backward is not None
    # The best earlier row is at least the row in which the task was learned.
    assert found >= -backward - 1e-9


@given(matrices())
def test_unfinished_is_undefined_not_a_smaller_mean(acc: list[list[float]]) -> None:
    found = metrics.summary(acc[:-1], [[50.0]] * (len(acc) - 1))
    assert found.pop("probe_before") == 50.0
    assert set(found.values()) == {None}
    assert metrics.per_task_forgetting(acc[:-1]) == [None] * len(acc[0])


def test_summary_gives_every_metric_under_its_own_name() -> None:
    # All values differ but last and mfn, which are one: a key that holds another metric shows.
    found = metrics.summary([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]], [[9.0], [4.0], [5.0], [6.0]])
    assert found == {
        "transfer": 37.5,
        "average": 67.0,
        "last": 79.0,
        "forgetting": 1.5,
        "bwt": -1.5,
        "mft": 80.0,
        "mfn": 79.0,
        "maa": pytest.approx((90 + 84 + 79) / 3),
        "probe": 5.0,
        "probe_before": 9.0,
    }


def test_one_task() -> None:
    found = metrics.summary([[20.0], [80.0]], [[40.0, 20.0], [38.0, 18.0]])
    assert found == {
        "transfer": None,
        "average": 80.0,
        "last": 80.0,
        "forgetting": None,
        "bwt": None,
        "mft": 80.0,
        "mfn": 80.0,
        "maa": 80.0,
        "probe": 28.0,
        "probe_before": 30.0,
    }


def test_probe_is_the_mean_over_sets_and_rows_without_row_zero() -> None:
    assert metrics.probe([[100.0, 100.0], [40.0, 20.0], [30.0, 10.0], [20.0, 0.0]]) == 20.0
    assert metrics.probe([]) is None
    assert metrics.probe([[], []]) is None
    assert metrics.probe([[50.0]]) is None


def test_missing_cells_make_only_what_needs_them_undefined() -> None:
    acc = [[None, None, None], [90.0, 40.0, 30.0], [84.0, None, 36.0], [78.0, 74.0, 70.0]]
    found = metrics.summary(acc)
    assert found["last"] == 74.0
    assert found["transfer"] == pytest.approx(36.5)
    assert found["average"] is None
    assert found["bwt"] is None
    assert found["mfn"] == 74.0
    assert found["mft"] is None
    assert found["maa"] is None
    assert metrics.per_task_forgetting(acc) == [12.0, None, None]


def test_empty() -> None:
    assert set(metrics.summary([], []).values()) == {None}
    assert metrics.per_task_forgetting([]) == []


@pytest.mark.parametrize(
    ("acc", "said"),
    [
        ([[1.0, 2.0], [1.0]], "row 1 has 1 columns"),
        ([[1.0], [float("nan")]], r"accuracy\[1\]\[0\] is nan"),
        ([[1.0], [2.0], [3.0]], "3 rows for 1 tasks"),
    ],
)
def test_bad_matrices_are_named(acc: list[list[float]], said: str) -> None:
    with pytest.raises(KeepLoraError, match=said):
        metrics.average(acc)


def test_rows_must_agree() -> None:
    with pytest.raises(KeepLoraError, match="share their rows"):
        metrics.summary([[1.0], [2.0]], [[1.0]])


def test_docstring_examples() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted > 0
    assert result.failed == 0
