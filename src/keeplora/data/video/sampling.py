"""Which moments of a video become frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keeplora.errors import ConfigError, did_you_mean

METHODS = ("uniform", "segment", "fps")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many frames of a video are taken, and when.

    Attributes:
        method: ``uniform``: equally far apart, from the first frame to the last, both taken (``linspace`` over the frame
            numbers of a video of constant rate); ``segment``: the middles of ``frames`` equal parts; ``fps``: ``fps``
            frames a second from the start, thinned evenly where these are more than ``frames``.
        frames: exactly so many (``uniform`` and ``segment``; a video of fewer repeats some), or at most so many (``fps``).
        fps: frames a second, of the method ``fps`` alone.

    Raises:
        ConfigError: a method, number or rate that cannot be.

    >>> Sampling("uniform", frames=3).times(2.0, last=1.8)
    [0.0, 0.9, 1.8]
    >>> Sampling("segment", frames=2).times(2.0)
    [0.5, 1.5]
    >>> Sampling("fps", frames=8, fps=2).times(1.2)
    [0.0, 0.5, 1.0]
    """

    method: str = "uniform"
    frames: int = 8
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"sampling {self.method!r} is unknown{did_you_mean(self.method, METHODS)}")
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise ConfigError(f"frames is {self.frames!r}: give a whole number from 1")
        if self.method != "fps":
            if self.fps is not None:
                raise ConfigError(
                    f"fps is {self.fps!r} but sampling is {self.method!r}: leave fps out, or sample by fps"
                )
        elif isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not 0 < self.fps < math.inf:
            raise ConfigError(f"fps is {self.fps!r}: sampling by fps needs a number of frames a second above 0")

    def times(self, duration: float, last: float | None = None) -> list[float]:
        """The moments, in seconds from the first frame, in ascending order.

        Args:
            duration: from the start of the first frame to the end of the last.
            last: when the last frame starts; ``duration`` where it is not known.
        """
        last = duration if last is None else last
        if self.method == "uniform":
            return [last * i / max(1, self.frames - 1) for i in range(self.frames)]
        if self.method == "segment":
            return [duration * (2 * i + 1) / (2 * self.frames) for i in range(self.frames)]
        assert self.fps is not None  # __post_init__
        # a moment that falls on the end, give or take the error of a product, is of no frame
        count = max(1, math.ceil(duration * self.fps - 1e-6))
        if count <= self.frames:
            return [i / self.fps for i in range(count)]
        step = (count - 1) / max(1, self.frames - 1)
        return [math.floor(i * step + 0.5) / self.fps for i in range(self.frames)]
