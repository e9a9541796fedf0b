"""What a trace of a stream says of its boundaries."""

from __future__ import annotations

from random import Random

import pytest

from keeplora.experiment.boundary import KINDS, BoundaryTrace, FoundBoundary, _order


def trace(boundaries, warmups, alarms):
    found = tuple(FoundBoundary(at, onset, True) for at, onset in alarms)
    tasks = ("a", *(name for _, name in boundaries))
    return BoundaryTrace("abrupt", 1e-3, tasks, boundaries, 300, warmups, (), (), (), found)


def test_an_alarm_after_a_boundary_is_its_notice_even_if_the_onset_is_put_too_early():
    one = trace(((100, "b"),), ((0, 16), (96, 112)), ((103, 96),))
    assert one.delays() == [("b", 3)]
    assert one.false_alarms() == 0


def test_a_boundary_inside_a_warm_up_is_not_noticed_by_what_comes_later():
    one = trace(((100, "b"), (200, "c")), ((0, 16), (88, 120), (150, 182)), ((90, 88), (152, 150), (204, 200)))
    assert one.delays() == [("b", None), ("c", 4)]
    assert one.false_alarms() == 2
    first = trace(((10, "b"),), ((0, 16),), ((40, 36),))
    assert first.delays() == [("b", None)]
    assert first.false_alarms() == 1


def test_a_warm_up_that_ends_or_begins_at_a_boundary_swallows_nothing():
    assert trace(((16, "b"),), ((0, 16),), ((20, 16),)).delays() == [("b", 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_streamed_once(kind):
    lengths = [9, 20, 7]
    order, starts = _order(lengths, kind, 6, Random(0))
    assert sorted(order) == list(range(36))
    assert starts == {"abrupt": [9, 29], "gradual": [6, 26], "shuffled": []}[kind]
