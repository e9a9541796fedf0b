"""Tables in a narrow terminal: nothing is cut, the rows can be told apart in every part, and every line fits."""

from __future__ import annotations

import io
import re

import pytest
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeplora.cli.console import fitting, print_table, wide_console
from tests.cli.tiny_world import TASKS

NAMES = ["vision_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"]
WIDTHS = (30, 47, 60, 80, 100, 140)


def a_table(style: box.Box | None) -> Table:
    table = Table(title="A title that is longer than some terminals are wide", caption="a caption", box=style)
    table.add_column("layer", no_wrap=True)
    table.add_column("what it is")
    for k in range(6):
        table.add_column(f"number\n{k}", justify="right", no_wrap=True)
    for name in NAMES:
        table.add_row(Text(name), "some prose that goes on for a while", *(f"{k}.{k}e-0{k} ✓" for k in range(6)))
    return table


def printed(table: Table, width: int, keys: int = 1) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(console, table, keys)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("style", [box.SIMPLE_HEAD, box.HEAVY_HEAD, None], ids=["simple", "heavy", "none"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut(width, style):
    lines = printed(a_table(style), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for k in range(6):
        assert text.count(f"{k}.{k}e-0{k}") == 2
    assert all(text.count(word) >= 2 for word in ("prose", "goes", "while"))
    assert text.count("a caption") == 1
    assert sum("A title" in line for line in lines) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_every_part_has_the_columns_that_tell_rows_apart(width):
    parts = fitting(Console(width=width), a_table(box.SIMPLE_HEAD))
    assert [part.columns[0].header for part in parts] == ["layer"] * len(parts)
    assert [list(map(str, part.columns[0].cells)) for part in parts] == [NAMES] * len(parts)
    others = [column.header for part in parts for column in part.columns[1:]]
    assert others == [column.header for column in a_table(None).columns[1:]]
    assert (len(parts) == 1) == (width >= 140)


def test_what_fits_is_printed_as_it_was():
    table = a_table(box.HEAVY_HEAD)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert printed(table, 200) == console.file.getvalue().splitlines()


def test_a_column_without_a_filled_cell_is_left_out_unless_there_is_no_row():
    table = Table("name", "empty", "blank", "filled")
    assert "empty" in "".join(printed(table, 80))
    table.add_row("a", "", Text(" "), "")
    table.add_row("b", "", "", "1")
    text = "\n".join(printed(table, 80))
    assert "empty" not in text
    assert "blank" not in text
    assert "filled" in text


def test_what_is_no_table_is_printed_as_it_is(capsys):
    print_table(wide_console(), "a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.fixture
def terminal(cli, monkeypatch):
    """``terminal(60, "methods")``: a command's output in a terminal so wide, without its colours."""

    def call(width: int, *words: object) -> str:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(width))
        answer = cli(*words)
        assert answer.code == 0, answer.err
        text = re.sub(r"\x1b\[[0-9;]*m", "", answer.out)
        tables = [line for line in text.splitlines() if set(line) & set("━─│┃")]
        assert all(len(line) <= width for line in tables)
        return text

    return call


@pytest.mark.parametrize("width", [60, 80])
def test_commands_cut_nothing_that_tells_rows_apart(terminal, world, width):
    run = world.run()[0]
    for words in (("suites",), ("methods",), ("methods", "show", "replay"), ("ledger", "log", run),
                  ("ledger", "verify", run), ("suites", "doctor", "demo-small")):  # fmt: skip
        assert "…" not in terminal(width, *words), words
    for words in (("capacity", run), ("audit", run), ("analyze", "drift", run)):
        text = terminal(width, *words)
        assert "…" not in text, words
        assert re.search(r"\bvision", text), words
        assert re.search(r"\btext", text), words
    log = terminal(width, "ledger", "log", run)
    assert all(task in log for task in TASKS)


def test_a_suite_without_counts_is_shown_without_their_columns(terminal):
    text = terminal(80, "suites", "show", "demo")
    assert "…" not in text
    head = next(line for line in text.splitlines() if "┃" in line and "name" in line)
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == ["", "name", "source", "path", "prompt"]
    assert all(f"demo/{name}.parquet" in text for name in ("hieroglyphs", "road-signs", "line-icons"))
    assert "classes" in terminal(80, "suites", "show", "mtil")
