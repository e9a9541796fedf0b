"""SIGTERM and Ctrl-C: a training step is finished and kept before the process stops; a second one stops at once.

The command line installs the handlers (`listening`). Whoever runs an `Experiment` from Python keeps Python's own behaviour:
`KeyboardInterrupt`, wherever the program is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from keeplora.tuner import ranks


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, and what could be kept is kept.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """Whether the process was asked to stop, and whether it may stop at any moment.

    >>> stop = Stop()
    >>> with stop.held():
    ...     stop.ask(signal.SIGTERM)   # heard, and put off
    ...     stop.requested
    True
    >>> try:
    ...     stop.check()
    ... except Interrupted as stopped:
    ...     print(stopped)
    stopped by SIGTERM
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._agreed = False
        self._holds = 0

    @property
    def requested(self) -> bool:
        return self._asked is not None

    @property
    def due(self) -> bool:
        """Whether to stop here: asked, and with several processes all of them know (`agree`)."""
        return self.requested and (self._agreed or not ranks.active())

    def agree(self, anyone: bool | None = None) -> None:
        """Where all processes are at the same place: if one was asked to stop, all are. Does nothing in a process alone.

        Args:
            anyone: whether one was asked, where that is known; None: they tell each other.
        """
        if not ranks.active() or self._agreed:
            return
        if anyone is None:
            anyone = bool(ranks.totals("looking who was stopped", self.requested)[0])
        if anyone:
            self._asked, self._agreed = self._asked or signal.SIGTERM, True

    def ask(self, number: int) -> None:
        """The signal ``number`` has come. Raises `Interrupted`, unless it is the first and somebody holds."""
        first = self._asked is None
        self._asked = number
        if not (first and self._holds):
            raise Interrupted(number)

    def check(self) -> None:
        """Raise `Interrupted` if the process was asked to stop (and all others of the run, where there are others)."""
        if self._asked is not None and self.due:
            raise Interrupted(self._asked)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block that the first signal does not break into; it calls `check` where it can be left."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def forget(self) -> None:
        self._asked, self._agreed = None, False


STOP = Stop()
"""The process's own: signals come to a process and not to a run. Without `listening` nobody ever asks."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM go to `STOP`; afterwards they are handled as before. Does nothing outside the main thread.

    A SIGINT that is ignored (a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def heard(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's forked process: whoever started it decides
            return
        if STOP._holds and not STOP.requested:
            # Not through Python's streams: the signal may have come while one of them was writing.
            os.write(2, b"\nStopping after this step; once more to stop at once.\n")
        STOP.ask(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        STOP.forget()
