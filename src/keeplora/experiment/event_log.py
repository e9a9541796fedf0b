"""metrics.jsonl: what happened in a run, a line each, whole after a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_write_bytes, read_regular
from keeplora.json_text import MAX_BYTES, parse_json


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: a loss that diverged is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(finite(event), allow_nan=False, separators=(",", ":")).encode("utf-8") + b"\n"


class EventLog:
    """The file, by its path; whoever writes holds the lock of its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line; it is in the file when this returns. Values that are not finite become null."""
        line = _line(event)
        self._drop_torn_line()
        try:
            with open(self.path, "ab", buffering=0) as handle:
                if handle.write(line) != len(line):  # the disk was full half-way, which is no error to the system
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle.fileno())  # results.json must never tell of more than this file
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def _drop_torn_line(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.path, "r+b") as handle:
            size = handle.seek(0, os.SEEK_END)
            if size == 0:
                return
            handle.seek(size - 1)
            if handle.read(1) != b"\n":
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)

    def _lines(self) -> list[bytes]:
        try:
            # What follows the last newline is a line that a crash cut short: the event counts as not written.
            return read_regular(self.path, MAX_BYTES).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KeepLoraError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def read(self) -> list[dict[str, Any]]:
        """Every whole event, oldest first; a last line cut short by a crash is left out.

        Raises
        ------
        KeepLoraError
            A line within the file is not JSON: the sentence has its number.
        """
        events, lines = [], self._lines()
        for number, line in enumerate(lines, start=1):
            try:
                event = parse_json(line.decode("utf-8"))
                if not isinstance(event, dict):
                    raise ValueError("not an object")
            except ValueError:
                if number == len(lines):  # a crash of the machine can leave zeros before the newline
                    break
                raise KeepLoraError(f"{self.path}, line {number}: not an event; the file was changed") from None
            events.append(event)
        return events

    def cut(self, tasks_done: int) -> None:
        """Drop every event after the ``tasks_done``-th ``task_finished``, for a resume that repeats what followed.

        Write an evaluation's events before ``task_finished``; with ``tasks_done`` 0 the file is emptied.

        Raises
        ------
        KeepLoraError
            Fewer tasks are finished in the file than ``tasks_done`` says.
        """
        events = self.read()
        ends = [index for index, event in enumerate(events, start=1) if event.get("event") == "task_finished"]
        if tasks_done > len(ends):
            raise KeepLoraError(
                f"{self.path} tells of {len(ends)} finished tasks where {tasks_done} are recorded; lines are missing"
            )
        keep = ends[tasks_done - 1] if tasks_done else 0
        atomic_write_bytes(self.path, b"".join(line + b"\n" for line in self._lines()[:keep]))

    def replace_evaluations(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Put evaluations into rows that the file has, each in place of that of the same set after as many tasks.

        Of a row that it does not have, none is written.
        """
        given = {(event["after"], event["set"]) for event in events}
        found, rows = self.read(), set()
        out: list[Mapping[str, Any]] = []
        for event in found:
            if event.get("event") != "evaluation":
                out.append(event)
                continue
            after = event.get("after")
            if after in rows:
                continue
            rows.add(after)  # a row stands together: all of it goes where it begins
            row = [e for e in found if e.get("event") == "evaluation" and e.get("after") == after]
            row = [e for e in row if (after, e.get("set")) not in given] + [e for e in events if e["after"] == after]
            out += sorted(row, key=lambda e: e.get("kind") != "task")
        atomic_write_bytes(self.path, b"".join(_line(event) for event in out))
