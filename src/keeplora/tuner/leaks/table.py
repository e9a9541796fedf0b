"""An audit as tables for a terminal: worst layers first, 120 columns wide, and readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeplora.tuner.leaks.rows import (
    ABOVE,
    FACTOR_LIMIT,
    FLOOR,
    OK,
    Audit,
    BackwardRow,
    ExportRow,
    judge,
    worst_of,
)

WIDTH = 120
SHOWN = 24
"""Layers that a table shows unless all are asked for."""
NAME = 47
MARKS = {OK: ("✓", "green"), FLOOR: ("≈", "yellow"), ABOVE: ("✗", "bold red")}
KEY: tuple[str, ...] = (
    "Each figure is the worst over tasks and bases. ✓ within 1e-5; ≈ above it, but no more than twice the floor, which is",
    "what rounding to the dtype leaks by itself; ✗ above both.",
)


class TableText(str):
    """A table as text that an interactive session shows as it is, not as a quoted string."""

    def __repr__(self) -> str:
        return str(self)


def as_text(tables: Table | Sequence[Table], notes: Sequence[str] = (), width: int = 130) -> TableText:
    """Tables without colour, then the notes, a line each."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for table in [tables] if isinstance(tables, Table) else tables:
        console.print(table)
    return TableText(stream.getvalue() + "".join(f"{note}\n" for note in notes))


def audit_text(audit: Audit, every_layer: bool = False) -> TableText:
    """The tables of `audit_tables` as text."""
    return as_text(audit_tables(audit, every_layer), [*audit.notes, *closing_lines(audit, every_layer)], WIDTH)


def audit_tables(audit: Audit, every_layer: bool = False) -> list[Table]:
    """The leaks; and, where they were measured, the two stabilities. At most `SHOWN` layers each, the worst first."""
    tables = [_leak_table(audit, every_layer)]
    if any(row.worst is not None for row in audit.exports):
        tables.append(_stability_table(audit, every_layer))
    return tables


def closing_lines(audit: Audit, every_layer: bool = False) -> list[str]:
    """What the marks mean, how many layers are not shown, and every factor leak that is too large (the first five)."""
    lines = [*KEY]
    hidden = len(_layers(audit)) - SHOWN
    if hidden > 0 and not every_layer:
        lines.append(f"{hidden} more layers are not shown, none with a worse mark (--all shows them).")
    bad = sorted((r for r in audit.rows if r.factor_leak > FACTOR_LIMIT), key=lambda r: -r.factor_leak)
    for row in bad[:5]:
        parts = [(v or 0.0, n) for v, n in zip(row.by_basis, audit.bases, strict=False)]
        into = f", most of it into what {_basis(max(parts, key=lambda p: p[0])[1])} protects" if parts else ""
        lines.append(f"✗ the factors of task {row.task} in {row.layer} leak {row.factor_leak:.1e}{into}.")
    if len(bad) > 5:
        lines.append(f"✗ and {len(bad) - 5} more factor leaks above 1e-5.")
    lines += [
        f"✗ {_export(row)} of {row.layer} leak {row.leak:.1e} into what {_basis(row.basis)} protects, above the rounding "
        f"floor{f' of {row.floor:.0e}' if row.floor is not None else ''}: something besides the tasks in force is in them."
        for row in _unexplained(audit)[:5]
    ]
    broken = [row for row in audit.backward if row.holds is False]
    for row in broken[:5]:
        lines.append(
            f"✗ {row.layer}: tasks after {row.task} changed its answers by {row.harm:.1e}, above the bound of {row.bound:.1e}."
        )
    return lines


def _unexplained(audit: Audit) -> list[ExportRow]:
    """The worst row of each layer and export that leaks more than rounding explains."""
    worst: dict[tuple[str, str], ExportRow] = {}
    for row in audit.exports:
        if judge(row.leak, row.floor) == ABOVE:
            other = worst.setdefault((row.export, row.layer), row)
            if (row.leak or 0.0) > (other.leak or 0.0):
                worst[row.export, row.layer] = row
    return sorted(worst.values(), key=lambda row: -(row.leak or 0.0))


def _export(row: ExportRow) -> str:
    return {"running": "the running weights", "saved": "the saved weights"}.get(row.export, f"the {row.export} weights")


def _basis(name: str | None) -> str:
    return "the weight basis U₀" if name is None else f"task {name}"


def _layers(audit: Audit) -> list[str]:
    """Every layer once, the worst first: by its worst mark, then by its worst factor leak."""
    rank = {OK: 0, FLOOR: 1, ABOVE: 2}
    worst: dict[str, list[float]] = {}
    for row in audit.rows:
        entry = worst.setdefault(row.layer, [0, 0.0])
        marks = (judge(row.factor_leak), judge(row.weight_leak, row.weight_floor))
        entry[0] = max(entry[0], *(2 * (m == ABOVE) for m in marks))
        entry[1] = max(entry[1], row.factor_leak)
    for row in audit.exports:
        if row.layer in worst:
            worst[row.layer][0] = max(worst[row.layer][0], rank[judge(row.leak, row.floor) or OK])
    for row in audit.backward:
        if row.layer in worst and row.holds is False:
            worst[row.layer][0] = 2
    return sorted(worst, key=lambda name: (-worst[name][0], -worst[name][1]))


def _marked(text: str, mark: str | None) -> Text:
    if mark is None:
        return Text("–")
    sign, style = MARKS[mark]
    return Text(f"{text} {sign}", style=style)


def _leak(leak: float | None, floor: float | None) -> Text:
    if leak is None:
        return Text("–")
    beside = "" if floor is None else f"/{floor:.0e}"
    return _marked(f"{leak:.1e}{beside}", judge(leak, floor))


def _name(layer: str) -> Text:
    """The end of a long name says more than its beginning."""
    return Text(layer if len(layer) <= NAME else f"…{layer[-NAME + 1 :]}")


def _exports(audit: Audit) -> list[tuple[str, str]]:
    """(export, heading) of each export that was measured, in order."""
    found: dict[str, str] = {}
    for row in audit.exports:
        name = {"running": f"running {row.dtype}", "saved": f"saved {row.dtype}"}.get(row.export, row.export)
        found.setdefault(row.export, name)
    return list(found.items())


def _by_layer(rows: Sequence[Any]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for row in rows:
        out.setdefault(row.layer, []).append(row)
    return out


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", header_style="bold", padding=0, show_edge=False
    )  # fmt: skip
    table.add_column("layer", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _leak_table(audit: Audit, every_layer: bool) -> Table:
    exports = _exports(audit)
    headers = ["factors\nleak", *(f"{heading}\nleak{'' if key == 'adapter' else '/floor'}" for key, heading in exports)]
    if not exports:
        headers.append("running weights\nleak/floor")
    table = _table("Leak audit: share of the updates that acts on protected inputs", headers)
    rows, of_exports = _by_layer(audit.rows), _by_layer(audit.exports)
    for layer in shown_layers(audit, every_layer):
        worst = max(row.factor_leak for row in rows[layer])
        cells = [_marked(f"{worst:.1e}", judge(worst))]
        for key, _ in exports:
            cells.append(_worst_cell([row for row in of_exports.get(layer, []) if row.export == key]))
        if not exports:
            last = rows[layer][-1]
            cells.append(_leak(last.weight_leak, last.weight_floor))
        table.add_row(_name(layer), *cells)
    return table


def _worst_cell(rows: Sequence[ExportRow]) -> Text:
    worst = worst_of(rows)
    return _leak(worst.leak, worst.floor) if worst is not None else Text("–")


def _stability_table(audit: Audit, every_layer: bool) -> Table:
    exports = _exports(audit)
    headers = [f"{heading}\nrandom/worst" for _, heading in exports]
    if audit.backward:
        headers += ["\n1 − ε_t", "backward\nharm/bound"]
    table = _table(
        "Stability: by how much the answers to protected inputs changed, and later tasks' harm to earlier ones", headers
    )
    of_exports, backward = _by_layer(audit.exports), _by_layer(audit.backward)
    for layer in shown_layers(audit, every_layer):
        cells: list[Text] = []
        for key, _ in exports:
            moved = [r for r in of_exports.get(layer, []) if r.export == key and r.worst is not None]
            worst = max(moved, key=lambda r: r.worst, default=None)
            cells.append(Text("–" if worst is None else f"{worst.random:.0e}/{worst.worst:.0e}"))
        if audit.backward:
            cells += _backward_cells(backward.get(layer, []))
        table.add_row(_name(layer), *cells)
    return table


def _backward_cells(rows: Sequence[BackwardRow]) -> list[Text]:
    if not rows:
        return [Text("–"), Text("–")]
    left = Text(f"{max(1 - row.explained for row in rows):.1e}")
    if all(row.harm is None for row in rows):
        return [left, Text("bound alone")]
    broken = any(row.holds is False for row in rows)
    tight = [row.tightness for row in rows if row.tightness is not None]
    text = f"{max(tight):.2f}" if tight else "0"
    return [left, _marked(text, ABOVE if broken else OK)]


def shown_layers(audit: Audit, every_layer: bool) -> list[str]:
    """The layers that the tables have, the worst first: all of them, or the first `SHOWN`."""
    layers = _layers(audit)
    return layers if every_layer else layers[:SHOWN]
