"""What a run tells while it works: live bars in a terminal, one plain line per step in pipes and CI."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


def is_quiet(stream: IO[str]) -> bool:
    """Whether plain lines suit ``stream``: not a terminal, a dumb one, or the environment variable CI is set."""
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    dumb = os.environ.get("TERM", "") == "dumb"
    return ci or dumb or not (hasattr(stream, "isatty") and stream.isatty())


def duration(seconds: float) -> str:
    """``65.2`` as ``1:05``, ``3700`` as ``1:01:40``.

    >>> duration(65.2), duration(3700)
    ('1:05', '1:01:40')
    """
    minutes, secs = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def fields_text(fields: dict[str, Any]) -> str:
    """``{"loss": 0.5, "accuracy": 87.25}`` as ``loss 0.5000, accuracy 87.2``; None is left out.

    >>> fields_text({"lr": 0.001, "data_wait": 0.034})
    'lr 1.00e-03, data wait 3 %'
    """
    shown = []
    for key, value in fields.items():
        if value is None:
            continue
        if isinstance(value, float):
            value = (
                f"{value:.1f}"
                if "accuracy" in key or "score" in key
                else f"{100 * value:.0f} %"
                if key == "data_wait"
                else f"{value:.2e}"
                if key == "lr"
                else f"{value:.4f}"
            )
        shown.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(shown)


class Progress:
    """Progress of a run: tasks, and within a task phases (an epoch, an evaluation) of a known number of steps.

    Parameters
    ----------
    quiet : plain lines (True), live bars (False), or whatever `is_quiet` says of the stream (None).
    stream : where to write; None: standard error, so that a pipe from standard output holds results alone.

    Examples
    --------
    >>> with Progress(quiet=True, stream=sys.stdout) as progress:
    ...     progress.task("pets", 1, 2)
    ...     progress.line("rank 16 in every layer")
    task 1/2: pets
      rank 16 in every layer
    """

    def __init__(self, quiet: bool | None = None, stream: IO[str] | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = is_quiet(self.stream) if quiet is None else quiet
        self._task: tuple[str, int, int] | None = None
        self._phase: str | None = None
        self._phase_total: int | None = None
        self._steps = 0
        self._fields: dict[str, Any] = {}
        self._began = self._task_began = self._phase_began = time.monotonic()
        self._first_index = 1
        self._rich: RichProgress | None = None
        self._bars: list[Any] = []

    @classmethod
    def silent(cls) -> Progress:
        """One that tells nothing: of a process beside the one that does."""
        return cls(True, open(os.devnull, "w", encoding="utf-8"))

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if not self.quiet:
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self.stream, force_terminal=True),
                refresh_per_second=4,
                transient=False,
            )
            self._rich.start()
            self._bars = [
                self._rich.add_task("tasks", total=None, note="", visible=False),
                self._rich.add_task("", total=None, note="", visible=False),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_phase(complete=kind is None)
        if self._rich is not None:
            if self._task is not None and kind is None:
                self._rich.update(self._bars[0], completed=self._task[2], note=f"done in {duration(self._elapsed())}")
            self._rich.stop()
            self._rich = None

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _print(self, text: str) -> None:
        if self._rich is not None:
            self._rich.console.print(escape(text), highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def eta(self) -> float | None:
        """Seconds left for the whole run, from the mean time of the tasks of this session; None while unknown.

        A resumed run counts only the tasks that it did itself. The share of the present phase is left out: phases differ
        too much in cost.
        """
        if self._task is None:
            return None
        _, index, total = self._task
        done = index - self._first_index
        if done < 1:
            return None
        per_task = (self._task_began - self._began) / done
        return max(0.0, per_task * (total - index + 1) - (time.monotonic() - self._task_began))

    def _eta_text(self) -> str:
        left = self.eta()
        return "" if left is None else f"ETA {duration(left)}"

    def task(self, name: str, index: int, total: int) -> None:
        """Begin task ``index`` (from 1) of ``total``."""
        self._end_phase()
        if self._task is None:
            self._first_index = index
            self._began = time.monotonic()
        self._task, self._task_began = (name, index, total), time.monotonic()
        eta = self._eta_text()
        if self._rich is not None:
            description = f"task {index}/{total}: {escape(name)}"
            self._rich.update(
                self._bars[0], description=description, completed=index - 1, total=total, note=eta, visible=True
            )
        else:
            self._print(f"task {index}/{total}: {name}" + (f" ({eta})" if eta else ""))

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase such as ``epoch 2/3`` of ``total`` steps (None: unknown); it ends the phase before it."""
        self._end_phase()
        self._phase, self._phase_total, self._steps, self._fields = name, total, 0, {}
        self._phase_began = time.monotonic()
        if self._rich is not None:
            self._rich.reset(
                self._bars[1], description=f"  {escape(name)}", total=total, completed=0, visible=True, note=""
            )

    def advance(self, n: int = 1, **fields: Any) -> None:
        """``n`` more steps of the phase are done; ``fields`` (loss, accuracy, lr ...) are shown with their latest values."""
        self._steps += n
        self._fields.update(fields)
        if self._rich is not None:
            self._rich.update(self._bars[1], advance=n, note=escape(fields_text(self._fields)))
            self._rich.update(self._bars[0], note=self._eta_text())

    def line(self, text: str) -> None:
        """A line of its own that stays, above the bars."""
        self._print(f"  {text}" if self._task is not None else text)

    def _end_phase(self, complete: bool = True) -> None:
        if self._phase is None:
            return
        seconds = time.monotonic() - self._phase_began
        of_total = "" if complete or not self._phase_total else f" stopped at {self._steps}/{self._phase_total}"
        told = [part for part in (fields_text(self._fields), f"{seconds:.1f} s") if part]
        self._print(f"  {self._phase}{of_total}: {', '.join(told)}")
        self._phase = None
        if self._rich is not None:
            self._rich.update(self._bars[1], visible=False)
