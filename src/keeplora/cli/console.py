"""The console that tables are printed to, and tables that fit it: too wide a table goes on below, and nothing is cut."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.measure import Measurement, measure_renderables
from rich.table import Column, Table
from rich.text import Text

from keeplora.report.audit_charts import short_names

LAYER = 34
"""Characters of a layer's name where there is no room for whole ones; of a longer one tower, block and last parts stay."""


def wide_console(width: int = 120) -> Console:
    """A terminal's own width; a pipe or a log file has none, and 80 columns would split tables up."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def print_table(console: Console, table: RenderableType, keys: int = 1) -> None:
    """Print a table in as many parts as `fitting` makes of it; anything else as it is."""
    for part in fitting(console, table, keys) if isinstance(table, Table) else [table]:
        console.print(part)


def with_layers(console: Console, table: Table, layers: Sequence[str]) -> Table:
    """The table with these layers' names in its first column: whole where they fit, else short but told apart.

    The library's own tables cut long names from the left for a fixed width, and with them the tower.
    """
    whole = _first(table, layers)
    if Measurement.get(console, console.options.update_width(10_000), whole).maximum <= console.width:
        return whole
    return _first(table, short_names(layers, LAYER))


def _first(table: Table, names: Sequence[str]) -> Table:
    cells: list[RenderableType] = [Text(name) for name in names]
    return _with(table, [replace(table.columns[0], _cells=cells), *table.columns[1:]])


def fitting(console: Console, table: Table, keys: int = 1) -> list[Table]:
    """The table, if no word of it has to be cut to fit; else several, one below the other.

    Each part has the first ``keys`` columns, which tell the rows apart, and as many of the others as there is room for.
    A word longer than its share of the width is folded. A column without a single filled cell is left out.

    >>> table = Table("name", "first", "second")
    >>> table.add_row("vision tower", "a" * 20, "b" * 20)
    >>> [[str(column.header) for column in part.columns] for part in fitting(Console(width=50), table)]
    [['name', 'first'], ['name', 'second']]
    """
    columns = [column for column in table.columns if not table.rows or any(map(_filled, column.cells))]
    whole = _with(table, columns)
    wide = console.options.update_width(10_000)
    if Measurement.get(console, wide, whole).maximum <= console.width:
        return [whole]

    def frame(part: Sequence[Column]) -> int:
        """What lines and padding take of a part's width."""
        narrow = _with(table, [replace(column, width=1, min_width=None) for column in part])
        return Measurement.get(console, wide, narrow).maximum - len(part)

    needs = {id(c): _needs(console, c) for c in columns}

    def fits(part: Sequence[Column]) -> bool:
        return sum(needs[id(column)][0] for column in part) + frame(part) <= console.width

    parts: list[list[Column]] = [columns[: keys + 1]]
    for column in columns[keys + 1 :]:
        grown = [*parts[-1], column]
        if fits(grown):
            parts[-1] = grown
        else:
            parts.append([*columns[:keys], column])
    made = []
    for part in parts:
        room, found = console.width - frame(part), [needs[id(column)] for column in part]
        if not fits(part):
            found = [(min(least, max(1, room // len(part))), most) for least, most in found]
        shown = [
            replace(column, width=width, min_width=None, no_wrap=False, overflow="fold")
            for column, width in zip(part, _share_out(found, room), strict=True)
        ]
        made.append(_with(table, shown))
    for part in made[1:]:
        part.title = None
    for part in made[:-1]:
        part.caption = None
    return made


def _needs(console: Console, column: Column) -> tuple[int, int]:
    """The width of a column's longest word and of its longest line."""
    least, most = measure_renderables(console, console.options.update_width(10_000), [column.header, *column.cells])
    return (most if column.no_wrap else least), most


def _filled(cell: RenderableType) -> bool:
    return not isinstance(cell, str | Text) or bool(str(cell).strip())


def _with(table: Table, columns: Sequence[Column]) -> Table:
    """The table with these of its columns alone."""
    made = copy(table)
    made.columns = [replace(column, _index=k) for k, column in enumerate(columns)]
    return made


def _share_out(needs: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Widths between each column's least and most: all as wide as the room allows, the narrow ones first.

    >>> _share_out([(3, 5), (4, 30), (8, 40)], 40)
    [5, 18, 17]
    """
    widths = [least for least, _ in needs]
    while sum(widths) < room and (can := [k for k, (_, most) in enumerate(needs) if widths[k] < most]):
        widths[min(can, key=lambda k: widths[k])] += 1
    return widths
