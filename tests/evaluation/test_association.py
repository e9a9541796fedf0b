"""Rank correlation within groups: the number, its test and its interval."""

from __future__ import annotations

import random

import pytest

from keeplora.errors import KeepLoraError
from keeplora.evaluation.association import spearman_within


def test_one_group_is_scipys():
    from scipy.stats import spearmanr

    r = random.Random(0)
    x, y = [r.random() for _ in range(12)], [float(r.randrange(5)) for _ in range(12)]
    found = spearman_within([(x, y)])
    wanted = spearmanr(x, y)
    assert found.rho == pytest.approx(wanted.statistic)
    assert found.p == pytest.approx(wanted.pvalue, abs=0.03)
    assert found.low <= found.rho <= found.high
    assert found.least == pytest.approx(
        0.576, abs=0.03
    )  # of 12 pairs, two-sided 0.05: Zar's table has 0.587, by t 0.576


def test_levels_of_groups_do_not_count():
    """Each group falls, although the pooled points rise: Simpson's paradox."""
    groups = [
        ([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]),
        ([11.0, 12.0, 13.0, 14.0, 15.0], [15.0, 14.0, 13.0, 12.0, 11.0]),
    ]
    assert spearman_within(groups).rho == -1.0
    assert spearman_within(groups).verdict == "goes against it"
    pooled = [(a + b, c + d) for (a, c), (b, d) in [groups]]
    assert spearman_within(pooled).rho > 0.4


def test_what_says_nothing_is_left_out():
    found = spearman_within([([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5])])
    assert (found.rho, found.n, found.groups, found.verdict) == (None, 0, 0, "cannot be told")
    with pytest.raises(KeepLoraError, match="as many values"):
        spearman_within([([1, 2], [1])])


def test_chance_is_not_a_finding():
    """Of 20 unrelated lists few pass p <= 0.05."""
    r = random.Random(1)
    hits = 0
    for i in range(20):
        x, y = [r.random() for _ in range(10)], [r.random() for _ in range(10)]
        hits += spearman_within([(x, y)], seed=i).verdict != "cannot be told"
    assert hits <= 4
