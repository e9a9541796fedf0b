"""The rows of `all.py`'s table, how they are written and kept, and how many repeats a budget of seconds leaves."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from keeplora.files import atomic_write_json, atomic_write_text

UNITS = {"s": (1.0, "s"), "ms": (1e-3, "ms"), "KiB": (2.0**10, "KiB"), "MiB": (2.0**20, "MiB"), "GiB": (2.0**30, "GiB")}
SMALLER = {"s": "ms", "GiB": "MiB", "MiB": "KiB"}
"""Of a unit, the one in which small values are told."""


@dataclass
class Row:
    """One pair, or why there is none.

    Attributes:
        what: what is compared, ours / other. aim: the most that the median may be, as ``told`` writes it; None: no aim was set.
        ratios: one for each repeat. ours, other: medians of both sides, in seconds or bytes (``unit``: s or GiB).
        note: what else belongs to the figures. trouble: why there is no figure; failed: whether that is a fault.
    """

    section: str
    model: str
    what: str
    aim: float | None = None
    told: str = ""
    ratios: list[float] = field(default_factory=list)
    ours: float | None = None
    other: float | None = None
    unit: str = "s"
    note: str = ""
    trouble: str = ""
    failed: bool = False

    @property
    def verdict(self) -> str:
        if self.trouble:
            return "failed" if self.failed else "left out"
        if self.aim is None:
            return "–"
        return "met" if median(self.ratios) <= self.aim else "missed"


def pair(
    section: str, model: str, what: str, ours: Sequence[float], other: Sequence[float], *, aim: float | None = None,
    told: str = "", unit: str = "s", note: str = "",
) -> Row:  # fmt: skip
    """The row of two sides that were measured in turn, repeat by repeat; without a ratio where the other side is nothing.

    >>> pair("step", "clip", "time", [1.0, 3.0], [2.0, 2.0], aim=1.0).ratios
    [0.5, 1.5]
    """
    if min(*ours, *other) <= 0:
        trouble = f"too small to be measured here ({number(median(ours))} / {number(median(other))})"
        return Row(section, model, what, aim, told, note=note, trouble=trouble)
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return Row(section, model, what, aim, told, ratios, median(ours), median(other), unit, note)


def failure(section: str, model: str, error: BaseException) -> Row:
    """The row of a section that raised, its reason in one line."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return Row(section, model, "", trouble=reason[:200], failed=True)


def attempt(section: str, model: str, what: str, make: Callable[[], Row]) -> Row:
    """The row that ``make`` gives, or why it gave none: what else a section has measured is kept."""
    try:
        return make()
    except Exception as error:
        traceback.print_exc()
        return replace(failure(section, model, error), what=what)


def left_out(section: str, model: str, reason: str) -> Row:
    return Row(section, model, "", trouble=reason)


def number(value: float) -> str:
    """Three digits that say something, small ones as a power of ten.

    >>> number(0.9871), number(12.3456), number(0.00012)
    ('0.987', '12.3', '1.2e-04')
    """
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _values(row: Row) -> str:
    if row.ours is None or row.other is None:
        return ""
    unit, largest = row.unit, max(row.ours, row.other)
    while unit in SMALLER and largest < UNITS[unit][0]:
        unit = SMALLER[unit]
    size, name = UNITS[unit]
    return f"{number(row.ours / size)} / {number(row.other / size)} {name}"


def _ratio(row: Row) -> str:
    if row.trouble:
        return row.trouble.replace("|", "\\|")
    told = number(median(row.ratios))
    if len(row.ratios) > 1:
        told += f" ({number(min(row.ratios))}–{number(max(row.ratios))})"
    return told


HEAD = (
    "| section | model | what | aim | ratio, median (least–most) | ours / other | | notes |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    cells = [row.section, row.model, row.what, row.told, _ratio(row), _values(row), row.verdict, row.note]
    return f"| {' | '.join(cells)} |"


@dataclass
class Table:
    """All rows so far, and the file in which they are kept.

    Attributes:
        settings: what the figures depend on: a table is gone on with under the same alone. about: the machine, one line.
        path: JSON, and beside it the same as Markdown; None: kept nowhere. done: units of work whose rows are there.
    """

    settings: dict[str, Any]
    about: str
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    done: list[tuple[str, str]] = field(default_factory=list)

    def resume(self) -> None:
        """Take over what the file holds, without what failed.

        Raises:
            ValueError: it is no table, or was made under other settings.
        """
        assert self.path is not None
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in found["rows"]]
            settings, self.about = found["settings"], found["about"]
            done = [(section, model) for section, model in found["done"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} holds no table of this benchmark ({error}): name another file") from None
        if odd := sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k)):
            was = ", ".join(f"{k} {settings.get(k)!r} and not {self.settings.get(k)!r}" for k in odd)
            raise ValueError(f"{self.path} was measured with {was}: repeat the options of then, or name another file")
        again = {(row.section, row.model) for row in rows if row.failed}
        self.rows = [row for row in rows if (row.section, row.model) not in again]
        self.done = [unit for unit in done if unit not in again]

    def add(self, section: str, model: str, rows: Sequence[Row]) -> None:
        """Enter the rows of a unit of work, and write the files."""
        self.rows += rows
        self.done.append((section, model))
        if self.path is not None:
            value = {"about": self.about, "settings": self.settings, "done": self.done}
            atomic_write_json(self.path, {**value, "rows": [asdict(row) for row in self.rows]})
            atomic_write_text(self.path.with_suffix(".md"), self.markdown() + "\n")

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)

    def markdown(self) -> str:
        return "\n".join([self.about, "", HEAD, *map(line, self.rows)])


class Budget:
    """How many repeats there is time for: as many as are asked for, or as fit into a unit's share of the seconds that are left.

    Args:
        seconds: in all; None: no bound.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.perf_counter() + seconds
        self._unit: float | None = None

    def begin(self, weight: float, left: float) -> None:
        """A unit begins that is worth ``weight`` of the ``left`` that it and all after it are worth together."""
        if self._end is not None:
            now = time.perf_counter()
            self._unit = now + max(0.0, self._end - now) * weight / left

    @property
    def left(self) -> float | None:
        """Seconds left to the unit; None: no bound."""
        return None if self._unit is None else max(0.0, self._unit - time.perf_counter())

    def repeats(self, most: int, share: float = 1.0) -> Iterator[int]:
        """0, 1, … below ``most``, as long as another like those before fits into ``share`` of what is left; 0 in any case.

        >>> list(Budget(None).repeats(3))
        [0, 1, 2]
        """
        began, left = time.perf_counter(), self.left
        for n in range(most):
            yield n
            took = time.perf_counter() - began
            if left is not None and took * (n + 2) / (n + 1) > left * share:
                return
