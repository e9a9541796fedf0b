"""A limited set: the classes in turn, the same choice whatever the order, nothing where nothing is too much."""

from __future__ import annotations

from collections import Counter

from keeplora.data.sets import Entry, HeldBytes, PictureSet
from keeplora.data.splits import spread


def pictures(*counts: int) -> PictureSet:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    entries = [Entry(f"{label}-{i}", str(label), "", HeldBytes(b"")) for i, label in enumerate(labels)]
    return PictureSet(entries, labels, skipped=2)


def test_classes_take_turns():
    assert Counter(spread(pictures(20, 3, 1), 9, seed=0).labels) == {0: 5, 1: 3, 2: 1}


def test_names_and_seed_alone_decide():
    whole = pictures(20, 20)
    back = PictureSet(whole.entries[::-1], whole.labels[::-1])
    assert sorted(spread(whole, 10, 0).keys) == sorted(spread(back, 10, 0).keys)
    assert spread(whole, 10, 0).keys != spread(whole, 10, 1).keys


def test_what_fits_stays_as_it_is():
    whole = pictures(3, 3)
    assert spread(whole, 6, 0) is whole
    assert spread(whole, None, 0) is whole
