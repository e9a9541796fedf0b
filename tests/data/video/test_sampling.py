"""Which moments are asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeplora.data.video import Sampling
from keeplora.errors import ConfigError

lengths = st.integers(1, 400)
counts = st.integers(1, 40)


@given(lengths, counts)
def test_uniform_is_the_linspace_over_frame_numbers(n: int, frames: int) -> None:
    """As the reference takes them: ``np.linspace(0, n - 1, frames).astype(int)`` of a video of constant rate."""
    times = Sampling("uniform", frames).times(n / 25, last=(n - 1) / 25)
    found = [int(np.floor(time * 25 + 1e-6)) for time in times]
    assert found == [int(x + 1e-6) for x in np.linspace(0, n - 1, frames)]


@given(st.floats(0.01, 1e5), counts)
def test_segments_have_a_moment_in_the_middle_of_each(duration: float, frames: int) -> None:
    times = np.array(Sampling("segment", frames).times(duration))
    edges = np.linspace(0, duration, frames + 1)
    assert np.allclose(times, (edges[:-1] + edges[1:]) / 2)


@given(st.floats(0.01, 1e4), counts, st.floats(0.05, 60))
def test_fps_starts_at_the_first_frame_and_never_gives_too_many(duration: float, frames: int, fps: float) -> None:
    times = Sampling("fps", frames, fps).times(duration)
    assert times[0] == 0
    assert len(times) == min(frames, max(1, int(np.ceil(duration * fps - 1e-6))))
    assert times == sorted(set(times))
    steps = np.array(times) * fps
    assert np.allclose(steps, np.rint(steps), atol=1e-6)
    if len(times) > 1:
        gaps = np.diff(np.rint(steps))
        assert gaps.max() - gaps.min() <= 1  # thinned evenly
        assert frames < max(1, np.ceil(duration * fps - 1e-6)) or gaps.max() == 1
        assert times[-1] < duration


def test_fps_thinned_keeps_both_ends() -> None:
    assert Sampling("fps", 3, 2.0).times(4.0) == [0.0, 2.0, 3.5]
    assert Sampling("fps", 1, 2.0).times(4.0) == [0.0]


@pytest.mark.parametrize(
    ("options", "tells"),
    [
        ({"method": "unifrom"}, "did you mean 'uniform'"),
        ({"frames": 0}, "whole number from 1"),
        ({"frames": 2.0}, "whole number from 1"),
        ({"frames": True}, "whole number from 1"),
        ({"fps": 2.0}, "leave fps out"),
        ({"method": "fps"}, "needs a number"),
        ({"method": "fps", "fps": 0}, "needs a number"),
        ({"method": "fps", "fps": float("inf")}, "needs a number"),
        ({"method": "fps", "fps": float("nan")}, "needs a number"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], tells: str) -> None:
    with pytest.raises(ConfigError, match=tells):
        Sampling(**options)  # type: ignore[arg-type]
