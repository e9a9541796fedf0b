"""Bootstrap intervals: paired, seeded by the set, as wide as theory says, wider over tasks where tasks differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keeplora.analysis.intervals import Resamples
from keeplora.errors import KeepLoraError


def test_the_interval_of_a_share_is_about_its_normal_one():
    scores = {"a": [100.0] * 60 + [0.0] * 140}
    found = Resamples({"a": 200}).spread(scores)
    half = 1.96 * 100 * math.sqrt(0.3 * 0.7 / 200)
    assert found.mean == pytest.approx(30.0)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.low_tasks is None
    assert (found.n, found.sets) == (200, 1)


def test_a_paired_difference_leaves_out_what_both_share():
    rng = np.random.default_rng(0)
    base = {"a": list(100.0 * rng.integers(0, 2, 100))}
    better = {"a": [min(100.0, value + 100.0 * (i < 5)) for i, value in enumerate(base["a"])]}
    draws = Resamples({"a": 100})
    paired = draws.difference(better, base)
    assert paired.low >= 0
    whole = draws.spread(base)
    assert paired.high - paired.low < (whole.high - whole.low) / 2


def test_over_tasks_that_differ_the_interval_is_wider():
    scores = {f"t{i}": [20.0 * i + (j % 2) for j in range(50)] for i in range(5)}
    found = Resamples(dict.fromkeys(scores, 50)).spread(scores)
    assert found.low_tasks is not None
    assert found.high_tasks is not None
    assert found.high_tasks - found.low_tasks > 20 > found.high - found.low
    assert found.mean == pytest.approx(40.5)


def test_it_takes_a_byte_a_draw_and_gives_what_the_whole_would():
    """Of fifty thousand samples two thousand draws as floats would be 800 MB."""
    values = np.random.default_rng(1).normal(size=300)
    draws = Resamples({"a": 300}, repeats=250)
    assert draws._counts["a"].nbytes == 250 * 300
    assert (draws._counts["a"].sum(axis=1) == 300).all()
    mean, over, _ = draws.means({"a": list(values)})
    np.testing.assert_allclose(over, draws._counts["a"].astype(float) @ values / 300, rtol=1e-9, atol=1e-12)
    assert mean == pytest.approx(values.mean())


def test_another_set_beside_it_changes_nothing():
    one = Resamples({"a": 30}).means({"a": list(range(30))})[1]
    two = Resamples({"a": 30, "b": 10}).means({"a": list(range(30)), "b": [0.0] * 10})[1]
    assert np.allclose(one / 2, two)


def test_scores_of_other_samples_are_not_paired():
    with pytest.raises(KeepLoraError, match="cannot be paired"):
        Resamples({"a": 3}).difference({"a": [1, 2, 3]}, {"a": [1, 2]})
    with pytest.raises(KeepLoraError, match="at least one sample"):
        Resamples({"a": 0})
