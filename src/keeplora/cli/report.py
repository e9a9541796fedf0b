"""`keeplora report`: write a run's report again, beside other runs, or an index over many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keeplora.errors import ConfigError


def report(
    directory: Annotated[Path, typer.Argument(help="The run directory; with --index, a folder of runs and studies.")],
    against: Annotated[list[Path] | None, typer.Option(help="Other run directories. Repeatable.")] = None,
    index: Annotated[
        bool, typer.Option("--index", help="Write DIRECTORY/index.html: one sortable table of all runs and studies below it.")
    ] = False,
) -> None:  # fmt: skip
    """Render report.html; runs beside this one that are comparable are put in by themselves.

    With --index: a page over all runs and studies below a folder, also the unfinished and the damaged ones.
    """
    if index:
        if against:
            raise ConfigError(
                "--against is for one run's report; an index holds every run below the folder: leave it out"
            )
        from keeplora.report import render_index

        typer.echo(str(render_index(directory)))
        return
    from keeplora.report import render_report

    typer.echo(str(render_report(directory, against or [])))
