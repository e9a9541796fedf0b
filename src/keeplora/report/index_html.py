"""``index.html`` over many runs: one self-contained file, a plain table that a small script makes sortable."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from keeplora.files import atomic_write_text
from keeplora.report import palette, tables
from keeplora.report.charts import number
from keeplora.report.index import Row, collect, metric_columns
from keeplora.report.kinds import Metric
from keeplora.report.pages import TEMPLATES, page_template

STATES = {
    "finished": "finished", "running": "running, or killed", "failed": "failed", "interrupted": "interrupted",
    "partial": "partial", "damaged": "damaged",
}  # fmt: skip


class Entry(NamedTuple):
    """A cell: what is read, and what is sorted by (an ISO time, a number, or text; empty: after everything else)."""

    text: str
    value: str
    numeric: bool = False


def _plain(text: object) -> str:
    """Text that UTF-8 can hold: names of files need not be."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def _text(value: object) -> Entry:
    return Entry("–", "") if value in (None, "") else Entry(_plain(value), _plain(value))


def _number(value: Any, text: str | None = None) -> Entry:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return Entry("–", "", True)
    return Entry(number(value) if text is None else text, repr(value), True)


def _state(row: Row) -> dict[str, Any]:
    word = STATES.get(row.state, f"unknown ({_plain(row.state)})" if row.state != "unknown" else "unknown")
    of = "cells" if row.kind == "study" else "tasks"
    progress = f"{row.done} of {row.total} {of}" if row.total and row.state not in ("finished", "damaged") else ""
    if row.kind == "study" and row.state == "finished":
        progress = f"{row.total} cells"
    return {
        "word": word, "cls": row.state if row.state in STATES else "interrupted", "progress": progress,
        "note": _plain(row.note),
    }  # fmt: skip


def _link(row: Row, root: Path) -> str | None:
    """The report's address, relative to the page; None where there is none."""
    report = row.path / "report.html"
    try:
        if not report.is_file():
            return None
    except OSError:  # a folder that is closed to us
        return None
    return quote(os.fsencode(os.path.relpath(report, root)).replace(os.sep.encode(), b"/"))


def _suite(value: str | None) -> Entry:
    """A suite's own file by its name; the whole address is what it is sorted by."""
    return (
        _text(value)._replace(text=_plain(Path(value).stem))
        if value and value.endswith((".yaml", ".yml"))
        else _text(value)
    )


COLUMNS: dict[str, Callable[[Row], Entry]] = {
    "kind": lambda row: _text(row.kind), "suite": lambda row: _suite(row.suite), "method": lambda row: _text(row.method),
    "model": lambda row: _text(row.model), "order": lambda row: _text(row.order),
    "seed": lambda row: _number(row.seed, str(row.seed)),
}  # fmt: skip


def _columns(rows: list[Row]) -> list[str]:
    """Of `COLUMNS` those that tell rows apart: every row a run, or none with an order, needs no column to say so."""
    needless = {
        "kind": all(row.kind == "run" for row in rows),
        "order": all(row.order in (None, "") for row in rows),
    }
    return [name for name in COLUMNS if not needless.get(name)]


def _entry(row: Row, root: Path, metrics: list[Metric], columns: list[str]) -> dict[str, Any]:
    where = _plain(os.path.relpath(row.path, root))
    cells = [COLUMNS[name](row) for name in columns]
    tail = [_number(row.metrics.get(key)) for key, *_ in metrics]
    tail += [_number(row.seconds, tables.duration(row.seconds)), _number(row.size, tables.size(row.size))]
    started = Entry(_plain(tables.moment(row.started)), _plain(row.started)) if row.started else Entry("–", "")
    return {
        "name": _plain(row.name), "where": "" if where in (".", _plain(row.name)) else where,
        "link": _link(row, root), "state": _state(row),
        "cells": cells, "tail": [*tail, started],
    }  # fmt: skip


def _said(rows: list[Row]) -> list[tuple[str, str]]:
    """How many there are of each, the largest worry last."""
    runs, studies = ([row for row in rows if row.kind == kind] for kind in ("run", "study"))
    said = [("finished", f"{len(runs)} run{'' if len(runs) == 1 else 's'}")] if runs else []
    if studies:
        said.append(("finished", f"{len(studies)} stud{'y' if len(studies) == 1 else 'ies'}"))
    for state in ("running", "partial", "interrupted", "failed", "unknown", "damaged"):
        if n := sum(row.state == state for row in rows):
            said.append((state if state in STATES else "interrupted", f"{n} {STATES.get(state, state)}"))
    return said


def _context(rows: list[Row], root: Path) -> dict[str, Any]:
    metrics, columns = metric_columns(rows), _columns(rows)
    script = (TEMPLATES / "index.js").read_text(encoding="utf-8")
    heads = [(name, "", "") for name in ("name", "state", *columns)]
    heads += [(f"{name} {'↑' if higher else '↓'}", meaning, "num") for _, name, higher, meaning in metrics]
    heads += [
        ("time", "all parts of the run, or of all cells", "num"),
        ("size", "all files of the folder", "num"),
        ("started", "UTC", ""),
    ]
    return {
        "title": _plain(root.resolve().name or root), "heads": heads,
        "rows": [_entry(row, root, metrics, columns) for row in rows],
        "said": _said(rows), "meanings": [(name, meaning) for _, name, _, meaning in metrics],
        "light": palette.css("light"), "dark": palette.css("dark"), "script": script,
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "style": "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "study.css", "index.css")),
    }  # fmt: skip


def render_index(folder: str | os.PathLike[str]) -> Path:
    """Write ``index.html`` into ``folder``: a table of all runs and studies at or below it, each with a link to its report.

    The table is whole without JavaScript; the page's one script sorts it by any column and filters it, and the page's own policy
    lets no other run. Runs that are unfinished or damaged have rows that say so. Reports are linked, not made: a run whose
    report is missing has no link (`render_report` makes it). The file is replaced atomically.

    Raises `KeepLoraError` where ``folder`` is none, or holds neither a run nor a study.

    Example::

        path = render_index("runs")
    """
    root = Path(folder)
    page = page_template("index.html.j2").render(**_context(collect(root), root))
    return atomic_write_text(root / "index.html", page.lstrip())
