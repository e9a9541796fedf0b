"""The rules from figures to settings, on made-up figures: what they give, and that they say nothing where nothing is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeplora.analysis import suggest
from keeplora.analysis.suggest import Change, Kept, Protected, Window
from keeplora.math import layer_scales

SHARES = (0.0, 0.5, 0.8, 0.9, 1.0)


def curve(*changes: float, configured: float = 0.5, known: float = 5.0) -> list[Kept]:
    """Changes of the general score, each known to ±5 points, their differences to that at the configured share to ±``known``; the
    full end is the model itself unless said otherwise."""
    at = dict(zip(SHARES, changes))

    def kept(share: float, c: float) -> Kept:
        more = c - at[configured]
        return Kept(
            share, Change(c, c - 5, c + 5), Change(more, more - known, more + known) if share > configured else None
        )

    return [kept(share, c) for share, c in at.items()]


def window(name: str, gain: float, loss: float, spread: float = 0.5, tasks: int = 2) -> Window:
    rng = np.random.default_rng(len(name))
    return Window(name, gain, loss, rng.normal(gain, spread, 2000), rng.normal(loss, spread, 2000), tasks)


def test_energy_weights_is_the_least_share_from_which_nothing_is_lost():
    found = suggest.energy_weights(curve(-58, -30, -2, 0, 0), 0.5)
    assert found.value == 0.8
    assert "at 0.50 it is −30.0 [−35.0, −25.0] points" in found.why
    assert "Against the configured 0.5 it keeps +28.0 [+23.0, +33.0] points more" in found.why
    assert "a loss of up to 7.0 points at 0.80 cannot be ruled out" in found.why


def test_a_share_above_which_the_score_falls_again_does_not_count():
    assert (
        suggest.energy_weights(curve(-58, -2, -20, 0, 0), 0.5).value is None
    )  # 0.9, which is not told from the configured 0.5
    assert suggest.energy_weights(curve(-58, -20, -20, 0, 0), 0.5).value == 0.9


def test_a_gain_is_no_loss():
    assert suggest.energy_weights(curve(-58, -30, 10, 11, 0), 0.5).value == 0.8


def test_a_share_that_does_not_visibly_keep_more_than_the_configured_one_is_not_suggested():
    """A loss is seen at 0.5 and none at 0.8: that is no difference between the two."""
    found = suggest.energy_weights(curve(-58, -7, -4, 0, 0, known=6.0), 0.5)
    assert found.value is None
    assert "the difference between the two is +3.0 [−3.0, +9.0] points" in found.why


@pytest.mark.parametrize("configured", [0.8, 0.9])
def test_a_smaller_share_than_the_configured_one_is_never_suggested(configured):
    found = suggest.energy_weights(curve(-58, -30, -2, 0, 0, configured=configured), configured)
    assert found.value is None
    assert f"the configured {configured:g} is enough as far as can be seen" in found.why
    assert "7.0 points at 0.80 cannot be ruled out" in found.why


def test_without_a_point_at_the_configured_share_nothing_speaks_against_it():
    points = [kept._replace(over=None) for kept in curve(-58, -30, -2, 0, 0)]
    found = suggest.energy_weights(points, 0.6)
    assert found.value is None
    assert "0.6 itself was not measured" in found.why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ((-3, -2, -1, 0, 0), "do not show what the tower's weights hold"),
        ((-58, -55, -50, -20, 0), "nothing to learn in"),
        ((-58, -55, -50, -20, -10), "no share that was tried"),
    ],
)
def test_energy_weights_that_the_curve_does_not_tell(changes, why):
    found = suggest.energy_weights(curve(*changes), 0.5)
    assert found.value is None
    assert why in found.why


@given(st.floats(0.01, 3.0), st.integers(2, 24))
def test_gamma_gives_the_schedule_the_ratio_of_the_windows(ratio, count):
    gamma, x = suggest.gamma_of(ratio, count), 0.5 / count
    assert suggest.LEAST_GAMMA <= gamma <= 1
    shallow, deep = gamma + (1 - gamma) * x, gamma + (1 - gamma) * (1 - x)
    assert suggest.ratio_of(gamma, count) == pytest.approx(shallow / deep)
    if gamma > suggest.LEAST_GAMMA:
        assert shallow / deep == pytest.approx(min(ratio, 1.0))
    else:
        assert shallow / deep >= ratio - 1e-9


def test_gamma_goes_by_where_the_windows_lie():
    """A price ratio of the ends of twelve windows is one of blocks further apart than thirds' middles: a milder γ fits it."""
    windows = [window("shallow", 20, 20), window("deeper", 20, 10)]
    assert suggest.gamma(windows, [1.0], 12).value == pytest.approx(0.47, abs=0.01)  # (23 · 0.5 − 1) / (23 − 0.5)


def test_gamma_is_low_where_shallow_layers_cost_more():
    windows = [window("shallow", 20, 20), window("middle", 20, 15), window("deeper", 20, 10)]
    assert suggest.gamma(windows, [1.0]).value == pytest.approx(1 / 3, abs=0.01)  # prices 1 and 1/2


def test_gamma_is_one_where_deep_layers_cost_more():
    windows = [window("shallow", 20, 5), window("deeper", 20, 15)]
    assert suggest.gamma(windows, [0.2]).value == 1.0
    found = suggest.gamma(windows, [1.0])
    assert found.value is None
    assert "the configured γ = 1 is the best of the linear schedules" in found.why


def test_prices_below_nothing_give_no_gamma():
    """Deep layers whose adapting helps the general sets as well ask for less of the shallow ones, and no γ says how much less."""
    windows = [window("shallow", 20, -2), window("deeper", 20, -20)]
    found = suggest.gamma(windows, [0.2])
    assert found.value is None
    assert "no γ stands in such a ratio" in found.why
    assert "no γ stands in such a ratio" in suggest.gamma(windows, [1.0]).why
    # Both prices are above 0, and the γ that they ask for is below the least that is suggested.
    windows = [window("shallow", 20, 20, 0.1), window("deeper", 20, 0.2, 0.1)]
    assert "the best of the linear schedules" in suggest.gamma(windows, [0.05]).why


def test_prices_that_differ_may_still_fit_the_configured_gamma():
    """Prices 1 and 0.385 are what γ = 0.2 is for: that they visibly differ from each other is no reason to leave it."""
    windows = [window("shallow", 20, 20), window("deeper", 20, 7.7)]
    assert suggest.gamma(windows, [0.2]).value is None
    assert "fits a deep price of 0.38 times the shallow one" in suggest.gamma(windows, [0.2]).why
    assert suggest.gamma(windows, [1.0]).value == pytest.approx(0.2, abs=0.01)
    assert suggest.gamma(windows, [1.0, 0.2]).value is None  # one of the towers has it already


@pytest.mark.parametrize(
    ("windows", "why"),
    [
        ([window("shallow", 20, 10), window("deeper", 20, 10.05)], "so a difference cannot be told"),
        ([window("shallow", 20, 20, spread=6), window("deeper", 20, 10, spread=6)], "so a difference cannot be told"),
        ([window("shallow", 0.1, 10), window("deeper", 20, 10)], "shallow alone gains"),
        ([window("shallow", 20, 10), window("deeper", -3, 10)], "deeper alone gains"),
        ([window("shallow", 20, 20, tasks=1), window("deeper", 20, 10, tasks=1)], "one task alone"),
        ([window("shallow", 20, 10)], "but one window"),
    ],
)
def test_gamma_that_the_windows_do_not_tell(windows, why):
    found = suggest.gamma(windows, [1.0])
    assert found.value is None
    assert why in found.why


def test_rank_is_the_smallest_that_takes_nine_tenths_at_the_median_layer():
    assert suggest.rank({8: [0.85, 0.95, 0.96], 4: [0.5, 0.89, 0.99], 16: [0.99] * 3}).value == 8
    assert suggest.rank({4: [0.5, 0.6, 0.99]}).value is None
    assert suggest.rank({}).value is None


def test_a_rank_below_the_configured_one_is_not_suggested():
    shares = {8: [0.85, 0.95, 0.96], 4: [0.5, 0.89, 0.99]}
    assert [suggest.rank(shares, r).value for r in (4, 7, 8, 16)] == [8, 8, None, None]
    assert "the configured 16 is enough" in suggest.rank(shares, 16).why


def test_energy_features_is_the_largest_that_leaves_room_in_nine_of_ten_layers():
    tried = [
        Protected(0.9, [40] * 10, [0.5] * 10, [0.6] * 10),
        Protected(0.99, [20] * 9 + [3], [0.4] * 10, [0.6] * 10),
        Protected(0.999, [20] * 8 + [3, 3], [0.1] * 10, [0.6] * 10),
    ]
    assert suggest.energy_features(tried, 16, 0.999).value == 0.99
    assert suggest.energy_features(tried, 32, 0.999).value == 0.9
    found = suggest.energy_features(tried, 64, 0.99)
    assert found.value is None
    assert "leaves room enough" in found.why


def test_a_larger_energy_features_than_the_configured_one_is_not_suggested():
    tried = [Protected(energy, [50] * 10, [0.5], [0.6]) for energy in (0.9, 0.99, 0.999)]
    found = suggest.energy_features(tried, 16, 0.95)
    assert found.value is None
    assert "the configured 0.95 leaves room enough; a larger one is not suggested" in found.why
    assert "0.9999 was not tried" in suggest.energy_features(tried, 16, 0.9999).why
    # Room at 0.95 and none at 0.99 does not say that there is none at 0.97.
    tried = [Protected(0.95, [50], [0.5], [0.6]), Protected(0.99, [5], [0.5], [0.6])]
    assert suggest.energy_features(tried, 16, 0.97).value is None
    assert suggest.energy_features([*tried, Protected(0.97, [7], [0.5], [0.6])], 16, 0.97).value == 0.95


def test_a_curve_without_the_whole_model_tells_nothing():
    """An interrupted analysis has no full end: its last point is no standard for the others."""
    found = suggest.energy_weights(curve(-58, -40, 0)[:3], 0.5)
    assert found.value is None
    assert "ends at 0.80" in found.why


def test_one_task_says_nothing_of_how_features_add_up():
    tried = [Protected(0.9, [50, 40], [0.5], [0.6]), Protected(0.999, [5, 4], [0.5], [0.6])]
    assert suggest.energy_features(tried, 8, 0.999, 1).value is None
    assert suggest.energy_features(tried, 8, 0.999, 2).value == 0.9


@pytest.mark.parametrize(("old", "new"), [(0.2, 1.0), (1.0, 0.2), (0.5, 0.7)])
def test_the_rate_that_comes_with_a_gamma_keeps_the_squared_step_of_all_layers(old, new):
    towers = [(12, 48, old), (6, 24, old), (1, 3, old)]
    factor, why = suggest.same_step(towers, new)

    def squares(gamma, rate):
        return sum(n * sum((s * rate) ** 2 for s in layer_scales(L, gamma)) / L for L, n, _ in towers)

    assert squares(new, factor) == pytest.approx(squares(old, 1.0))
    assert f"the rate times {factor:.2f}" in why
    assert suggest.same_step(towers, old)[0] == 1.0
