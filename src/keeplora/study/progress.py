"""What a study tells while it runs: one live bar in a terminal, one plain line per event in pipes and CI."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from statistics import fmean
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from keeplora.experiment.progress import duration, is_quiet
from keeplora.study.plan import CellKey
from keeplora.study.store import CellRecord, StudyStore

_LOOK_EVERY = 2.0  # seconds between looks at what the running cells have done


def name_of(key: CellKey) -> str:
    return f"{key.method}, order {key.order}, seed {key.seed}"


class StudyProgress:
    """Cells done, failed and running, and the time left by the finished cells of the same methods.

    Parameters
    ----------
    store : the study; its records are read, never changed.
    keys : the cells of this call.
    jobs : how many run at once.
    quiet : plain lines (True), a live bar (False), or whatever suits the stream (None).
    """

    def __init__(
        self, store: StudyStore, keys: Sequence[CellKey], jobs: int, quiet: bool | None = None, stream: IO[str] | None = None
    ) -> None:  # fmt: skip
        self.store, self.keys, self.jobs = store, list(keys), jobs
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = is_quiet(self.stream) if quiet is None else quiet
        self._rich: Progress | None = None
        self._bar: dict[str, int] = {}
        self._running: list[tuple[CellKey, float]] = []
        self._waiting: list[CellKey] = []
        self._looked = 0.0

    def __enter__(self) -> StudyProgress:
        if not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._rich = Progress(
                *columns, console=Console(file=self.stream, force_terminal=True), refresh_per_second=4
            )
            self._rich.start()
            self._bar = {"cells": self._rich.add_task("cells", total=len(self.keys), note="")}
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._draw()
            self._rich.stop()
            self._rich = None

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._rich is not None:
            self._rich.console.print(escape(text), highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def _count(self, state: str) -> int:
        return sum(self.store.cells[key].state == state for key in self.keys)

    def seconds_left(self, running: Iterable[tuple[CellKey, float]], waiting: Iterable[CellKey]) -> float | None:
        """Time left, from the mean of finished cells of the same method, else of all; None while none is finished."""
        times: dict[str, list[float]] = {}
        for record in self.store.cells.values():
            if record.state == "finished" and record.seconds is not None:
                times.setdefault(record.method, []).append(record.seconds)
        if not times:
            return None
        means = {method: fmean(values) for method, values in times.items()}
        overall = fmean(value for values in times.values() for value in values)
        rest = [max(0.0, means.get(key.method, overall) - elapsed) for key, elapsed in running]
        ahead = [means.get(key.method, overall) for key in waiting]
        return max(max(rest, default=0.0), (sum(rest) + sum(ahead)) / max(1, self.jobs))

    def _left(self) -> str:
        left = self.seconds_left(self._running, self._waiting)
        return "" if left is None or not (self._running or self._waiting) else f"about {duration(left)} left"

    def tick(self, running: Sequence[tuple[CellKey, float]], waiting: Iterable[CellKey]) -> None:
        """What runs (with its seconds so far) and what waits."""
        self._running, self._waiting = list(running), list(waiting)
        if self._rich is not None and time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            self._draw()

    def _draw(self) -> None:
        assert self._rich is not None
        failed = self._count("failed")
        note = ", ".join(part for part in (f"{failed} failed" if failed else "", self._left()) if part)
        self._rich.update(self._bar["cells"], completed=self._count("finished"), note=note)  # type: ignore[arg-type]
        shown = {name_of(key): key for key, _ in self._running}
        for name in [n for n in self._bar if n != "cells" and n not in shown]:
            self._rich.remove_task(self._bar.pop(name))  # type: ignore[arg-type]
        for name, key in shown.items():
            if name not in self._bar:
                self._bar[name] = self._rich.add_task(f"  {escape(name)}", total=None, note="")
            done, total = self._tasks(key)
            self._rich.update(self._bar[name], completed=done, total=total, note="tasks")  # type: ignore[arg-type]

    def _tasks(self, key: CellKey) -> tuple[int, int | None]:
        """Finished tasks of a running cell and how many it has; a file that is just being made counts as nothing."""
        folder = self.store.folder(key)
        try:
            done = json.loads((folder / "status.json").read_text(encoding="utf-8"))["tasks_done"]
            sets = json.loads((folder / "data.json").read_text(encoding="utf-8"))["tasks"]
        except (OSError, ValueError, KeyError):
            return 0, None
        return done, sum(entry.get("kind") == "task" for entry in sets)

    def started(self, key: CellKey, *, resumed: bool = False, adopted: bool = False) -> None:
        """A cell's process was started, goes on with earlier work, or was found running."""
        if self.quiet:
            how = "still running since an earlier call" if adopted else "goes on" if resumed else "begins"
            self.line(f"{name_of(key)}: {how}")

    def ended(self, record: CellRecord) -> None:
        """A cell's process is over."""
        self._running = [(key, seconds) for key, seconds in self._running if key != record.key]
        done = f"[{self._count('finished')}/{len(self.keys)}] {name_of(record.key)}: {record.state}"
        if record.state == "finished":
            took = f" in {duration(record.seconds)}" if record.seconds is not None else ""
            left = self._left()
            self.line(f"{done}{took}{f' ({left})' if left else ''}")
        else:
            self.line(done)
            for text in (record.error or "").splitlines():
                self.line(f"    {text}")

    def interrupting(self, count: int) -> None:
        """Ctrl-C was passed on."""
        if count:
            what = "1 run" if count == 1 else f"{count} runs"
            self.line(f"Interrupting {what}; their finished tasks are kept (Ctrl-C again ends them at once).")
