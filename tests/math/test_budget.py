"""The choice under a memory budget: never over it, nothing lost where it does not bind, and worth as much as any other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import Candidates, held_bytes, keep_most_valuable
from tests.math.strategies import PROPERTY, generator


@st.composite
def layers(draw, most: int = 5):
    out = []
    for _ in range(draw(st.integers(1, most))):
        n = draw(st.integers(1, 10))
        fixed = draw(st.integers(0, n))
        m = draw(st.integers(0, n - fixed))
        rng = generator(draw(st.integers(0, 10**6)))
        out.append(Candidates(n, fixed, torch.rand(m, generator=rng, dtype=torch.float64)))
    return out


def cost(found, keep):
    return sum(held_bytes(one.n_in, one.fixed + int(k.sum())) for one, k in zip(found, keep, strict=True))


def worth(found, keep):
    return sum(float(one.values[k].sum()) for one, k in zip(found, keep, strict=True))


@PROPERTY
@given(layers(), st.floats(0, 1.2))
def test_never_over_the_budget_and_nothing_lost_where_it_does_not_bind(found, share):
    least, whole = sum(one.least for one in found), sum(one.whole for one in found)
    budget = int(least + share * (whole - least))
    if budget < least:
        with pytest.raises(ValueError, match="stay in any case"):
            keep_most_valuable(found, budget)
        return
    keep = keep_most_valuable(found, budget)
    assert [k.shape for k in keep] == [one.values.shape for one in found]
    assert cost(found, keep) <= budget
    if whole <= budget:
        assert all(bool(k.all()) for k in keep)
    assert all(torch.equal(a, b) for a, b in zip(keep, keep_most_valuable(found, budget), strict=True))


@PROPERTY
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 3))
def test_among_layers_of_one_width_below_half_it_is_the_best_choice(seed, room, count):
    rng = generator(seed)
    found = [Candidates(12, 1, torch.rand(4, generator=rng, dtype=torch.float64)) for _ in range(count)]
    budget = 48 * (count + room)
    keep = keep_most_valuable(found, budget)
    values = torch.cat([one.values for one in found]).sort(descending=True).values
    assert worth(found, keep) == pytest.approx(float(values[:room].sum()))


@PROPERTY
@given(layers(2), st.floats(0, 1))
def test_close_to_the_best_of_all_choices(found, share):
    least, whole = sum(one.least for one in found), sum(one.whole for one in found)
    budget = int(least + share * (whole - least))
    if budget < least or sum(len(one.values) for one in found) > 12:
        return
    keep = keep_most_valuable(found, budget)
    best = 0.0
    for flags in itertools.product([False, True], repeat=sum(len(one.values) for one in found)):
        parts = torch.tensor(flags, dtype=torch.bool).split([len(one.values) for one in found]) if flags else ()
        if parts and cost(found, parts) <= budget:
            best = max(best, worth(found, parts))
    # What a greedy choice can miss: a layer that fits whole or not at all, and the last direction.
    assert worth(found, keep) >= 0.5 * best - 1e-12


def test_a_layer_past_half_stays_whole_while_that_is_worth_it():
    # Ten dimensions of twelve: by the complement they take two columns, direction by direction up to ten.
    full = Candidates(12, 1, torch.full((9,), 0.1, dtype=torch.float64))
    small = Candidates(12, 0, torch.tensor([0.02, 0.05], dtype=torch.float64))
    keep = keep_most_valuable([full, small], 3 * 48)
    assert keep[0].all()
    assert keep[1].tolist() == [False, True]
    assert cost([full, small], keep) == 3 * 48


def test_what_no_longer_fits_whole_keeps_its_best_directions():
    values = torch.tensor([0.1, 0.5, 0.2, 0.05, 0.3, 0.01], dtype=torch.float64)
    layer = Candidates(12, 1, values)  # 7 of 12: five columns by the complement
    (keep,) = keep_most_valuable([layer], 3 * 48)
    assert keep.tolist() == [False, True, False, False, True, False]


def test_equal_values_stay_in_the_order_given():
    same = torch.full((3,), 0.25, dtype=torch.float64)
    keep = keep_most_valuable([Candidates(8, 0, same), Candidates(8, 0, same)], 4 * 32)
    assert [k.tolist() for k in keep] == [[True] * 3, [True, False, False]]


def test_a_narrow_direction_takes_what_a_wide_one_leaves():
    wide, narrow = torch.tensor([0.9, 0.8]).double(), torch.tensor([0.01]).double()
    keep = keep_most_valuable([Candidates(10, 0, wide), Candidates(2, 0, narrow)], 40 + 8)
    assert [k.tolist() for k in keep] == [[True, False], [True]]
