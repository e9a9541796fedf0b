from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.data import PictureSet, split_validation
from keeplora.data.sets import Entry, HeldBytes
from keeplora.data.splits import cap_per_class, holdout
from keeplora.errors import ConfigError, DataError


def pictures(labels: list[int], same: int = 0) -> PictureSet:
    """Distinct pictures, but the first ``same`` of them have equal bytes."""
    entries = [
        Entry(f"{label}/{i}.png", str(label), f"{i}.png", HeldBytes(b"same" if i < same else str(i).encode()))
        for i, label in enumerate(labels)
    ]
    return PictureSet(entries, labels)


label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=120)
fractions = st.floats(0.01, 0.99)


@settings(max_examples=200, deadline=None)
@given(label_lists, fractions, st.integers(0, 5))
def test_split_is_stratified_and_never_empties_a_class(labels: list[int], fraction: float, seed: int) -> None:
    full = pictures(labels)
    counts = Counter(labels)
    if max(counts.values()) == 1:
        with pytest.raises(DataError, match="no picture can be held out"):
            split_validation(full, fraction, seed)
        return
    train, validation = split_validation(full, fraction, seed)
    assert sorted(train.keys + validation.keys) == sorted(full.keys)
    assert set(train.labels) == set(labels)
    held = Counter(validation.labels)
    for label, count in counts.items():
        assert held[label] <= count - 1
        assert abs(held[label] - fraction * count) <= 1 or held[label] in (1, count - 1)
    most = sum(count - 1 for count in counts.values())
    assert len(validation) <= max(1, int(fraction * len(labels) + 0.5))
    assert len(validation) >= min(most, 1)
    # the seed and the names decide, not the order
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    assert set(split_validation(full.subset(order), fraction, seed)[1].keys) == set(validation.keys)


def test_exact_shares_and_seeds() -> None:
    full = pictures([0] * 50 + [1] * 10)
    train, validation = split_validation(full, 0.2, 0)
    assert Counter(validation.labels) == {0: 10, 1: 2}
    assert len(train) == 48
    assert split_validation(full, 0.2, 1)[1].keys != validation.keys
    assert split_validation(full, 0.2, 0)[1].fingerprint == validation.fingerprint


def test_small_classes_share_a_small_validation_set() -> None:
    _, validation = split_validation(pictures([label for label in range(10) for _ in range(4)]), 0.1, 0)
    assert len(validation) == 4  # round(0.1 * 40), though 0.1 of each class rounds to none


def test_equal_pictures_stay_together() -> None:
    for seed in range(20):
        train, validation = split_validation(pictures([0] * 12, same=4), 0.4, seed)
        sides = [s for s in (train, validation) if b"same" in {e.source.read() for e in s.entries}]
        assert len(sides) == 1
        assert len(validation) > 0


def test_nothing_to_hold_out_of_equal_pictures() -> None:
    with pytest.raises(DataError, match="no picture can be held out"):
        split_validation(pictures([0, 0, 0], same=3), 0.5, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, True])
def test_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction between 0 and 1"):
        split_validation(pictures([0, 0]), fraction, 0)


@settings(max_examples=50, deadline=None)
@given(label_lists, st.floats(0.01, 0.5))
def test_at_least_one_of_every_class_that_can_spare_it(labels: list[int], fraction: float) -> None:
    keys = [str(i) for i in range(len(labels))]
    held = Counter(labels[i] for i in holdout(keys, labels, fraction, 0, at_least=1))
    for label, count in Counter(labels).items():
        assert held[label] >= (count > 1)
        assert held[label] < count


@settings(max_examples=50, deadline=None)
@given(label_lists, st.integers(1, 5), st.integers(0, 3))
def test_cap(labels: list[int], limit: int, seed: int) -> None:
    keys = [f"k{i}" for i in range(len(labels))]
    chosen = cap_per_class(keys, labels, limit, seed)
    assert chosen == sorted(chosen)
    assert Counter(labels[i] for i in chosen) == {c: min(n, limit) for c, n in Counter(labels).items()}
    # a larger cap keeps what a smaller one chose
    assert set(chosen) <= set(cap_per_class(keys, labels, limit + 1, seed))


def test_cap_depends_on_the_seed_and_none_is_all() -> None:
    keys = [str(i) for i in range(30)]
    assert len({tuple(cap_per_class(keys, [0] * 30, 5, seed)) for seed in range(5)}) == 5
    assert cap_per_class(keys, [0] * 30, None, 0) == list(range(30))


def test_fingerprint_sees_key_label_and_bytes() -> None:
    def one(key: str = "k", label: int = 0, data: bytes = b"d") -> str:
        return PictureSet([Entry(key, "x", "somewhere", HeldBytes(data))], [label]).fingerprint

    prints = {one(), one(key="j"), one(label=1), one(data=b"e")}
    assert len(prints) == 4
    assert all(len(p) == 64 for p in prints)
    both = pictures([0, 1])
    assert both.fingerprint != both.subset([1, 0]).fingerprint
    assert len(list(itertools.chain(both.subset([1]).labels))) == 1
