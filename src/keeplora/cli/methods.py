"""`keeplora methods`: list the methods side by side, and show one with its options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from keeplora.methods import Method

app = typer.Typer(help="List and show the methods.", invoke_without_command=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

COLUMNS = {
    "name": "name", "title": "title", "kinds": "kinds", "trained": "trained parameters", "state": "state kept",
    "extra_data": "extra data", "task_identity": "task identity", "inference": "inference cost",
}  # fmt: skip
"""Fields of `Method` that the table shows, and their headers."""


def row(method: Method) -> list[str]:
    """A method's cells of the table."""

    def text(value: str | bool | tuple[str, ...]) -> str:
        if isinstance(value, tuple):
            return ", ".join(value)
        return value if isinstance(value, str) else ("needed" if value else "no")

    return [text(getattr(method, key)) for key in COLUMNS]


def describe(method: Method) -> dict[str, Any]:
    """All that is known of a method, as JSON values."""
    from dataclasses import fields

    keys = (*COLUMNS, "summary", "paper", "trains", "classifier", "unmergeable")
    return {
        **{key: getattr(method, key) for key in keys},
        "options": [
            {"name": f.name, "default": f.default, "help": f.metadata.get("help", "")} for f in fields(method.learner.Options)
        ],
        "config": dict(method.config),
        "search": {key: list(axis) for key, axis in method.search.items()},
    }  # fmt: skip


def axis_text(axis: Any) -> str:
    """An axis of the search space in words.

    >>> axis_text(("log", 0.001, 10.0)), axis_text(("choice", [0.2, 0.5]))
    ('0.001 to 10, even in the logarithm', '0.2 or 0.5')
    """
    kind, *bounds = axis
    if kind == "choice":
        return " or ".join(str(value) for value in bounds[0])
    low, high = bounds
    return f"{low:g} to {high:g}, even{' in the logarithm' if kind == 'log' else ''}"


@app.callback()
def _list_unless_asked(ctx: typer.Context, as_json: _Json = False) -> None:
    if ctx.invoked_subcommand is None:
        ls(as_json)


@app.command()
def ls(as_json: _Json = False) -> None:
    """List the methods: what they train, keep, need and cost."""
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.methods import get_method, method_names

    methods = [get_method(name) for name in method_names()]
    if as_json:
        typer.echo(json.dumps([describe(method) for method in methods], ensure_ascii=False))
        return
    table = Table()
    for key, header in COLUMNS.items():
        table.add_column(header, no_wrap=key == "name")
    for method in methods:
        table.add_row(*row(method))
    print_table(wide_console(160), table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method's name, such as keeplora++.")], as_json: _Json = False
) -> None:
    """Show a method: its paper, its options, the settings that define it, and what `keeplora tune` varies."""
    from rich.table import Table
    from rich.text import Text

    from keeplora.cli.console import print_table, wide_console
    from keeplora.methods import get_method

    method = get_method(name)
    found = describe(method)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    console = wide_console(160)

    def line(text: str) -> None:
        console.print(Text(text), soft_wrap=True)  # as plain text: brackets are no markup

    line(f"{method.name}: {method.title}")
    line(method.summary)
    line(f"paper: {method.paper or 'none'}")
    for header, cell in list(zip(COLUMNS.values(), row(method), strict=True))[2:]:
        line(f"{header}: {cell}")
    line(f"export: {f'none: it {method.unmergeable}' if method.unmergeable else 'one adapter, or merged'}")
    for field, value in found["config"].items():
        line(f"fixed by the method: tuner.{field} = {value}")
    for key, axis in found["search"].items():
        line(f"keeplora tune varies {key}: {axis_text(axis)}")
    if not found["search"]:
        line("keeplora tune varies nothing")
    if not found["options"]:
        line("options: none of its own")
        return
    table = Table(title="options (-o tuner.options.NAME=VALUE)", title_justify="left")
    for header in ("name", "default", "what it is"):
        table.add_column(header, no_wrap=header == "name")
    for option in found["options"]:
        table.add_row(*(Text(str(option[key])) for key in ("name", "default", "help")))
    print_table(console, table)
