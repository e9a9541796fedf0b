"""M6: one scale per block, shallow blocks moving less than deep ones."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeplora.math import SCHEDULES, layer_scales, scales
from tests.math.strategies import PROPERTY

gammas = st.one_of(st.sampled_from([0.0, 0.2, 1.0]), st.floats(0.0, 1.0))


@PROPERTY
@given(st.integers(2, 64), gammas)
def test_linear_runs_evenly_from_gamma_to_one(L: int, gamma: float) -> None:
    values = layer_scales(L, gamma)
    assert values == pytest.approx([gamma + (1 - gamma) * block / (L - 1) for block in range(L)])
    assert values[0] == gamma
    assert values[-1] == pytest.approx(1.0)
    steps = [deep - shallow for shallow, deep in itertools.pairwise(values)]
    assert steps == pytest.approx([(1 - gamma) / (L - 1)] * (L - 1))
    assert values == layer_scales(L, gamma, "linear")  # the default


def test_the_reference_gamma_on_twelve_blocks_by_hand() -> None:
    values = layer_scales(12, 0.2)
    assert len(values) == 12
    assert (values[0], values[1], values[11]) == pytest.approx((0.2, 0.2 + 0.8 / 11, 1.0))


@PROPERTY
@given(st.integers(1, 64))
def test_gamma_one_is_keeplora_exactly(L: int) -> None:
    assert layer_scales(L, 1.0) == [1.0] * L


@PROPERTY
@given(gammas)
def test_a_tower_without_depth_is_not_scaled(gamma: float) -> None:
    assert layer_scales(1, gamma) == [1.0]


@PROPERTY
@given(st.integers(1, 64), gammas)
def test_constant_is_gamma_everywhere(L: int, gamma: float) -> None:
    assert layer_scales(L, gamma, "constant") == [gamma] * L


@PROPERTY
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), gammas)
def test_a_list_is_used_as_it_is(values: list[float], gamma: float) -> None:
    assert layer_scales(len(values), gamma, values) == values
    assert layer_scales(len(values), gamma, tuple(values)) == values


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gamma_out_of_range_is_refused(gamma: float, schedule: str) -> None:
    with pytest.raises(ValueError, match=f"gamma must lie between 0 and 1, got {gamma!r}"):
        layer_scales(3, gamma, schedule)


def test_other_bad_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="L must be at least 1, got 0"):
        layer_scales(0, 0.2)
    with pytest.raises(
        ValueError, match="unknown schedule 'cosine': use one of linear, constant, or a list of 3 numbers"
    ):
        layer_scales(3, 0.2, "cosine")
    with pytest.raises(ValueError, match="lists 2 scales but the tower has 3 blocks"):
        layer_scales(3, 0.2, [0.1, 1.0])
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="layer scales must be finite and not negative"):
            layer_scales(2, 0.2, [1.0, bad])


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(scales)
    assert result.attempted > 0
    assert result.failed == 0
