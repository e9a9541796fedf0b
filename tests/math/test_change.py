"""The rank CUSUM: its false alarms are as many as asked for, whatever the numbers' distribution is, and changes are seen."""

from __future__ import annotations

import math
from random import Random

import pytest

from keeplora.math.change import RankCusum, run_length, threshold

DRAWS = {
    "normal": lambda r: r.gauss(0, 1), "heavy": lambda r: r.paretovariate(0.7), "ties": lambda r: float(r.randrange(4)),
}  # fmt: skip


def test_the_threshold_is_where_alarms_come_at_the_rate():
    for rate in (0.1, 1e-2, 1e-4, 1e-7):
        assert run_length(threshold(rate, 0.5), 0.5) == pytest.approx(1 / rate, rel=1e-9)
    for bad in (0.0, -1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="false alarms per sample"):
            threshold(bad, 0.5)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("before", [8, 64])
def test_false_alarms_follow_the_rate(name, before):
    """Mean time to the first alarm over 600 streams, within four standard errors (it is close to exponential: sd = mean)."""
    rate, times = 0.01, []
    for seed in range(600):
        random = Random(seed)
        watch = RankCusum(rate, seed=seed)
        watch.learn([DRAWS[name](random) for _ in range(before)])
        while (alarm := watch.update(DRAWS[name](random))) is None:
            pass
        times.append(alarm.at)
    mean = sum(times) / len(times)
    assert abs(mean * rate - 1) < 4 / math.sqrt(len(times))


@pytest.mark.parametrize("up", [True, False])
def test_a_change_is_seen_soon_and_dated(up):
    delays, onsets = [], []
    for seed in range(20):
        random = Random(seed)
        watch = RankCusum(1e-4, seed=seed)
        watch.learn([random.gauss(0, 1) for _ in range(64)])
        for _ in range(100):
            watch.update(random.gauss(0, 1))  # one stream in a hundred gives a false alarm here
        while (alarm := watch.update(random.gauss(3 if up else -3, 1))) is None:
            assert watch.seen < 160
        assert alarm.up is up
        delays.append(alarm.at - 100)
        onsets.append(abs(alarm.onset - 100))
    assert sorted(delays)[10] <= 8
    assert sorted(onsets)[10] <= 2


def test_one_direction_alone():
    watch = RankCusum(1e-3, both=False)
    watch.learn([float(i % 10) for i in range(100)])
    assert all(watch.update(-5.0) is None for _ in range(50))


def test_where_it_has_been_quiet():
    watch = RankCusum(1e-3)
    watch.learn([float(i) for i in range(50)])
    assert watch.update(24.4) is None
    assert watch.quiet_until == 1
    assert watch.update(100.0) is None
    assert watch.quiet_until == 1
    assert watch.statistic > 0


def test_no_more_is_held_than_the_limit(monkeypatch):
    monkeypatch.setattr("keeplora.math.change.MOST", 50)
    watch, random = RankCusum(1e-3), Random(0)
    watch.learn([random.gauss(0, 1) for _ in range(60)])
    for _ in range(200):
        watch.update(random.gauss(0, 1))
    assert len(watch._sorted) == 50
    assert any(watch.update(9.0) for _ in range(10))


def test_what_is_refused():
    with pytest.raises(ValueError, match="finite numbers"):
        RankCusum(1e-3).update(math.nan)
    with pytest.raises(ValueError, match="shift"):
        RankCusum(1e-3, shift=0.0)
