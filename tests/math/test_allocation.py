"""A budget over layers: never over it, leading directions alone, and no choice that is worth more by a direction."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import allocation, allot
from tests.math.strategies import PROPERTY, generator


@st.composite
def layers(draw):
    values, costs = [], []
    for _ in range(draw(st.integers(1, 3))):
        rng = generator(draw(st.integers(0, 10**6)))
        m = draw(st.integers(0, 4))
        values.append(torch.rand(m, generator=rng, dtype=torch.float64).sort(descending=True).values)
        costs.append(draw(st.integers(1, 4)))
    return values, costs


def spent(counts, costs):
    return sum(n * cost for n, cost in zip(counts, costs, strict=True))


def value(counts, values):
    return sum(float(v[:n].sum()) for n, v in zip(counts, values, strict=True))


@PROPERTY
@given(layers(), st.integers(0, 30), st.integers(0, 2))
def test_within_the_budget_and_next_to_the_best(found, budget, least):
    values, costs = found
    floor = [min(least, len(v)) for v in values]
    if spent(floor, costs) > budget:
        with pytest.raises(ValueError, match="more than the budget"):
            allot(values, costs, budget, least)
        return
    counts = allot(values, costs, budget, least)
    assert spent(counts, costs) <= budget
    assert all(low <= n <= len(v) for low, n, v in zip(floor, counts, values, strict=True))
    every = itertools.product(*(range(low, len(v) + 1) for low, v in zip(floor, values, strict=True)))
    best = max(value(other, values) for other in every if spent(other, costs) <= budget)
    one = max((float(v[0]) for v in values if len(v)), default=0.0)
    assert value(counts, values) >= best - (one if len(set(costs)) > 1 else 0.0) - 1e-12
    # Nothing that is left out would still fit.
    room = budget - spent(counts, costs)
    assert all(cost > room for n, v, cost in zip(counts, values, costs, strict=True) if n < len(v))


def test_doctests():
    assert doctest.testmod(allocation).failed == 0
